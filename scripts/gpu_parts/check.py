"""Part 1: every implementation of every operation, on this device, against float64 in numpy and against XLA.

``OPERATIONS`` is the list: an operation is a function that yields rows to measure. An implementation that the device or
a shape does not suit says so (NotImplementedError); every other error, and every figure above its tolerance, fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_parts.rows import Rows, Settings
from gpu_parts.timing import require_memory
from jeagle.attention import IMPLEMENTATIONS
from jeagle.sampling import SAMPLERS, Filters, RowSampling, SamplingParams, choose, gumbel, seed_keys

# ||found - expected|| / ||expected||. In float32 a GPU may multiply in TF32, whose products are good to 5e-4.
TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-2}
LSE_TOLERANCE = {"float32": 5e-3, "bfloat16": 2e-2}  # absolute


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    K: int
    G: int
    H: int
    page_size: int = 64
    M: int = 16
    dtype: str = "bfloat16"
    eight_bit: bool = False
    pages_before: int = 0  # pages of NaN before the first that is used: offsets beyond 32 bits

    @property
    def pool(self) -> tuple[int, int, int]:
        return self.K, self.pages_before + self.B * self.M, self.page_size


EIGHT_B: dict[str, Any] = dict(B=3, K=8, G=4, H=128)
SHAPES = {
    **{f"8B, T = {T}": Shape(T=T, **EIGHT_B) for T in (1, 4, 16, 32, 64)},
    "8B, a prompt's chunk": Shape(T=256, **EIGHT_B),
    "8B, float32": Shape(T=7, dtype="float32", **EIGHT_B),
    "8B, float8 pages": Shape(T=16, eight_bit=True, **EIGHT_B),
    "1B, T = 32": Shape(B=3, T=32, K=8, G=4, H=64),
    "SmolLM2, float32": Shape(B=3, T=7, K=3, G=3, H=64, dtype="float32"),
    "70B on 8 devices": Shape(B=3, T=16, K=1, G=8, H=128),
    "page size 16": Shape(B=3, T=4, K=8, G=4, H=128, page_size=16, M=40),
    "beyond 4 GB of pages": Shape(B=1, T=4, K=8, G=4, H=128, pages_before=40_000),
    "beyond 2 GB of float8 pages": Shape(B=1, T=4, K=8, G=4, H=128, pages_before=40_000, eight_bit=True),
}
TINY_SHAPES = {
    "float32": Shape(B=2, T=5, K=2, G=3, H=16, page_size=16, M=3, dtype="float32"),
    "float8 pages": Shape(B=2, T=5, K=2, G=3, H=16, page_size=16, M=3, eight_bit=True, pages_before=2),
}


@dataclass
class Call:
    """A call's arguments, and what it should give, float64."""

    arguments: tuple
    out: np.ndarray
    lse: np.ndarray


def draw(shape: Shape, seed: int = 0) -> Call:
    """Random numbers, a random tree, ragged lengths (none, all and between), and NaN wherever no row may look."""
    rng = np.random.default_rng(seed)
    B, T, K, G, H, M, page_size = shape.B, shape.T, shape.K, shape.G, shape.H, shape.M, shape.page_size
    dtype = jnp.dtype(shape.dtype)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32).astype(dtype)

    q, k, v = normal(B, T, K, G, H), normal(B, T, K, H), normal(B, T, K, H)
    parent = [0, *(int(rng.integers(0, t)) for t in range(1, T))]
    mask = np.eye(T, dtype=bool)
    for t in range(1, T):
        mask[t] |= mask[parent[t]]
    length = rng.integers(1, M * page_size, B)
    length[0], length[-1] = M * page_size, 0 if B > 1 else M * page_size - 1
    start = np.where(np.arange(B) == 1, length // 3, 0)
    table = rng.permutation(B * M).reshape(B, M)
    stored = jnp.dtype(jnp.float8_e4m3fn) if shape.eight_bit else dtype
    pages = [rng.standard_normal((K, B * M, page_size, H), np.float32).astype(stored) for _ in range(2)]
    scales = [rng.uniform(0.5, 2, (K, B * M, page_size)).astype(np.float32) for _ in range(2)]
    seen = np.zeros((B * M, page_size), bool)
    for row in range(B):
        position = np.arange(start[row], length[row])
        seen[table[row, position // page_size], position % page_size] = True

    out, lse = np.zeros((B, T, K, G, H)), np.full((B, T, K, G), -np.inf)
    for row in range(B):
        position = np.arange(start[row], length[row])
        at = table[row, position // page_size], position % page_size
        visible = np.concatenate([np.ones((T, len(position)), bool), mask], axis=1)
        for head in range(K):
            cached = [p[head][at].astype(np.float64) for p in pages]
            if shape.eight_bit:
                cached = [x * s[head][at][:, None] for x, s in zip(cached, scales, strict=True)]
            keys, values = (np.concatenate([c, x[row, :, head]]) for c, x in zip(cached, (k, v), strict=True))
            score = q[row, :, head].astype(np.float64) @ keys.astype(np.float64).T / np.sqrt(H)
            score = np.where(visible[:, None, :], score, -np.inf)
            highest = score.max(axis=-1, keepdims=True)
            weight = np.exp(score - highest)
            total = weight.sum(axis=-1, keepdims=True)
            out[row, :, head] = weight @ values.astype(np.float64) / total
            lse[row, :, head] = (highest + np.log(total))[..., 0]

    def on_device(used: np.ndarray) -> jax.Array:
        hidden = ~seen if used.ndim == 3 else ~seen[..., None]
        used = np.where(hidden, np.array(np.nan, used.dtype), used)
        pool = jnp.full((*shape.pool, *used.shape[3:]), jnp.nan, used.dtype)
        pool = pool.at[:, shape.pages_before :].set(used)
        return jax.lax.bitcast_convert_type(pool, jnp.uint8) if used.dtype.itemsize == 1 else pool  # as caches are

    given = [*map(on_device, pages), table + shape.pages_before, start, length]
    arguments = [
        jnp.asarray(x, jnp.int32) if x.dtype == np.int64 else jnp.asarray(x) for x in (q, k, v, mask[None], *given)
    ]
    return Call((*arguments, tuple(map(on_device, scales)) if shape.eight_bit else None), out, lse)


def attention(rows: Rows, settings: Settings) -> None:
    for case, shape in (TINY_SHAPES if settings.tiny else SHAPES).items():
        call = cache(partial(draw, shape))
        expected_by_xla = cache(lambda call=call: jax.jit(IMPLEMENTATIONS["xla"])(*call().arguments))
        for name in IMPLEMENTATIONS:

            def compare(name=name, shape=shape, call=call, by_xla=expected_by_xla) -> dict[str, Any]:
                if shape.pages_before > 2:
                    itemsize = 1 if shape.eight_bit else 2
                    require_memory(4 * int(np.prod(shape.pool)) * shape.H * itemsize)  # pages are set into a copy
                out, lse = jax.jit(IMPLEMENTATIONS[name])(*call().arguments)
                found = dict(
                    error=distance(out, call().out),
                    lse_error=float(np.max(np.abs(np.asarray(lse, np.float64) - call().lse))),
                    error_to_xla=distance(out, np.asarray(by_xla()[0], np.float64)),
                    tolerance=TOLERANCE[shape.dtype],
                )
                ok = found["error"] <= found["tolerance"] and found["lse_error"] <= LSE_TOLERANCE[shape.dtype]
                return found | dict(ok=bool(ok and found["error_to_xla"] <= 2 * found["tolerance"]))

            rows.measure(compare, operation="attention", implementation=name, case=case)


def distance(found: jax.Array, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||: not a number where one is not."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


FILTERS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "all filters": SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.02),
}


def sampling(rows: Rows, settings: Settings) -> None:
    """Chosen tokens against the highest score in float64, from the same noise. A choice is wrong where its own score is
    more than 1e-3 below the highest, or filtered out."""
    B, T, V = (1, 2, 97) if settings.tiny else (2, 32, 128_256)
    logits_BTV = 3 * np.random.default_rng(0).standard_normal((B, T, V), np.float32)
    position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    for case, params in FILTERS.items():
        row_sampling = RowSampling.stack([params] * B, seed_keys(1, B))
        filters = Filters.needed([params])
        for name in SAMPLERS:

            def compare(params=params, row_sampling=row_sampling, filters=filters, name=name):
                compute = jax.jit(partial(choose, sampler=name), static_argnums=3)
                chosen_BT = np.asarray(compute(logits_BTV, position_BT, row_sampling, filters))
                score_BTV = reference_warp(logits_BTV.astype(np.float64), params)
                if params.temperature:
                    noise_BTV = jax.jit(gumbel)(row_sampling.seed_B2, jnp.asarray(position_BT), jnp.arange(V))
                    score_BTV = score_BTV + np.asarray(noise_BTV, np.float64)
                own_BT = np.take_along_axis(score_BTV, chosen_BT[..., None], axis=-1)[..., 0]
                wrong = int((own_BT < score_BTV.max(axis=-1) - 1e-3).sum())
                return dict(wrong=wrong, choices=B * T, ok=wrong == 0)

            rows.measure(compare, operation="choose", implementation=name, case=case)


def reference_warp(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p and min-p by sorting, in float64."""
    if not params.temperature:
        return x
    x = x / params.temperature
    if params.top_k:
        x = np.where(x >= np.sort(x)[..., -params.top_k, None], x, -np.inf)
    if params.top_p < 1:
        p = np.exp(x - x.max(axis=-1, keepdims=True))
        descending = np.sort(p / p.sum(axis=-1, keepdims=True))[..., ::-1]
        kept = np.sum(np.cumsum(descending, axis=-1) < params.top_p, axis=-1, keepdims=True)
        least = np.take_along_axis(descending, kept, axis=-1)
        x = np.where(p / p.sum(axis=-1, keepdims=True) >= least, x, -np.inf)
    if params.min_p:
        x = np.where(x >= x.max(axis=-1, keepdims=True) + np.log(params.min_p), x, -np.inf)
    return x


OPERATIONS: tuple[Callable[[Rows, Settings], None], ...] = (attention, sampling)


def measure(rows: Rows, settings: Settings) -> None:
    for operation in OPERATIONS:
        operation(rows, settings)
