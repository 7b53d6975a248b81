"""How the target chooses a token: filtered logits plus position-keyed noise, and an argmax.

The token of request r at position p is ``argmax_v(warp(logits)_v + gumbel(seed_r, p, v))``; greedy is the same without
noise. The noise is counter-based (threefry on (position, token) under the request's key), so that of one token can be
computed alone, by any shard and in any order. The text therefore depends on the seed and the target alone, never on
what was drafted or on the other rows of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jeagle import vocabulary
from jeagle.distributed import of_first_process
from jeagle.sharding import Across, across, rows_first, split
from pallas_kernels.noise import gumbel_of_bits, threefry

__all__ = [
    "SAMPLERS",
    "Filters",
    "RowSampling",
    "SamplingParams",
    "choose",
    "drawn_seed",
    "gumbel",
    "logprobs",
    "resolve_sampler",
    "seed_keys",
    "warp",
]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What to generate for one prompt. Names and meanings follow vLLM, but for two defaults: 128 tokens (16 there), and
    temperature 0 (1 there), so filters must come with a temperature.

    max_tokens: most tokens to emit. temperature: 0 is greedy. top_k: 0 or -1 is off. top_p: 1 is off. min_p: 0 is off.
    seed: None draws one. n: independent samples per prompt. stop: strings that end the text, not included in it.
    stop_token_ids: ids that end it beside the model's EOS, in token_ids but not in the text. ignore_eos: go on after
    EOS. logprobs: log-probabilities of the chosen and of this many best tokens, by the unwarped target.
    """

    max_tokens: int = 128
    temperature: float = None  # type: ignore[assignment]  # which becomes 0; filters ask whether it was given
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()  # one string or None will do too, as in vLLM
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        for field, value in (("stop", stop), ("stop_token_ids", ids)):
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{field} must be a list, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        unsaid = self.temperature is None
        if unsaid:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {rule}, got {getattr(self, field)!r}")

        def whole(value: object, low: int, high: float = math.inf) -> bool:
            return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(low <= value <= high)

        def real(value: object, low: float, high: float) -> bool:
            return (
                isinstance(value, (int, float, np.number))
                and not isinstance(value, bool)
                and bool(low <= value <= high)
            )

        check(whole(self.max_tokens, 1), "max_tokens", "a whole number of at least 1")
        check(real(self.temperature, 0, 1e6), "temperature", "0 (greedy) or a positive number")
        check(whole(self.top_k, 0, 2**31 - 1), "top_k", "0 or -1 (off) or a positive whole number")
        check(real(self.top_p, 0, 1) and self.top_p > 0, "top_p", "above 0 and at most 1 (off)")
        check(real(self.min_p, 0, 1), "min_p", "from 0 (off) to 1")
        check(self.seed is None or whole(self.seed, 0, 2**64 - 1), "seed", "None or a whole number from 0 to 2**64 - 1")
        check(whole(self.n, 1), "n", "a whole number of at least 1")
        check(all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty strings")
        check(all(whole(t, 0) for t in self.stop_token_ids), "stop_token_ids", "token ids, each 0 or more")
        check(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        check(self.logprobs is None or whole(self.logprobs, 0, 20), "logprobs", "None or a whole number from 0 to 20")
        for field in ("max_tokens", "top_k", "seed", "n", "logprobs"):  # of numpy's numbers, which overflow
            if getattr(self, field) is not None:
                object.__setattr__(self, field, int(getattr(self, field)))
        asked = dict(top_k=self.top_k > 0, top_p=self.top_p < 1, min_p=self.min_p > 0)
        if unsaid and any(asked.values()):
            field = next(field for field, given in asked.items() if given)
            raise ValueError(
                f"{field}={getattr(self, field)} needs a temperature, which is 0 (greedy) unless it is given: say "
                "temperature=1.0, or temperature=0 to choose greedily all the same"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """Sampling parameters as arrays, one entry per row; on the host until a state is made of them."""

    seed_B2: jax.Array  # uint32: the row's threefry key
    temperature_B: jax.Array  # float32, 0 greedy
    top_k_B: jax.Array  # int32, 0 off
    top_p_B: jax.Array  # float32, 1 off
    min_p_B: jax.Array  # float32, 0 off

    @classmethod
    def stack(cls, params: list[SamplingParams], seeds: np.ndarray) -> RowSampling:
        """On the host. seeds: uint32 [B, 2]."""

        # Colder than this, logits divided by it are infinite: as greedy as it means to be.
        temperatures = [p.temperature if p.temperature > 1e-30 else 0 for p in params]
        columns: list[Any] = [seeds, np.array(temperatures, np.float32)]
        for field, dtype in (("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32)):
            columns.append(np.array([getattr(p, field) for p in params], dtype))
        return cls(*columns)


@dataclass(frozen=True)
class Filters:
    """Which parts of the warp a compiled program holds; what no row uses is not computed."""

    sample: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False

    @property
    def filter(self) -> bool:
        """Whether any token is left out."""
        return self.top_k or self.top_p or self.min_p

    @classmethod
    def needed(cls, params: list[SamplingParams]) -> Filters:
        sampled = [p for p in params if p.temperature > 0]
        return cls(
            sample=bool(sampled),
            top_k=any(p.top_k for p in sampled),
            top_p=any(p.top_p < 1 for p in sampled),
            min_p=any(p.min_p > 0 for p in sampled),
        )


def seed_keys(seed: int | Sequence[int], n: int) -> np.ndarray:
    """Threefry keys, uint32 [n, 2], of n samples of one prompt."""
    return np.random.SeedSequence(seed).generate_state(2 * n, np.uint32).reshape(n, 2)


def drawn_seed() -> list[int]:
    """A seed by the operating system, as uint32 numbers: that of process 0, where there are several."""
    return of_first_process(np.random.SeedSequence().generate_state(4, np.uint32)).tolist()


def gumbel(seed_B2: jax.Array, position_BT: jax.Array, token: jax.Array) -> jax.Array:
    """Gumbel(0, 1) noise of each (request, position, token), float32 [B, T, *].

    token: ids [V] or any shape broadcasting against [B, T, 1]. An element depends on its own three numbers only.
    """
    key_0, key_1 = seed_B2[:, 0, None, None], seed_B2[:, 1, None, None]
    return gumbel_of_bits(threefry(key_0, key_1, position_BT[..., None], token))


def _keep_largest(x: jax.Array, weight: jax.Array, enough: jax.Array, vocab: Across) -> jax.Array:
    """Mask of the elements >= t, t the largest threshold under which the kept weight is at least ``enough``.

    x, weight: [..., V]; enough: [..., 1]; all are kept when all weigh less. Ties with t are kept, so the result does
    not depend on the order of tokens. Bisection over the float's ordered bit pattern: 32 passes of compare-and-sum, no
    sort (a sort of 49,152 logits takes a CPU 25 times as long), and exact. Over a split vocabulary every pass waits for
    the other shards, so 8 passes decide four bits each.
    """
    digit = 1 if vocab.whole else 4
    value_n1 = jnp.arange(1, 1 << digit, dtype=jnp.uint32)[:, None]
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 equals 0.0
    ordered = jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31)))
    key = jax.lax.bitcast_convert_type(ordered, jnp.uint32)

    def refine(i: jax.Array, threshold: jax.Array) -> jax.Array:
        place = (32 - digit * (i + 1)).astype(jnp.uint32)
        trial = threshold[..., None] | (value_n1 << place)
        kept_n = vocab.sum(jnp.sum(jnp.where(key[..., None, :] >= trial, weight[..., None, :], 0), axis=-1))
        # The larger the value the less is kept: how many values keep enough is the largest that does.
        best = jnp.sum(kept_n >= enough, axis=-1, keepdims=True)
        return threshold | (best.astype(jnp.uint32) << place)

    threshold = jax.lax.fori_loop(0, 32 // digit, refine, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))
    return key >= threshold


def _weights(x: jax.Array, vocab: Across) -> jax.Array:
    """Softmax over the last axis in whole numbers, int32, that add up to nearly 2**31.

    Sums of whole numbers are exact, so what top-p keeps depends on no order of summation, and a kernel or a shard of
    the vocabulary finds the same tokens. The scale must not depend on one either: its sum is one of whole numbers in
    units of 2**-26, in two limbs of 13 bits (V below 2**18). It may fall short by V units: hence 127/128 of 2**31.
    """
    e = jnp.exp(x - vocab.max(jnp.max(x, axis=-1, keepdims=True)))
    units = (e * 2.0**26).astype(jnp.int32)
    high, low = (vocab.sum(jnp.sum(limb, axis=-1, keepdims=True)) for limb in (units >> 13, units & 8191))
    return (e * (127 * 2.0**50 / (high * 2.0**13 + low))).astype(jnp.int32)


def warp(logits_BTV: jax.Array, rows: RowSampling, filters: Filters, vocab: Across = Across(None)) -> jax.Array:
    """Temperature, then top-k, top-p, min-p: HF's order. Dropped tokens become -inf. Greedy rows pass unchanged.

    logits_BTV: all of a vocabulary, or the part of it that ``vocab`` says this shard has.
    """
    if not filters.sample:
        return logits_BTV
    columns = {f.name: getattr(rows, f.name)[:, None, None] for f in dataclasses.fields(rows) if f.name != "seed_B2"}
    temperature, top_k, top_p, min_p = columns.values()
    greedy = temperature == 0
    x = logits_BTV * (1 / jnp.where(greedy, 1.0, temperature))  # as XLA would: one division a row
    if filters.top_k:
        ones = jnp.ones_like(x, dtype=jnp.int32)
        keep = _keep_largest(x, ones, top_k, vocab) | (top_k == 0)
        x = jnp.where(keep, x, -jnp.inf)
    if filters.top_p:
        weight = _weights(x, vocab)
        total = vocab.sum(jnp.sum(weight, axis=-1, keepdims=True))
        spare = ((1 - top_p) * total).astype(jnp.int32)
        keep = _keep_largest(x, weight, jnp.maximum(total - spare, 1), vocab) | (top_p >= 1)
        x = jnp.where(keep, x, -jnp.inf)
    if filters.min_p:
        # p >= min_p * p_max is x >= x_max + log(min_p): no normalisation needed.
        best = vocab.max(jnp.max(x, axis=-1, keepdims=True))
        keep = (x >= best + jnp.log(min_p)) | (min_p == 0)
        x = jnp.where(keep, x, -jnp.inf)
    return jnp.where(greedy, logits_BTV, x)


def _choose_xla(
    logits_BTV: jax.Array, position_BT: jax.Array, rows: RowSampling, filters: Filters, vocab: Across
) -> jax.Array:
    x = warp(logits_BTV, rows, filters, vocab)
    if filters.sample:
        noise = gumbel(rows.seed_B2, position_BT, vocabulary.ids(x, vocab))
        # The barrier keeps XLA:CPU from fusing the noise into the argmax, where it takes three times as long.
        x = jax.lax.optimization_barrier(x + jnp.where(rows.temperature_B[:, None, None] == 0, 0.0, noise))
    return vocabulary.argmax(x, vocab)


def _choose_pallas(
    logits_BTV: jax.Array, position_BT: jax.Array, rows: RowSampling, filters: Filters, vocab: Across
) -> jax.Array:
    from pallas_kernels import choose_pallas  # at its first call: the lowering may leave JAX

    if not vocab.whole:
        raise NotImplementedError("sampler 'pallas' reads the whole vocabulary; over a split one use sampler='xla'")
    B, T, V = logits_BTV.shape
    columns = (rows.seed_B2, rows.temperature_B, rows.top_k_B, rows.top_p_B, rows.min_p_B)
    token_R = choose_pallas.choose(logits_BTV.reshape(-1, V), position_BT.reshape(-1), *columns, filters=filters)
    return token_R.reshape(B, T)


SAMPLERS: dict[str, Callable[..., jax.Array]] = {
    "xla": _choose_xla,
    "pallas": _choose_pallas,
}


def resolve_sampler(name: str, *, whole: bool = True, platform: str | None = None) -> str:
    """The sampler that serves ``name`` on a platform (JAX's default one if None).

    whole: whether each device has all of the vocabulary. "auto" is the kernel on GPUs, if so, and else XLA. On an H100
    both take as long for greedy tokens, one row or 64; a round of 1,024 rows of SmolLM2 in bfloat16, a third of them
    sampled with top-p, took 4.4 to 5.3 ms with the kernel and 8.1 to 9.1 with XLA.
    """
    if name == "auto":
        return "pallas" if whole and (platform or jax.default_backend()) == "gpu" else "xla"
    if name not in tuple(SAMPLERS):
        raise ValueError(f"sampler {name!r} is unknown; choose one of {['auto', *SAMPLERS]}")
    return name


def choose(
    logits_BTV: jax.Array, position_BT: jax.Array, rows: RowSampling, filters: Filters, *, sampler: str = "auto"
) -> jax.Array:
    """The target's token at each of ``position_BT`` (the positions being filled), int32 [B, T].

    sampler: "xla", "pallas" (one launch for everything; pallas_kernels/choose_pallas.py) or "auto". Both choose the
    same token, but for near-ties on GPUs. Of a split vocabulary each device warps its own logits and makes their noise;
    the winners travel.
    """
    vocab = across("vocab")
    chosen = partial(SAMPLERS[resolve_sampler(sampler, whole=vocab.whole)], filters=filters, vocab=vocab)
    inputs = (("rows", None, "vocab"), ("rows", None), jax.tree.map(rows_first, rows))
    return split(chosen, inputs, ("rows", None))(logits_BTV, position_BT, rows)


def logprobs(logits_BTV: jax.Array, chosen_BT: jax.Array, num_best: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, float32, of the chosen tokens [B, T] and of the n best [B, T, n]; and the n best's ids."""
    vocab = across("vocab")

    def of_shard(logits_BTV: jax.Array, chosen_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        all_BTV = vocabulary.log_softmax(logits_BTV, vocab)
        best = vocabulary.top_k(all_BTV, num_best, vocabulary.ids(all_BTV, vocab), vocab)
        return vocabulary.lookup(all_BTV, chosen_BT, vocab), *best

    rows = ("rows", None)
    return split(of_shard, ((*rows, "vocab"), rows), (rows, (*rows, None), (*rows, None)))(logits_BTV, chosen_BT)
