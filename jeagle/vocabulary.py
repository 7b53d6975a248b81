"""Lookups in, and reductions over, a vocabulary that may be split over devices.

``x`` is one shard's part [..., V/n] of scores, in the order of ids; ``across`` joins the shards (``sharding.Across``;
one device is one shard). What travels is a number or a few candidates per position, never the scores.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jeagle.sharding import Across, across, split
from jeagle.weights import Matrix

__all__ = ["argmax", "embed", "ids", "log_softmax", "lookup", "top_k"]


def embed(table: Matrix, token_BT: jax.Array, axis: str, dtype: Any) -> jax.Array:
    """Rows of a table [V, D] whose first axis is the logical ``axis``, [B, T, D]: the shard that has a token's row
    gives it. FP8 rows are multiplied by their scales and rounded to ``dtype``.

    By hand, as XLA's partitioner gathers the whole table for a lookup on GPUs.
    """
    vocab = across(axis)

    def of_shard(token_BT: jax.Array, table_VD: jax.Array, scale_V: jax.Array | None = None) -> jax.Array:
        def rows(id_BT: jax.Array) -> jax.Array:
            if scale_V is None:
                return table_VD[id_BT]
            return (table_VD[id_BT].astype(jnp.float32) * scale_V[id_BT][..., None]).astype(dtype)

        if vocab.whole:
            return rows(token_BT)
        local_BT = token_BT - vocab.index() * len(table_VD)
        here_BT = (local_BT >= 0) & (local_BT < len(table_VD))
        return vocab.sum(jnp.where(here_BT[..., None], rows(jnp.where(here_BT, local_BT, 0)), 0))

    rows = ("rows", None)
    parts = (table.kernel,) if table.scale is None else table
    axes = ((axis, None), (axis,))[: len(parts)]
    return split(of_shard, (rows, *axes), (*rows, None))(token_BT, *parts)


def ids(x: jax.Array, across: Across) -> jax.Array:
    """The ids of this shard's part, int32 [V/n]."""
    size = x.shape[-1]
    return across.index() * size + jnp.arange(size, dtype=jnp.int32)


def log_softmax(x: jax.Array, across: Across) -> jax.Array:
    """x - log(sum(exp(x))) over the whole vocabulary."""
    if across.whole:
        return jax.nn.log_softmax(x, axis=-1)
    of_shards = across.gather(jax.nn.logsumexp(x, axis=-1, keepdims=True))  # one message; maximum and sum would be two
    return x - jax.nn.logsumexp(of_shards, axis=-1, keepdims=True)


def argmax(x: jax.Array, across: Across) -> jax.Array:
    """The id of the largest, int32 [...]; of several the lowest, and a NaN counts as largest, as in ``jnp.argmax``."""
    best = jax.lax.platform_dependent(x, cpu=_argmax_by_maximum, default=lambda x: jnp.argmax(x, axis=-1))
    best = best.astype(jnp.int32)
    if across.whole:
        return best
    value = jnp.take_along_axis(x, best[..., None], axis=-1)
    # Value and id as one array of integers: one message. Shards are gathered in the order of ids.
    id_bits = (best + across.index() * x.shape[-1])[..., None, None]
    pair = jnp.concatenate([jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)[..., None], id_bits], -2)
    values, all_ids = jnp.split(across.gather(pair), 2, axis=-2)
    winner = jnp.argmax(jax.lax.bitcast_convert_type(values, jnp.float32), axis=-1, keepdims=True)
    return jnp.take_along_axis(all_ids, winner, axis=-1)[..., 0, 0]


def _argmax_by_maximum(x: jax.Array) -> jax.Array:
    """The same in two reductions, which XLA:CPU makes of vectors; a pair of value and index it reduces one by one, in
    five to eight times as long."""
    index_V = jnp.arange(x.shape[-1], dtype=jnp.int32)
    best = (x == jnp.max(x, axis=-1, keepdims=True)) | (x != x)
    return jnp.min(jnp.where(best, index_V, jnp.iinfo(jnp.int32).max), axis=-1)


def top_k(x: jax.Array, k: int, id_V: jax.Array, across: Across) -> tuple[jax.Array, jax.Array]:
    """The k largest, best first, and what ``id_V`` [V/n] calls them. Of equals the one that comes first in order."""
    value, index = jax.lax.top_k(x, min(k, x.shape[-1]))
    found = id_V[index]
    if across.whole:
        return value, found
    value, index = jax.lax.top_k(across.gather(value), k)
    return value, jnp.take_along_axis(across.gather(found), index, axis=-1)


def lookup(x: jax.Array, id: jax.Array, across: Across) -> jax.Array:
    """x at one id per position: id int32 [...], whichever shard it belongs to."""
    here = ids(x, across) == id[..., None]
    return across.sum(jnp.sum(jnp.where(here, x, 0), axis=-1))
