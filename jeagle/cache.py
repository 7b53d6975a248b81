"""The paged key/value cache, and ``commit``, its only writer: ``insert`` moves what was committed elsewhere.

One pair of arrays per layer, ``[K, num_pages, page_size, H]``: per-layer arrays are what XLA updates in place (a
stacked array would be copied), kv heads lead so that a mesh can split them and a kernel reads one head's page
contiguously. A row's positions ``[i * page_size, (i+1) * page_size)`` live in page ``page_table[row, i]``. Forwards
only read; after verification ``commit`` copies the accepted rows and nothing else, so rejected tokens leave no trace.

FP8 pages (``fp8.py``) come with a scale per position and kv head, and are kept as bytes, uint8: XLA:CPU has no gather
and no scatter of 8-bit floats, and would convert the whole cache to float16 and back for each. ``attend`` rounds what
is not in the cache yet just as ``commit`` will.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jeagle.config import BlockConfig
from jeagle.fp8 import FP8, quantize
from jeagle.sharding import across, rows_first, split

__all__ = ["KVCache", "LayerPages", "NewKV", "Prefix", "Scales", "after", "commit", "insert"]

NewKV = tuple[jax.Array, jax.Array]  # one layer's (k_BTKH, v_BTKH) of T new positions
Scales = tuple[jax.Array, jax.Array]  # one layer's, of keys and of values: float32 [K, num_pages, page_size]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """What attention reads of one layer."""

    keys: jax.Array  # [K, num_pages, page_size, H]
    values: jax.Array
    scales: Scales | None  # of FP8 pages
    kv_axis: str = field(metadata=dict(static=True))  # logical axis of K


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """keys[i], values[i]: layer i's pages, [K, num_pages, page_size, H], uint8 where FP8; scales[i]: those of FP8."""

    keys: list[jax.Array]
    values: list[jax.Array]
    scales: list[Scales] | None = None  # None for pages of other dtypes
    kv_axis: str = field(default="kv_heads", metadata=dict(static=True))  # logical axis of K

    @classmethod
    def create(cls, config: BlockConfig, *, num_pages: int, page_size: int, dtype: jnp.dtype) -> KVCache:
        """dtype: what the pages hold; those of ``FP8`` are its bytes, uint8, and get scales."""
        # Zeros, not empty: a masked key contributes weight 0, and 0 * garbage may be NaN.
        shape = (config.num_kv_heads, num_pages, page_size, config.head_dim)
        layers = range(config.num_layers)
        eight_bit = jnp.dtype(dtype) == FP8
        keys, values = ([jnp.zeros(shape, jnp.uint8 if eight_bit else dtype) for _ in layers] for _ in "kv")
        if not eight_bit:
            return cls(keys, values, kv_axis=config.kv_axis)
        k_scales, v_scales = ([jnp.zeros(shape[:-1], jnp.float32) for _ in layers] for _ in "kv")
        return cls(keys, values, list(zip(k_scales, v_scales, strict=True)), config.kv_axis)

    def layer(self, index: int) -> LayerPages:
        scales = None if self.scales is None else self.scales[index]
        return LayerPages(self.keys[index], self.values[index], scales, self.kv_axis)

    def axes(self, pages: str | None = "pages") -> KVCache:
        """The logical axes of every array, in the cache's own structure. pages: None for pages that every device has
        whose heads they are of."""
        axes = (self.kv_axis, pages, None, None)
        return jax.tree.map(lambda x: axes[: x.ndim], self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """The committed positions [start, length) each row sees, and the pages they live in."""

    page_table_BM: jax.Array  # int32; numbers of the pages that the row's device has
    start_B: jax.Array  # int32: 0, except in chunked layers and for a head that began to draft in mid-text
    length_B: jax.Array  # int32

    @classmethod
    def full(cls, page_table_BM: jax.Array, length_B: jax.Array) -> Prefix:
        return cls(page_table_BM, jnp.zeros_like(length_B), length_B)

    def axes(self) -> Prefix:
        return jax.tree.map(rows_first, self)

    def with_length(self, length_B: jax.Array) -> Prefix:
        return dataclasses.replace(self, length_B=length_B)


def after(new_kv: list[NewKV], last_read: jax.Array) -> list[NewKV]:
    """``new_kv``, but not before ``last_read`` is computed.

    A layer's new keys do not depend on reading its cache. Unless something orders the write after the read, XLA may
    keep both versions alive: a copy of the whole cache. Needed wherever what is committed was not chosen from logits.
    """
    return jax.lax.optimization_barrier((new_kv, last_read))[0]


def commit(
    cache: KVCache, new_kv: list[NewKV], prefix: Prefix, count_B: jax.Array, path_BP: jax.Array | None = None
) -> KVCache:
    """Append rows to each request's cache at positions ``length .. length + count``.

    Args:
      new_kv: per layer (k_BTKH, v_BTKH), float whatever the pages are.
      count_B: how many rows to keep; 0 keeps none.
      path_BP: which of the T positions go to length+0, length+1, ...; None takes them in order (P = T).

    Example: length 5, path [0, 2, 4, 0], count 3 -> positions 5, 6, 7 receive nodes 0, 2, 4; the last 0 is padding.
    """
    new = jax.tree.map(lambda _: ("rows", None, cache.kv_axis, None), new_kv)
    inputs = (cache.axes(), new, prefix.axes(), ("rows",), None if path_BP is None else ("rows", None))
    return split(_commit, inputs, cache.axes())(cache, new_kv, prefix, count_B, path_BP)


def _commit(
    cache: KVCache, new_kv: list[NewKV], prefix: Prefix, count_B: jax.Array, path_BP: jax.Array | None
) -> KVCache:
    """``commit`` for the kv heads and rows of one device. Page tables name pages of the device's own."""
    page_size = cache.keys[0].shape[2]
    num_pages = cache.keys[0].shape[1]
    P = new_kv[0][0].shape[1] if path_BP is None else path_BP.shape[1]
    offset_P = jnp.arange(P, dtype=jnp.int32)
    position_BP = prefix.length_B[:, None] + offset_P
    page_BP = jnp.take_along_axis(prefix.page_table_BM, position_BP // page_size, axis=1, mode="clip")
    # Rows past `count` aim at a page that does not exist, and mode="drop" lets them fall.
    page_BP = jnp.where(offset_P < count_B[:, None], page_BP, num_pages)
    slot_BP = position_BP % page_size

    def rows(new_BTKH: jax.Array) -> jax.Array:
        """The path's, [K, B, P, H]."""
        if path_BP is not None:
            new_BTKH = jnp.take_along_axis(new_BTKH, path_BP[:, :, None, None], axis=1)
        return jnp.moveaxis(new_BTKH, 2, 0)

    def write(pages: jax.Array, new: jax.Array) -> jax.Array:
        """``new`` [K, B, P, ...] into its slots of [K, num_pages, page_size, ...]."""
        return pages.at[:, page_BP, slot_BP].set(new.astype(pages.dtype), mode="drop")

    if cache.scales is None:
        return dataclasses.replace(
            cache,
            keys=[write(pages, rows(k)) for pages, (k, _) in zip(cache.keys, new_kv, strict=True)],
            values=[write(pages, rows(v)) for pages, (_, v) in zip(cache.values, new_kv, strict=True)],
        )

    def stored(new_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        number, scale = quantize(rows(new_BTKH))
        return jax.lax.bitcast_convert_type(number, jnp.uint8), scale

    of_keys, of_values = ([stored(x) for x in each] for each in zip(*new_kv))
    return dataclasses.replace(
        cache,
        keys=[write(pages, k) for pages, (k, _) in zip(cache.keys, of_keys, strict=True)],
        values=[write(pages, v) for pages, (v, _) in zip(cache.values, of_values, strict=True)],
        scales=[
            (write(k_scales, k), write(v_scales, v))
            for (k_scales, v_scales), (_, k), (_, v) in zip(cache.scales, of_keys, of_values, strict=True)
        ],
    )


def insert(cache: KVCache, rows: KVCache, place_R: jax.Array, *, num_rows: int) -> KVCache:
    """Whole rows of another cache, in place of this one's.

    Args:
      cache: of B = ``num_rows`` rows of M pages, those of each in order, as ``Decoder.empty_caches`` lays them.
      rows: R rows of m <= M pages, likewise; on every device that has the heads.
      place_R: int32, which of ``cache``'s rows each becomes; where there is no such row it falls.

    Example: B = 4 rows of M = 8 pages, R = 2 of m = 3, places [3, 4] -> pages 24, 25, 26 receive row 0.
    """
    M, R, of_rows = cache.keys[0].shape[1] // num_rows, len(place_R), across("rows")

    def of_shard(cache: KVCache, rows: KVCache, place_R: jax.Array) -> KVCache:
        B = cache.keys[0].shape[1] // M
        own_R = place_R - of_rows.index() * B
        own_R = jnp.where((own_R >= 0) & (own_R < B), own_R, B)  # negative ones would count from the end

        def write(pages: jax.Array, new: jax.Array) -> jax.Array:
            K, *rest = pages.shape[0], *pages.shape[2:]
            new = new.reshape(K, R, -1, *rest)
            of_rows = pages.reshape(K, B, M, *rest).at[:, own_R, : new.shape[2]].set(new, mode="drop")
            return of_rows.reshape(pages.shape)

        return jax.tree.map(write, cache, rows)

    return split(of_shard, (cache.axes(), rows.axes(pages=None), (None,)), cache.axes())(cache, rows, place_R)
