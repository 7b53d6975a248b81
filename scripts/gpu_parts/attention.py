"""Part 2: seconds of one attention call, for every implementation, cuDNN and PyTorch, on an 8B model's heads in bf16.

A timed program calls attention many times, each call's answer being the next one's queries: nothing can be hoisted, and
the chain costs no kernel of its own. Calls take turns over enough copies of the cache that the second-level cache
serves none. ``bytes`` is what must move: the visible cache, q, k, v and out, once; its share of bandwidth is over the
copy bandwidth measured in the same process. cuDNN and PyTorch read contiguous caches without a mask: less than a tree
needs. Capacity equals length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_parts.rows import Rows, Settings, Skip
from gpu_parts.timing import best_seconds, copy_bandwidth, filled, require_memory
from jeagle.attention import IMPLEMENTATIONS

LENGTHS, NODES, BATCHES = (1024, 8192, 32_768, 131_072), (1, 4, 16, 32, 64), (1, 8, 64)
CHUNK = 512  # positions of a prompt: bound by arithmetic, so its share of bandwidth is low
SECOND_LEVEL_CACHE = 50e6  # bytes, an H100's
NOMINAL = 3e12  # bytes per second, for choosing repetitions only
PAGE_SIZE = 64


@dataclass(frozen=True)
class Problem:
    B: int
    T: int
    length: int
    K: int = 8
    G: int = 4
    H: int = 128

    @property
    def cache_bytes(self) -> int:
        return 2 * 2 * self.B * self.length * self.K * self.H

    @property
    def bytes(self) -> int:
        """Read and written at least: cache, new keys and values, queries, answers."""
        return self.cache_bytes + 2 * self.B * self.T * self.K * self.H * (2 + 2 * self.G)

    def copies(self, tiny: bool) -> int:
        return 2 if tiny else math.ceil(2.5 * SECOND_LEVEL_CACHE / self.cache_bytes)

    def calls(self, tiny: bool) -> tuple[int, int]:
        """(calls written out in the loop's body, passes of the loop): about 1 and 10 ms at full bandwidth."""
        floor = self.bytes / NOMINAL
        body = max(self.copies(tiny), min(8, round(1e-3 / floor)))
        return body, 1 if tiny else max(1, round(1e-2 / floor / body))


def problems(settings: Settings) -> list[Problem]:
    if settings.tiny:
        return [Problem(1, T, 128, K=1, G=2, H=16) for T in (1, 4)]
    chunks = [Problem(1, CHUNK, length) for length in LENGTHS[:-1]]
    return [Problem(B, T, length) for B in BATCHES for length in LENGTHS for T in NODES] + chunks


def chained(attend: Callable[..., jax.Array], caches: list, problem: Problem, tiny: bool) -> Callable:
    """``run(q, operands)``: attend(q, cache, operands) again and again, the caches in turns."""
    body, passes = problem.calls(tiny)
    attend = jax.jit(attend)  # traced and lowered once, called many times

    @jax.jit
    def run(q: jax.Array, caches: list, operands: tuple) -> jax.Array:
        def one_pass(_, q: jax.Array) -> jax.Array:
            for each in islice(cycle(caches), body):
                q = attend(q, each, operands)
            return q

        return jax.lax.fori_loop(0, passes, one_pass, q)

    return run


def ours_seconds(name: str, problem: Problem, tiny: bool) -> float:
    """Paged: a copy of the cache is a page table of its own into one pool."""
    p, copies = problem, problem.copies(tiny)
    require_memory(copies * p.cache_bytes)
    M = p.length // PAGE_SIZE
    pages = tuple(filled((p.K, copies * p.B * M, PAGE_SIZE, p.H), jnp.bfloat16, seed) for seed in (1, 2))
    order = np.random.default_rng(0).permutation(copies * p.B * M).astype(np.int32).reshape(copies, p.B, M)
    new = tuple(filled((p.B, p.T, p.K, p.H), jnp.bfloat16, seed) for seed in (3, 4))
    zero_B = jnp.zeros(p.B, jnp.int32)
    operands = (*new, jnp.tril(jnp.ones((1, p.T, p.T), bool)), *pages), (zero_B, zero_B + p.length)

    def attend(q: jax.Array, table: jax.Array, operands: tuple) -> jax.Array:
        return IMPLEMENTATIONS[name](q, *operands[0], table, *operands[1])[0]

    tables = [jnp.asarray(table) for table in order]
    run = chained(attend, tables, p, tiny)
    q = filled((p.B, p.T, p.K, p.G, p.H), jnp.bfloat16, 5)
    return best_seconds(lambda: run(q, tables, operands)) / math.prod(p.calls(tiny))


def cudnn_seconds(problem: Problem, tiny: bool) -> float:
    """Contiguous: copies are arrays of their own."""
    if jax.default_backend() != "gpu":
        raise Skip("cuDNN needs a GPU")
    p, copies = problem, problem.copies(tiny)
    require_memory(copies * p.cache_bytes)
    shape = (p.B, p.length, p.K, p.H)
    caches = [(filled(shape, jnp.bfloat16, 2 * i), filled(shape, jnp.bfloat16, 2 * i + 1)) for i in range(copies)]

    def attend(q: jax.Array, cache: tuple, _: tuple) -> jax.Array:
        return jax.nn.dot_product_attention(q, *cache, implementation="cudnn")

    run = chained(attend, caches, p, tiny)
    q = filled((p.B, p.T, p.K * p.G, p.H), jnp.bfloat16, 5)
    return best_seconds(lambda: run(q, caches, ())) / math.prod(p.calls(tiny))


def torch_seconds(problem: Problem, tiny: bool) -> float:
    try:
        from gpu_parts.pytorch import sdpa_seconds
    except ImportError as error:
        raise Skip(f"not installed: {error.name or error}") from None
    require_memory(problem.copies(tiny) * problem.cache_bytes)  # JAX holds nothing in this process
    copies, calls = problem.copies(tiny), problem.calls(tiny)[0]
    return sdpa_seconds(**asdict(problem), copies=copies, calls=calls, tiny=tiny)


def measure(rows: Rows, settings: Settings) -> None:
    ours: dict[str, Callable[[Problem, bool], float]]
    if settings.variant == "torch":
        ours = {"torch SDPA": torch_seconds}
    else:
        rows.measure(lambda: copy_bandwidth(tiny=settings.tiny), what="copy bandwidth")
        ours = {name: partial(ours_seconds, name) for name in IMPLEMENTATIONS}
        ours["cuDNN"] = cudnn_seconds
    for problem in problems(settings):
        for name, seconds in ours.items():

            def time_it(problem=problem, seconds=seconds) -> dict[str, Any]:
                return dict(seconds=seconds(problem, settings.tiny), bytes=problem.bytes)

            rows.measure(time_it, implementation=name, B=problem.B, T=problem.T, length=problem.length)
