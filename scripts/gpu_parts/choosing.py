"""Part 2b: seconds of choosing tokens, one, a tree's 64 and a large batch's 1,024, over Llama 3's vocabulary, for every
sampler.

Logits are normal numbers times 3, about as peaked as a model's. ``bytes`` is what must move: the logits, once. A pass
of the timed loop waits for the one before it (a barrier: nothing can be hoisted), and the logits of 64 nodes fit the
second-level cache, as they do in decoding, where the LM head has just written them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gpu_parts.check import FILTERS
from gpu_parts.rows import Rows, Settings
from gpu_parts.timing import best_seconds, copy_bandwidth
from jeagle.sampling import SAMPLERS, Filters, RowSampling, SamplingParams, choose, seed_keys


def choose_seconds(sampler: str, params: SamplingParams, T: int, V: int, passes: int) -> dict[str, Any]:
    logits_BTV = 3 * jax.random.normal(jax.random.key(0), (1, T, V), jnp.float32)
    position_BT = jnp.arange(T, dtype=jnp.int32)[None]
    rows, filters = RowSampling.stack([params], seed_keys(1, 1)), Filters.needed([params])

    @jax.jit
    def run(logits_BTV: jax.Array, position_BT: jax.Array) -> jax.Array:
        def one_pass(_, chosen_BT: jax.Array) -> jax.Array:
            logits, position, _ = jax.lax.optimization_barrier((logits_BTV, position_BT, chosen_BT))
            return choose(logits, position, rows, filters, sampler=sampler)

        return jax.lax.fori_loop(0, passes, one_pass, position_BT)

    return dict(seconds=best_seconds(lambda: run(logits_BTV, position_BT)) / passes, bytes=logits_BTV.nbytes)


def measure(rows: Rows, settings: Settings) -> None:
    rows.measure(lambda: copy_bandwidth(tiny=settings.tiny), what="copy bandwidth")
    nodes, V, passes = ((1, 4), 97, 2) if settings.tiny else ((1, 64, 1024), 128_256, 50)
    for T in nodes:
        for case, params in FILTERS.items():
            for name in SAMPLERS:
                time_it = partial(choose_seconds, name, params, T, V, passes)
                rows.measure(time_it, implementation=name, case=case, T=T)
