"""The fused choosing kernel, interpreted, against ``jeagle.sampling.choose``: the same token in every row."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jeagle import LLM, SamplingParams
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.sampling import SAMPLERS, Filters, RowSampling, choose, gumbel, resolve_sampler
from pallas_kernels import choose_pallas
from pallas_kernels.noise import gumbel_of_bits, threefry

R = 32
ALL = Filters(sample=True, top_k=True, top_p=True, min_p=True)
TEMPERATURE = (0, 0, 1, 1, 1, 0.6, 0.01, 1e-4, 1e-30, 1.7, 30, 1e6)
TOP_K = (0, 0, 1, 2, 7, 50, 999, 1000, 1001, 2**31 - 1)
TOP_P = (1, 1, 1e-12, 0.1, 0.5, 0.9, 0.9999, 1 - 2**-24)
MIN_P = (0, 0, 1e-9, 0.05, 0.5, 1)
LOGITS = {
    "normal": lambda rng, V: 3 * rng.standard_normal(V),
    "peaked": lambda rng, V: 30 * rng.random(V) ** 9,
    "flat": lambda rng, V: 1e-4 * rng.standard_normal(V),
    "even": lambda rng, V: np.full(V, rng.choice([0.0, -7.25])),
    "ties": lambda rng, V: np.round(3 * rng.standard_normal(V)),
    "zeros of both signs": lambda rng, V: rng.choice([0.0, -0.0, -1.0], V),
    "one": lambda rng, V: np.where(np.arange(V) == rng.integers(V), 1.5, -np.inf),
    "few": lambda rng, V: np.where(rng.random(V) < 5 / V, rng.standard_normal(V), -np.inf),
    "masked": lambda rng, V: np.where(rng.random(V) < 0.5, 4 * rng.standard_normal(V), -np.inf),
    "none": lambda rng, V: np.full(V, -np.inf),
    "huge": lambda rng, V: 1e37 * rng.standard_normal(V),
    "tiny": lambda rng, V: 1e-37 * rng.standard_normal(V),
    "infinite": lambda rng, V: np.where(rng.random(V) < 3 / V, np.inf, rng.standard_normal(V)),
}


def draw(V: int, seed: int, dtype: type = np.float32) -> tuple[jax.Array, jax.Array, RowSampling]:
    """(logits, position, parameters) of R rows, each of its own kind."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(sorted(LOGITS), R)
    logits = np.stack([LOGITS[kind](rng, V) for kind in kinds]).astype(np.float32)
    columns = (rng.choice(np.array(values, np.float32), R) for values in (TEMPERATURE, TOP_P, MIN_P))
    temperature, top_p, min_p = map(jnp.asarray, columns)
    rows = RowSampling(
        jnp.asarray(rng.integers(0, 2**32, (R, 2), np.uint32)),
        temperature,
        jnp.asarray(rng.choice(TOP_K, R).astype(np.int32)),
        top_p,
        min_p,
    )
    return jnp.asarray(logits, dtype), jnp.asarray(rng.integers(0, 2**20, R, np.int32)), rows


@cache
def programs(V: int, filters: Filters = ALL, dtype: type = np.float32, lanes: int = 2048):
    """(kernel, reference) compiled for R rows, both f(logits, position, rows)."""

    def kernel(logits, position, rows):
        return choose(logits[:, None], position[:, None], rows, filters, sampler="pallas")[:, 0]

    def reference(logits, position, rows):
        return choose(logits.astype(jnp.float32)[:, None], position[:, None], rows, filters)[:, 0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_pallas, "LANES", lanes)
        # Compiled ahead: jit compiles a kernel behind lax.platform_dependent twice.
        return tuple(jax.jit(f).lower(*draw(V, 0, dtype)).compile() for f in (kernel, reference))


def assert_chooses_the_same(both, call) -> None:
    kernel, reference = both
    tokens = kernel(*call)
    assert tokens.dtype == jnp.int32 and tokens.shape == (R,)
    np.testing.assert_array_equal(tokens, reference(*call))


@pytest.mark.parametrize(
    ("V", "dtype", "lanes"),
    [(1000, np.float32, 2048), (4099, np.float32, 256), (4099, jnp.bfloat16, 1024)],
    ids=["one block", "blocks", "bf16"],
)
def test_chooses_as_the_reference_does(V, dtype, lanes):
    """Vocabularies that fill no whole number of blocks; greedy, filtered and plain rows side by side."""
    both = programs(V, dtype=dtype, lanes=lanes)
    for seed in range(40):
        assert_chooses_the_same(both, draw(V, seed, dtype))


def test_nodes_of_a_tree_have_their_requests_parameters():
    T, (logits, position, rows) = 3, draw(130, 1)
    few = jax.tree.map(lambda x: x[: R // T], rows)
    logits, position = logits[: R // T * T].reshape(-1, T, 130), position[: R // T * T].reshape(-1, T)
    kernel, reference = (
        jax.jit(partial(choose, filters=ALL, sampler=name))(logits, position, few) for name in ("pallas", "xla")
    )
    assert len(set(few.temperature_B.tolist())) > 1
    np.testing.assert_array_equal(kernel, reference)


@pytest.mark.parametrize(
    "filters",
    [Filters(), Filters(sample=True), *(Filters(sample=True, **{name: True}) for name in ("top_k", "top_p", "min_p"))],
    ids=["greedy", "plain", "top_k", "top_p", "min_p"],
)
def test_filters_left_out_of_the_program(filters):
    both = programs(130, filters, lanes=64)
    for seed in range(20):
        assert_chooses_the_same(both, draw(130, seed))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(LOGITS)),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(2**-10, 2**10, width=32),
    top_k=st.integers(0, 1100),
    top_p=st.floats(2**-20, 1, width=32),
    min_p=st.floats(0, 1, width=32, allow_subnormal=False),
)
def test_any_parameters(kind, seed, temperature, top_k, top_p, min_p):
    """Half the rows use all filters at once, the others top-p alone, where sums of weights decide."""
    rng = np.random.default_rng(seed)
    _, position, rows = draw(1000, seed)
    logits = jnp.asarray(np.stack([LOGITS[kind](rng, 1000) for _ in range(R)]), jnp.float32)
    alone = jnp.arange(R) % 2 == 0
    rows = RowSampling(
        rows.seed_B2,
        jnp.full((R,), temperature, jnp.float32),
        jnp.where(alone, 0, top_k),
        jnp.full((R,), top_p, jnp.float32),
        jnp.where(alone, 0, min_p).astype(jnp.float32),
    )
    assert_chooses_the_same(programs(1000), (logits, position, rows))


def test_the_first_nan_is_chosen():
    kernel, _ = programs(1000)
    logits, position, rows = draw(1000, 1)
    at = np.random.default_rng(0).integers(0, 900, R)
    for nan in (np.nan, -np.nan):
        broken = np.asarray(logits).copy()
        broken[:, -5:] = nan
        broken[np.arange(R), at] = nan
        np.testing.assert_array_equal(kernel(broken, position, rows), at)


def test_reach_covers_the_noise():
    """The kernel forgets tokens REACH below the best: the rarest noise must not lift them above the commonest."""
    bits = jnp.array([0, 2**32 - 1], jnp.uint32)
    highest, lowest = gumbel_of_bits(bits)
    assert highest - lowest < choose_pallas.REACH
    assert np.exp(-choose_pallas.REACH) * 2.0**31 < 0.5
    tokens = jnp.arange(5000)
    key = jnp.array([[123, 2**32 - 5]], jnp.uint32)
    ours = jax.jit(lambda t: gumbel_of_bits(threefry(*key[0], jnp.int32(77), t)))(tokens)
    np.testing.assert_array_equal(ours, jax.jit(partial(gumbel, key, jnp.array([[77]])))(tokens)[0, 0])


def test_nodes_of_a_tree_are_chosen_with_their_rows_parameters():
    draws = [draw(130, seed) for seed in range(3)]
    logits_BTV, position_BT = (jnp.stack([d[i] for d in draws], axis=1) for i in (0, 1))
    rows = draws[0][2]
    tokens = [jax.jit(partial(choose, filters=ALL, sampler=name))(logits_BTV, position_BT, rows) for name in SAMPLERS]
    np.testing.assert_array_equal(*tokens)


def test_decoding_with_either_sampler_writes_the_same():
    config = LlamaConfig.tiny(vocab_size=97)
    target = Llama(config, rngs=nnx.Rngs(0))
    head = EagleHead(EagleConfig.for_target(config, "eagle3"), rngs=nnx.Rngs(1))
    every = dict(max_tokens=24, ignore_eos=True, top_k=20, top_p=0.9, min_p=0.05)
    params = [SamplingParams(seed=seed, temperature=temperature, **every) for seed, temperature in ((1, 0), (2, 1.5))]

    def write(name: str) -> list[list[int]]:
        llm = LLM(target, head, tree="chain-2", sampler=name)
        return [out.outputs[0].token_ids for out in llm.generate([[5, 6], [7]], params)]

    assert write("pallas") == write("xla")


def test_names_are_resolved_and_never_replaced():
    assert resolve_sampler("auto") == "xla" and list(map(resolve_sampler, SAMPLERS)) == list(SAMPLERS)
    assert resolve_sampler("auto", platform="gpu") == "pallas"
    assert resolve_sampler("auto", whole=False, platform="gpu") == "xla"
    with pytest.raises(ValueError, match=r"sampler 'triton' is unknown; choose one of \['auto', 'xla', 'pallas'\]"):
        resolve_sampler("triton")
