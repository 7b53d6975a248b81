"""The paged key/value cache, and ``commit``, its only writer.

One pair of arrays per layer, ``[K, num_pages, page_size, H]``: per-layer arrays are what XLA updates in place (a
stacked array would be copied), kv heads lead so that a mesh can split them and a kernel reads one head's page
contiguously. A row's positions ``[i * page_size, (i+1) * page_size)`` live in page ``page_table[row, i]``. Forwards
only read; after verification ``commit`` copies the accepted rows and nothing else, so rejected tokens leave no trace.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jeagle.config import BlockConfig

__all__ = ["KVCache", "NewKV", "Prefix", "after", "commit"]

NewKV = tuple[jax.Array, jax.Array]  # one layer's (k_BTKH, v_BTKH) of T new positions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """keys[i], values[i]: layer i's pages, [K, num_pages, page_size, H]."""

    keys: list[jax.Array]
    values: list[jax.Array]

    @classmethod
    def create(cls, config: BlockConfig, *, num_pages: int, page_size: int, dtype: jnp.dtype) -> KVCache:
        # Zeros, not empty: a masked key contributes weight 0, and 0 * garbage may be NaN.
        shape = (config.num_kv_heads, num_pages, page_size, config.head_dim)
        layers = range(config.num_layers)
        return cls([jnp.zeros(shape, dtype) for _ in layers], [jnp.zeros(shape, dtype) for _ in layers])

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        return self.keys[index], self.values[index]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """The committed positions [start, length) each row sees, and the pages they live in."""

    page_table_BM: jax.Array  # int32
    start_B: jax.Array  # int32: 0, except under sliding windows and chunked layers
    length_B: jax.Array  # int32

    @classmethod
    def full(cls, page_table_BM: jax.Array, length_B: jax.Array) -> Prefix:
        return cls(page_table_BM, jnp.zeros_like(length_B), length_B)

    def with_length(self, length_B: jax.Array) -> Prefix:
        return dataclasses.replace(self, length_B=length_B)


def after(new_kv: list[NewKV], last_read: jax.Array) -> list[NewKV]:
    """``new_kv``, but not before ``last_read`` is computed.

    A layer's new keys do not depend on reading its cache. Unless something orders the write after the read, XLA may
    keep
    both versions alive: a copy of the whole cache. Needed wherever what is committed was not chosen from logits.
    """
    return jax.lax.optimization_barrier((new_kv, last_read))[0]


def commit(
    cache: KVCache, new_kv: list[NewKV], prefix: Prefix, count_B: jax.Array, path_BP: jax.Array | None = None
) -> KVCache:
    """Append rows to each request's cache at positions ``length .. length + count``.

    Args:
      new_kv: per layer (k_BTKH, v_BTKH).
      count_B: how many rows to keep; 0 keeps none.
      path_BP: which of the T positions go to length+0, length+1, ...; None takes them in order (P = T).

    Example: length 5, path [0, 2, 4, 0], count 3 -> positions 5, 6, 7 receive nodes 0, 2, 4; the last 0 is padding.
    """
    page_size = cache.keys[0].shape[2]
    num_pages = cache.keys[0].shape[1]
    P = new_kv[0][0].shape[1] if path_BP is None else path_BP.shape[1]
    offset_P = jnp.arange(P, dtype=jnp.int32)
    position_BP = prefix.length_B[:, None] + offset_P
    page_BP = jnp.take_along_axis(prefix.page_table_BM, position_BP // page_size, axis=1, mode="clip")
    # Rows past `count` aim at a page that does not exist, and mode="drop" lets them fall.
    page_BP = jnp.where(offset_P < count_B[:, None], page_BP, num_pages)
    slot_BP = position_BP % page_size

    def write(pages: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        if path_BP is not None:
            new_BTKH = jnp.take_along_axis(new_BTKH, path_BP[:, :, None, None], axis=1)
        return pages.at[:, page_BP, slot_BP].set(jnp.moveaxis(new_BTKH, 2, 0).astype(pages.dtype), mode="drop")

    return KVCache(
        [write(pages, k) for pages, (k, _) in zip(cache.keys, new_kv, strict=True)],
        [write(pages, v) for pages, (_, v) in zip(cache.values, new_kv, strict=True)],
    )
