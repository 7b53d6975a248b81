"""Every implementation of ``attend`` against a dense softmax in float64, over awkward shapes and dirty caches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SHAPES, Call, any_shape, dense, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from jeagle.attention import IMPLEMENTATIONS, attend, resolve
from jeagle.cache import Prefix
from pallas_kernels import plan as kernel_plan
from pallas_kernels import tree_attention_pallas
from pallas_kernels import tree_attention_xla as xla


# What takes Hopper's shapes alone, or Triton's interpreter, has its own file on the same draws: test_attention_*.py.
@pytest.fixture(params=sorted(set(IMPLEMENTATIONS) - {"mosaic", "triton"}), scope="module")
def compute(request):
    """One compiled function for all calls of one shape."""
    run = jax.jit(IMPLEMENTATIONS[request.param])
    return lambda call: run(*call.arguments())


def assert_equals_dense(compute, call: Call, page_size: int, tolerance: float) -> None:
    out, lse = compute(call)
    assert out.dtype == call.q.dtype and out.shape == call.q.shape
    assert lse.dtype == jnp.float32 and lse.shape == call.q.shape[:-1]
    expected_out, expected_lse = dense(call, page_size)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected_out, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_a_dense_softmax(compute, name):
    shape = SHAPES[name]
    tolerance = 2e-2 if shape.dtype == jnp.bfloat16 else 2e-6
    for seed in range(24 if shape.capacity < 100 else 8):
        assert_equals_dense(compute, draw(shape, seed, share=seed % 3 == 2), shape.page_size, tolerance)


@settings(max_examples=6)
@given(shape=any_shape(most_rows=4, most_heads=3), seed=st.integers(0, 2**16))
def test_equals_a_dense_softmax_in_any_shape(compute, shape, seed):
    assert_equals_dense(compute, draw(shape, seed), shape.page_size, 2e-6)


@pytest.mark.parametrize("name", ["tree", "blocks"])
def test_large_scores_neither_overflow_nor_vanish(compute, name):
    """Scores of several hundreds: prefix and suffix then differ by factors float32 cannot hold."""
    shape = SHAPES[name]
    for seed in range(4):
        call = draw(shape, seed, scale=100.0)
        np.testing.assert_allclose(np.asarray(compute(call)[0]), dense(call, shape.page_size)[0], atol=2e-3)


@pytest.mark.parametrize("name", ["tree", "blocks"])
def test_a_query_that_sees_nothing_gets_zeros(compute, name):
    call = draw(SHAPES[name], 0)
    call = replace(
        call, mask=np.zeros_like(call.mask), length=np.zeros_like(call.length), start=np.zeros_like(call.start)
    )
    out, lse = compute(call)
    assert not np.asarray(out).any() and np.all(np.asarray(lse) == -np.inf)


def test_a_prompts_chunk_is_read_as_far_as_it_is_seen():
    """Rows of the ``pallas`` kernel stop where their nodes stop seeing: what lies beyond would make them NaN."""
    call = draw(replace(SHAPES["suffix-above-block"], T=70), 0)
    call.mask[:] = np.tril(np.ones(call.mask.shape[1:], bool))
    call.v[:, 64:] = np.nan
    out, _ = IMPLEMENTATIONS["pallas"](*call.arguments())
    np.testing.assert_allclose(out[:, :64], dense(call, SHAPES["suffix-above-block"].page_size)[0][:, :64], atol=2e-6)
    assert np.isnan(out[:, 64:]).all()


def test_a_row_does_not_depend_on_its_company(compute):
    """The same row alone in the batch (the others empty) gives the same bits, also when blocks are skipped or added."""
    call = draw(SHAPES["blocks"], 3)
    call.length[:], call.start[:] = [300, 1100, 0], 0
    call = replace(call, layer=tuple(np.nan_to_num(pages, nan=0.5) for pages in call.layer))
    together = np.asarray(compute(call)[0])
    alone = np.asarray(compute(replace(call, length=np.array([300, 0, 0], np.int32)))[0])
    np.testing.assert_array_equal(together[0], alone[0])


def in_order(call: Call, fill: float) -> Call:
    """The same call over pages that lie as ``Decoder`` lays them; ``fill`` in slots that nobody sees."""
    B, M = call.table.shape
    K, _, page_size, H = call.layer[0].shape
    position_S = np.arange(M * page_size)
    seen_BS = (position_S >= call.start[:, None]) & (position_S < call.length[:, None])
    layer = tuple(
        np.where(seen_BS[..., None], pages[:, call.table].reshape(K, B, -1, H), np.array(fill, pages.dtype))
        for pages in call.layer
    )
    layer = tuple(pages.reshape(K, B * M, page_size, H) for pages in layer)
    return replace(call, layer=layer, table=np.arange(B * M, dtype=np.int32).reshape(B, M))


@pytest.mark.parametrize("fill", [0.5, np.nan])
@pytest.mark.parametrize(
    "name", ["one-row", "groups", "groups-one-mask", "wider-suffix", "blocks", "many-rows", "bf16"]
)
def test_pages_in_order(compute, name, fill):
    """What a CPU multiplies with as it lies, if that pays and no NaN is there to be left out."""
    shape = SHAPES[name]
    tolerance = 2e-2 if shape.dtype == jnp.bfloat16 else 2e-6
    for seed in range(6):
        assert_equals_dense(compute, in_order(draw(shape, seed), fill), shape.page_size, tolerance)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_when_a_cache_is_taken_whole():
    """Of nine pages of 128, two to a block of 256: from the third block of five on."""
    shape = SHAPES["blocks"]
    call = in_order(draw(shape, 0), 0.5)

    def is_whole(**changes) -> bool:
        *rows, _ = replace(call, **changes).arguments()
        pages_k, pages_v = rows[4:6]
        whole = partial(xla._attend, partial(xla._whole, pages_k=pages_k, pages_v=pages_v))
        nothing = lambda q, *_: (jnp.zeros_like(q), jnp.zeros(q.shape[:-1]))  # noqa: E731
        rows = [jnp.asarray(x) for x in (*rows[:4], *rows[6:])]
        return bool(xla._whole_or(*rows, in_blocks=nothing, whole=whole, page_size=shape.page_size)[0].any())

    zeros, long = np.zeros_like(call.start), np.array([10, 513, 0], np.int32)
    assert is_whole(start=zeros, length=long)
    assert not is_whole(start=zeros, length=long - 1)
    assert not is_whole(start=zeros + 256, length=long)
    assert not is_whole(start=zeros, length=long, table=call.table[::-1])
    assert not is_whole(start=zeros, length=long, layer=(call.layer[0], np.full_like(call.layer[1], np.nan)))


def test_names_are_resolved_and_never_replaced(monkeypatch):
    assert resolve("auto", "cpu") == "xla" and resolve("auto", "gpu") == "pallas"
    # What the kernel would refuse on a GPU is XLA's: Llamas with heads of 96 or 100, and pages of 2 to 4 GiB.
    for shape, dtype, chosen in (
        ((2, 9, 16, 128), "bfloat16", "pallas"),
        ((2, 9, 16, 100), "bfloat16", "xla"),
        ((2, 9, 16, 8), "float32", "xla"),
        ((2, 9, 16, 256), "float32", "pallas"),
        ((2, 9, 16, 512), "bfloat16", "xla"),  # its blocks would not fit in shared memory
        ((8, 2**18, 16, 64), "float8_e4m3fn", "pallas"),
        ((8, 2**18 + 1, 16, 64), "float8_e4m3fn", "xla"),
    ):
        assert resolve("auto", "gpu", jax.ShapeDtypeStruct(shape, dtype)) == chosen
    with monkeypatch.context() as other:
        other.setattr(tree_attention_pallas, "compute_capability", lambda: 8.0)  # an A100 has no 8-bit floats
        assert resolve("auto", "gpu", jax.ShapeDtypeStruct((2, 9, 16, 64), "float8_e4m3fn")) == "xla"
        assert resolve("auto", "gpu", jax.ShapeDtypeStruct((2, 9, 16, 64), "bfloat16")) == "pallas"
    monkeypatch.setattr(kernel_plan, "compute_capability", lambda: 8.9)  # an RTX 4090, an L40S
    assert resolve("auto", "gpu", jax.ShapeDtypeStruct((2, 9, 16, 256), "bfloat16")) == "xla"
    assert kernel_plan.plan(B=1, T=64, K=8, G=4, H=128, capacity=8192, dtype=jnp.bfloat16)[:2] == (64, 64)
    for name in IMPLEMENTATIONS:
        assert resolve(name) == name
    with pytest.raises(ValueError, match=r"'cuda' is unknown; choose one of \['auto', .*'xla'"):
        resolve("cuda")
    call = draw(SHAPES["decode"], 0)
    prefix = Prefix(call.table, call.start, call.length)
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        jax.eval_shape(partial(attend, implementation="cuda"), call.q, call.k, call.v, call.mask, call.layer, prefix)
