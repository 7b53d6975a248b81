"""Every implementation of ``attend`` against a dense softmax in float64, over awkward shapes and dirty caches.

All page slots that no row may see hold NaN, so a leak cannot pass unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.attention import IMPLEMENTATIONS, attend, resolve
from jeagle.cache import Prefix


@dataclass(frozen=True)
class Shape:
    B: int = 3
    T: int = 3
    U: int = 3
    K: int = 2
    G: int = 2
    H: int = 8
    page_size: int = 4
    M: int = 5
    mask_rows: int | None = None  # 1: one mask for all rows
    dtype: type = np.float32

    @property
    def capacity(self) -> int:
        return self.M * self.page_size

    @property
    def num_pages(self) -> int:
        return self.B * self.M + 2


SHAPES = {
    "decode": Shape(T=1, U=1, G=1, K=3),
    "tree": Shape(T=7, U=7, G=3),
    "wider-suffix": Shape(B=2, T=3, U=9, G=4, K=1, H=16),
    "chunk-one-mask": Shape(T=8, U=8, mask_rows=1, page_size=16, M=1),
    # Capacity above the XLA implementation's block of 512 positions: the last block is not full.
    "blocks": Shape(T=3, U=5, K=1, page_size=128, M=9),
    "page-above-block": Shape(T=2, U=2, K=1, page_size=520, M=2),
    "bf16": Shape(T=7, U=7, dtype=jnp.bfloat16),
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
    layer = tuple(np.full((K, shape.num_pages, shape.page_size, H), np.nan, shape.dtype) for _ in range(2))
    for row in range(B):
        for position in range(start[row], length[row]):
            page, slot = table[row, position // shape.page_size], position % shape.page_size
            for pages in layer:
                pages[:, page, slot] = normal(K, H)
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
    )


def dense(call: Call, page_size: int) -> np.ndarray:
    """Softmax over the row's visible keys, one row, position, and kv head after the other, in float64."""
    B, T, K, G, H = call.q.shape
    out = np.zeros((B, T, K, G, H))
    for row in range(B):
        positions = np.arange(call.start[row], call.length[row])
        page, slot = call.table[row, positions // page_size], positions % page_size
        for t in range(T):
            seen = call.mask[row if len(call.mask) > 1 else 0, t]
            for head in range(K):
                k, v = (
                    np.concatenate([pages[head, page, slot], new[row, seen, head]]).astype(np.float64)
                    for pages, new in zip(call.layer, (call.k, call.v))
                )
                if not len(k):
                    continue
                score = call.q[row, t, head].astype(np.float64) @ k.T / np.sqrt(H)
                weight = np.exp(score - score.max(axis=-1, keepdims=True))
                out[row, t, head] = weight @ v / weight.sum(axis=-1, keepdims=True)
    return out


@pytest.fixture(params=sorted(IMPLEMENTATIONS), scope="module")
def compute(request):
    """One compiled function for all calls of one shape."""

    @jax.jit
    def run(q, k, v, mask, layer, table, start, length):
        return attend(q, k, v, mask, layer, Prefix(table, start, length), implementation=request.param)

    return lambda call: run(call.q, call.k, call.v, call.mask, call.layer, call.table, call.start, call.length)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_a_dense_softmax(compute, name):
    shape = SHAPES[name]
    tolerance = 2e-2 if shape.dtype == jnp.bfloat16 else 2e-6
    for seed in range(24 if shape.capacity < 100 else 8):
        call = draw(shape, seed, share=seed % 3 == 2)
        out = compute(call)
        assert out.dtype == shape.dtype and out.shape == call.q.shape
        np.testing.assert_allclose(
            np.asarray(out, np.float64), dense(call, shape.page_size), atol=tolerance, rtol=tolerance, err_msg=str(seed)
        )


@pytest.mark.parametrize("name", ["tree", "blocks"])
def test_large_scores_neither_overflow_nor_vanish(compute, name):
    """Scores of several hundreds: prefix and suffix then differ by factors float32 cannot hold."""
    shape = SHAPES[name]
    for seed in range(4):
        call = draw(shape, seed, scale=100.0)
        np.testing.assert_allclose(np.asarray(compute(call)), dense(call, shape.page_size), atol=2e-3)


@pytest.mark.parametrize("name", ["tree", "blocks"])
def test_a_query_that_sees_nothing_gets_zeros(compute, name):
    call = draw(SHAPES[name], 0)
    call = replace(
        call, mask=np.zeros_like(call.mask), length=np.zeros_like(call.length), start=np.zeros_like(call.start)
    )
    assert not np.asarray(compute(call)).any()


def test_a_row_does_not_depend_on_its_company(compute):
    """The same row alone in the batch (the others empty) gives the same bits, also when blocks are skipped or added."""
    call = draw(SHAPES["blocks"], 3)
    call.length[:], call.start[:] = [300, 1100, 0], 0
    call = replace(call, layer=tuple(np.nan_to_num(pages, nan=0.5) for pages in call.layer))
    together = np.asarray(compute(call))
    alone = np.asarray(compute(replace(call, length=np.array([300, 0, 0], np.int32))))
    np.testing.assert_array_equal(together[0], alone[0])


def test_names_are_resolved_and_never_replaced():
    assert resolve("auto") in IMPLEMENTATIONS
    for name in IMPLEMENTATIONS:
        assert resolve(name) == name
    with pytest.raises(ValueError, match=r"'cuda' is unknown; choose one of \['auto', .*'xla'"):
        resolve("cuda")
    call = draw(SHAPES["decode"], 0)
    prefix = Prefix(call.table, call.start, call.length)
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        jax.eval_shape(partial(attend, implementation="cuda"), call.q, call.k, call.v, call.mask, call.layer, prefix)
