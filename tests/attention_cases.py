"""Tree-attention calls drawn at random, in awkward shapes and on dirty caches, and what a dense softmax makes of them.

All page slots that no row may see hold NaN, so a leak cannot pass unnoticed. Needs no JAX: implementations that run
elsewhere are tested on the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Shape:
    B: int = 3
    T: int = 3
    U: int = 3
    K: int = 2
    G: int = 2
    H: int = 16
    page_size: int = 4
    M: int = 5
    mask_rows: int | None = None  # 1: one mask for all rows
    dtype: type = np.float32
    eight_bit: bool = False  # pages of float8_e4m3fn with scales

    @property
    def capacity(self) -> int:
        return self.M * self.page_size

    @property
    def num_pages(self) -> int:
        return self.B * self.M + 2


SHAPES = {
    "decode": Shape(T=1, U=1, G=1, K=3),
    "one-row": Shape(B=1, T=1, U=1, G=3, page_size=128, M=9),
    "tree": Shape(T=7, U=7, G=3),
    # Rows that the XLA implementation takes in groups, with a mask each and with one for all.
    "groups": Shape(B=16, T=2, U=2, K=1),
    "groups-one-mask": Shape(B=24, T=4, U=4, K=1, M=2, mask_rows=1),
    "wider-suffix": Shape(B=2, T=3, U=9, G=4, K=1, H=32),
    "chunk-one-mask": Shape(T=8, U=8, mask_rows=1, page_size=16, M=1),
    # Capacity above the XLA implementation's block of 512 positions: the last block is not full.
    "blocks": Shape(T=3, U=5, K=1, page_size=128, M=9),
    "page-above-block": Shape(T=2, U=2, K=1, page_size=520, M=2),
    "bf16": Shape(T=7, U=7, dtype=ml_dtypes.bfloat16),
    # More rows than one program of a kernel holds, and more pages than one of its splits.
    "many-rows": Shape(B=2, T=40, U=40, K=1, G=4, page_size=16, M=20),
    "suffix-above-block": Shape(B=1, T=33, U=70, K=2, G=1),
    "fp8": Shape(T=7, U=7, G=3, page_size=16, M=4, eight_bit=True),
    "fp8-bf16": Shape(T=7, U=7, page_size=16, M=4, dtype=ml_dtypes.bfloat16, eight_bit=True),
}


@dataclass
class Call:
    """Arguments of one call, as numpy arrays; ``layer`` has NaN wherever no row looks."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    layer: tuple[np.ndarray, np.ndarray]
    table: np.ndarray
    start: np.ndarray
    length: np.ndarray
    scales: tuple[np.ndarray, np.ndarray] | None = None

    def arguments(self) -> tuple:
        """8-bit pages as bytes, as caches keep them."""
        layer = self.layer if self.scales is None else tuple(pages.view(np.uint8) for pages in self.layer)
        return (self.q, self.k, self.v, self.mask, *layer, self.table, self.start, self.length, self.scales)

    def cached(self) -> list[np.ndarray]:
        """What the pages mean, in float64."""
        pages = [p.astype(np.float64) for p in self.layer]
        return pages if self.scales is None else [p * s[..., None] for p, s in zip(pages, self.scales, strict=True)]


def edge_lengths(shape: Shape) -> list[int]:
    """0, the full capacity, and one around every border of pages and of blocks that a walk may have."""
    borders = {shape.page_size, 512, shape.capacity // 2 // shape.page_size * shape.page_size}
    around = {border + d for border in borders for d in (-1, 0, 1)} | {0, 1, shape.capacity - 1, shape.capacity}
    return sorted(n for n in around if 0 <= n <= shape.capacity)


def draw(shape: Shape, seed: int, *, share: bool = False, scale: float = 1.0) -> Call:
    """share: all rows begin with the pages of row 0, as a common prompt would have it."""
    rng = np.random.default_rng(seed)
    B, T, U, K, G, H = shape.B, shape.T, shape.U, shape.K, shape.G, shape.H

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32).astype(shape.dtype)

    length = rng.choice(edge_lengths(shape), B)
    start = np.where(rng.random(B) < 0.5, 0, rng.integers(0, length + 1))
    table = rng.permutation(shape.num_pages)[: B * shape.M].reshape(B, shape.M)
    if share:
        common = rng.integers(1, shape.M + 1)
        table[:, :common] = table[0, :common]
    stored = ml_dtypes.float8_e4m3fn if shape.eight_bit else shape.dtype
    layer = tuple(np.full((K, shape.num_pages, shape.page_size, H), np.nan, stored) for _ in range(2))
    scales = tuple(np.full((K, shape.num_pages, shape.page_size), np.nan, np.float32) for _ in range(2))
    for row in range(B):
        for position in range(start[row], length[row]):
            page, slot = table[row, position // shape.page_size], position % shape.page_size
            for pages, page_scale in zip(layer, scales, strict=True):
                pages[:, page, slot] = normal(K, H).astype(stored)
                page_scale[:, page, slot] = rng.uniform(0.25, 2.0, K)
    # Pages a row has no use for yet: the table may name any.
    for row in range(B):
        unused = -(-length[row] // shape.page_size)
        table[row, unused:] = rng.integers(0, shape.num_pages, shape.M - unused)
    mask = rng.random((shape.mask_rows or B, T, U)) < rng.choice([0.0, 0.5, 1.0])
    return Call(
        (scale * normal(B, T, K, G, H)).astype(shape.dtype),
        normal(B, U, K, H),
        normal(B, U, K, H),
        mask,
        layer,
        table.astype(np.int32),
        start.astype(np.int32),
        length.astype(np.int32),
        scales if shape.eight_bit else None,
    )


def dense(call: Call, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(out, log-sum-exp) over the row's visible keys, one row, position, and kv head after the other, in float64."""
    B, T, K, G, H = call.q.shape
    out, lse = np.zeros((B, T, K, G, H)), np.full((B, T, K, G), -np.inf)
    cached = call.cached()
    for row in range(B):
        positions = np.arange(call.start[row], call.length[row])
        page, slot = call.table[row, positions // page_size], positions % page_size
        for t in range(T):
            seen = call.mask[row if len(call.mask) > 1 else 0, t]
            for head in range(K):
                k, v = (
                    np.concatenate([pages[head, page, slot], new[row, seen, head].astype(np.float64)])
                    for pages, new in zip(cached, (call.k, call.v), strict=True)
                )
                if not len(k):
                    continue
                score = call.q[row, t, head].astype(np.float64) @ k.T / np.sqrt(H)
                weight = np.exp(score - score.max(axis=-1, keepdims=True))
                out[row, t, head] = weight @ v / weight.sum(axis=-1, keepdims=True)
                lse[row, t, head] = score.max(axis=-1) + np.log(weight.sum(axis=-1))
    return out, lse


def any_shape(*, most_rows: int, most_heads: int) -> st.SearchStrategy[Shape]:
    """Small float32 shapes; up to ``most_rows`` requests and ``most_heads`` kv heads."""
    return st.builds(
        Shape,
        B=st.integers(1, most_rows),
        T=st.integers(1, 9),
        U=st.integers(9, 12),
        K=st.integers(1, most_heads),
        G=st.integers(1, 8),
        page_size=st.sampled_from([2, 5, 16, 64]),
        M=st.integers(1, 6),
        mask_rows=st.sampled_from([None, 1]),
        eight_bit=st.booleans(),
    )
