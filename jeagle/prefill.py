"""Prompts into caches, a chunk of positions at a time.

All of a prompt but its last token is committed; that one is the root of the first round. So the first token comes out
of the same program as every other, and a prompt of one token needs no prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jeagle.cache import KVCache, Prefix, after, commit, insert
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

__all__ = ["Caches", "first_pages", "inserted", "prefill_chunk"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Caches:
    """What prefill fills. Nothing of the request but its pages, so one program serves every plan and every sampling."""

    target: KVCache
    head: KVCache | None  # None for plain decoding
    feature_BX: jax.Array | None  # the target's feature of the last committed position
    page_table_BM: jax.Array

    def whole_axes(self) -> Caches:
        """The logical axes of a few rows that are not split, heads alone."""
        head = None if self.head is None else self.head.axes(pages=None)
        feature = None if self.feature_BX is None else (None, None)
        return Caches(self.target.axes(pages=None), head, feature, (None, None))  # type: ignore[arg-type]


def prefill_chunk(
    target: Llama,
    head: EagleHead | None,
    caches: Caches,
    token_BT1: jax.Array,
    row_B: jax.Array,
    offset: jax.Array,
    prompt_B: jax.Array,
    *,
    attention: str,
) -> Caches:
    """Positions [offset, offset + T) of B prompts; those that have ended keep nothing.

    caches: of B rows or more; row_B: which of them are the prompts', int32, not read where they are all, in order. A
    prompt of one token writes nothing, whatever row it names. token_BT1: T + 1 ids from ``offset`` on, as the head
    reads the token after each position. prompt_B: prompt lengths.
    """
    B, T = token_BT1.shape[0], token_BT1.shape[1] - 1
    some = len(caches.page_table_BM) > B  # else no gather: rows on several devices would be fetched for it

    def own(rows: jax.Array) -> jax.Array:
        return jnp.take(rows, row_B, axis=0, mode="clip") if some else rows

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
        if some:
            feature_BX = feature_BX.at[jnp.where(here_B, row_B, len(feature_BX))].set(last_BX, mode="drop")
        else:
            feature_BX = jnp.where(here_B[:, None], last_BX, feature_BX)
    cache = commit(caches.target, after(forward.new_kv, forward.hidden_BTD), prefix, jnp.clip(wanted_B - offset, 0, T))
    return Caches(cache, head_cache, feature_BX, caches.page_table_BM)


@partial(jax.jit, static_argnames=("num_pages",))
def first_pages(caches: Caches, *, num_pages: int) -> Caches:
    """Of every row the first ``num_pages``: a copy."""
    R, M = caches.page_table_BM.shape

    def cut(pages: jax.Array) -> jax.Array:
        K, *rest = pages.shape[0], *pages.shape[2:]
        return pages.reshape(K, R, M, *rest)[:, :, :num_pages].reshape(K, R * num_pages, *rest)

    head = jax.tree.map(cut, caches.head)
    return Caches(jax.tree.map(cut, caches.target), head, caches.feature_BX, caches.page_table_BM[:, :num_pages])


def inserted(target: Llama, head: EagleHead | None, caches: Caches, rows: Caches, place_R: jax.Array) -> Caches:
    """``caches``, of B rows, with R ``rows`` that other devices have filled in the places that they are given; those
    without one fall. See ``cache.insert``."""
    B = len(caches.page_table_BM)
    here_BR = jnp.arange(B)[:, None] == place_R
    head_cache, feature_BX = caches.head, caches.feature_BX
    if head_cache is not None and rows.head is not None and feature_BX is not None and rows.feature_BX is not None:
        head_cache = insert(head_cache, rows.head, place_R, num_rows=B)
        # Gathered, not scattered: every device has all that is new, and its own rows of what was.
        new_BX = jnp.take(rows.feature_BX, jnp.argmax(here_BR, axis=1), axis=0)
        feature_BX = jnp.where(jnp.any(here_BR, axis=1)[:, None], new_BX, feature_BX)
    return Caches(insert(caches.target, rows.target, place_R, num_rows=B), head_cache, feature_BX, caches.page_table_BM)
