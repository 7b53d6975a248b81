"""Prompts into caches, a chunk of positions at a time.

All of a prompt but its last token is committed; that one is the root of the first round. So the first token comes out
of the same program as every other, and a prompt of one token needs no prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jeagle.cache import KVCache, Prefix, after, commit
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

__all__ = ["Caches", "prefill_chunk"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Caches:
    """What prefill fills. Nothing of the request but its pages, so one program serves every plan and every sampling."""

    target: KVCache
    head: KVCache | None  # None for plain decoding
    feature_BX: jax.Array | None  # the target's feature of the last committed position
    page_table_BM: jax.Array


def prefill_chunk(
    target: Llama,
    head: EagleHead | None,
    caches: Caches,
    token_BT1: jax.Array,
    first: jax.Array,
    offset: jax.Array,
    prompt_B: jax.Array,
    *,
    attention: str,
) -> Caches:
    """Positions [offset, offset + T) of B prompts; those that have ended keep nothing.

    caches: of B rows or more; first: which of them is the first prompt's, int32. token_BT1: T + 1 ids from ``offset``
    on, as the head reads the token after each position. prompt_B: prompt lengths.
    """
    B, T = token_BT1.shape[0], token_BT1.shape[1] - 1
    some = len(caches.page_table_BM) > B  # else no slice: rows on several devices would be gathered for it

    def own(rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(rows, first, B) if some else rows

    for model in (target, head):
        if model is not None:
            model.check_chunk(T)
    wanted_B = prompt_B - 1  # the prompt's last token stays out: it is the root of the first round
    prefix = Prefix.full(own(caches.page_table_BM), jnp.minimum(wanted_B, offset))
    position_BT = jnp.broadcast_to(offset + jnp.arange(T, dtype=jnp.int32), (B, T))
    causal = jnp.tril(jnp.ones((1, T, T), bool))
    forward = target(
        token_BT1[:, :-1],
        position_BT,
        causal,
        caches.target,
        prefix,
        taps=() if head is None else head.config.taps,
        attention=attention,
    )
    head_cache, feature_BX = caches.head, caches.feature_BX
    if head is not None and head_cache is not None and feature_BX is not None:
        feature_BTD = head.fuse(forward.feature_BTX)
        ran = head(
            token_BT1[:, 1:], feature_BTD, position_BT, causal, head_cache, prefix, target=target, attention=attention
        )
        # The last pair (feature of the last committed position, root) stays pending: the first round extends it.
        last_B = wanted_B - 1 - offset
        head_cache = commit(head_cache, after(ran.new_kv, ran.hidden_BTD), prefix, jnp.clip(last_B, 0, T))
        here_B = (last_B >= 0) & (last_B < T)
        index_B11 = jnp.clip(last_B, 0, T - 1)[:, None, None]
        last_BX = jnp.take_along_axis(forward.feature_BTX, index_B11, axis=1)[:, 0]
        own_BX = jnp.where(here_B[:, None], last_BX, own(feature_BX))
        feature_BX = jax.lax.dynamic_update_slice_in_dim(feature_BX, own_BX, first, 0) if some else own_BX
    cache = commit(caches.target, after(forward.new_kv, forward.hidden_BTD), prefix, jnp.clip(wanted_B - offset, 0, T))
    return Caches(cache, head_cache, feature_BX, caches.page_table_BM)
