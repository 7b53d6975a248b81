"""The Triton kernels, run by Triton's interpreter: ``make test-triton``. Skipped where Triton is not installed.

The interpreter computes with numpy, one program after the other. How they compile: test_h100_compile.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import numpy as np
import pytest
from attention_cases import SHAPES, Call, any_shape, dense, draw
from hypothesis import given, settings
from hypothesis import strategies as st

interpreted = partial(mock.patch.dict, os.environ, TRITON_INTERPRET="1")  # read where kernels are defined or called

with interpreted():
    pytest.importorskip("triton", reason="Triton is not installed: make test-triton fetches it")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from pallas_kernels.tree_attention_triton import launches, tree_attention


class Tensor:
    """What the interpreter asks of a torch tensor: an address and a dtype. Copies, here and back, are itself."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = storage_offset = size = stride = itself


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Holds bfloat16 as bits, and would multiply those as integers."""
    dot = InterpreterBuilder.create_dot

    def dot_of_numbers(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    with interpreted(), mock.patch.object(InterpreterBuilder, "create_dot", dot_of_numbers):
        yield


@np.errstate(divide="ignore")  # the logarithm of 0, where nothing is seen
def compute(call: Call) -> list[np.ndarray]:
    arrays = [call.start, call.length, call.table, call.q, call.k, call.v, call.mask, *call.layer]
    todo = launches(*arrays, call.scales)
    given = [Tensor(x) for x in (*arrays, *(call.scales or (call.start, call.start)))]
    for each in todo:
        made = [Tensor(np.full(x.shape, np.nan, x.dtype)) for x in each.out]
        each.kernel[each.grid](*given, *made, **each.constants)
        given = made
    return [x.array for x in given]


def assert_equals_dense(call: Call, page_size: int) -> None:
    tolerance = 2e-6 if call.q.dtype == np.float32 else 2e-2
    (out, lse), expected = compute(call), dense(call, page_size)
    assert out.dtype == call.q.dtype and lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float64), expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_a_dense_softmax(name):
    for seed in range(3):
        assert_equals_dense(draw(SHAPES[name], seed, share=seed % 3 == 2), SHAPES[name].page_size)


@pytest.mark.parametrize("name", ["many-rows", "suffix-above-block"])
def test_a_causal_chunk_equals_a_dense_softmax(name):
    call = draw(SHAPES[name], 0)
    call.mask[:] = np.tril(np.ones(call.mask.shape[1:], bool))
    assert_equals_dense(call, SHAPES[name].page_size)


@settings(max_examples=6)
@given(shape=any_shape(most_rows=2, most_heads=2), seed=st.integers(0, 2**16))
def test_equals_a_dense_softmax_in_any_shape(shape, seed):
    assert_equals_dense(draw(shape, seed), shape.page_size)


@pytest.mark.parametrize("name", ["tree", "blocks"])
def test_large_scores_neither_overflow_nor_vanish(name):
    call = draw(SHAPES[name], 0, scale=100.0)
    np.testing.assert_allclose(compute(call)[0], dense(call, SHAPES[name].page_size)[0], atol=2e-3)


@pytest.mark.parametrize("name", ["tree", "blocks"])
def test_a_query_that_sees_nothing_gets_zeros(name):
    call = draw(SHAPES[name], 0)
    call.mask[:], call.start[:], call.length[:] = False, 0, 0
    out, lse = compute(call)
    assert not out.any() and np.all(lse == -np.inf)


def test_pages_beyond_two_gigabytes():
    """More elements than 32 bits count, and given as bytes; the memory in front of what is used is never touched."""
    shape = replace(SHAPES["fp8"], B=1, K=1)
    call = draw(shape, 1)
    assert call.length[0] > call.start[0]
    before = 2**31 // (shape.page_size * shape.H)

    def behind(pages: np.ndarray) -> np.ndarray:
        everything = np.zeros((1, before + pages.shape[1], *pages.shape[2:]), f"u{pages.itemsize}").view(pages.dtype)
        everything[:, before:] = pages
        return everything

    layer, scales = tuple(behind(x).view(np.uint8) for x in call.layer), tuple(map(behind, call.scales))
    assert layer[0].size > 2**31
    far = replace(call, layer=layer, scales=scales, table=call.table + np.int32(before))
    for found, expected in zip(compute(far), compute(call), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_refuses_by_name():
    call = draw(SHAPES["decode"], 0)
    with pytest.raises(NotImplementedError, match="'triton' needs a GPU; 'pallas' and 'xla' run anywhere"):
        jax.eval_shape(tree_attention, *call.arguments())
    with pytest.raises(NotImplementedError, match="head width 24"):
        jax.eval_shape(tree_attention, *draw(replace(SHAPES["decode"], H=24), 0).arguments())
