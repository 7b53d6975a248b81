"""The Mosaic kernels, interpreted: bfloat16 and whole pages only, so the common battery's small shapes are not theirs.

The interpreter models shared memory, copies, barriers and warp groups as threads; it starts memory as NaN. Its threads
hold XLA's while they wait, so two warp groups run in a process of their own that has more of those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Call, Shape, dense, draw
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tree_attention_mosaic import tree_attention

BASE = Shape(K=1, H=64, page_size=64, M=3, dtype=jnp.bfloat16)
SHAPES = {
    "decode-one-split": replace(BASE, B=2, T=1, U=1, G=1, M=2),
    "odd-heads-small-pages": replace(BASE, B=1, K=3, G=3, page_size=8, M=17),
    "half-a-chunk": replace(BASE, B=1, T=1, U=1, G=1, M=6),  # what the merge takes at a time is more than there is
    "wide-heads-two-splits": replace(BASE, B=2, T=7, U=12, G=4, H=128, page_size=32, M=8, mask_rows=1),
    "many-rows-large-pages": replace(BASE, B=1, T=20, U=70, G=4, page_size=128, M=4),
}
WIDE = {
    "two-groups": replace(BASE, B=1, T=40, U=70, page_size=16, M=17),
    "two-groups-two-blocks-one-split": replace(BASE, B=1, T=33, U=33, G=4),
}


def assert_equals_dense(shape: Shape, *calls: Call) -> None:
    compute = jax.jit(lambda *a: tree_attention(*a))  # traced anew, for what tests put in its place
    for call in calls:
        compare(*compute(*call.arguments()), call, shape)


def compare(out: jax.Array, lse: jax.Array, call: Call, shape: Shape) -> None:
    assert out.dtype == call.q.dtype and out.shape == call.q.shape
    assert lse.dtype == jnp.float32 and lse.shape == call.q.shape[:-1]
    expected_out, expected_lse = dense(call, shape.page_size)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected_out, atol=2e-2, rtol=2e-2)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, atol=1e-5, rtol=1e-5)


def run_without_races(T: int, watch: bool) -> None:
    """A call whose slots are refilled several times, with the interpreter's race detector, which prints what it finds.

    watch: read wgmma's operands beside it, as the detector does not see what wgmma reads.
    """
    shape = replace(BASE, B=1, T=T, U=70, G=2, M=7)
    call = draw(shape, 0)
    call = replace(call, layer=tuple(np.nan_to_num(pages, nan=0.5) for pages in call.layer))
    call.start[:], call.length[:] = 3, shape.capacity - 5
    wgmma = plgpu.wgmma

    def watched(acc, a, b):
        _ = a[...], b[...]
        plgpu.commit_smem()
        wgmma(acc, a, b)

    detect = partial(plgpu.InterpretGPUParams, detect_races=True)
    with mock.patch.multiple(plgpu, InterpretGPUParams=detect, wgmma=watched if watch else wgmma):
        assert_equals_dense(shape, call)


def in_a_process_with_more_threads(code: str) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", f"from test_attention_mosaic import *; assert jax.device_count() == 4; {code}"],
        cwd=Path(__file__).parent,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SHAPES)
def test_equals_a_dense_softmax(name):
    assert_equals_dense(SHAPES[name], *(draw(SHAPES[name], seed) for seed in range(2)))


def test_two_warp_groups_equal_a_dense_softmax():
    in_a_process_with_more_threads("[assert_equals_dense(x, draw(x, 0), draw(x, 1)) for x in WIDE.values()]")


def test_no_copy_overtakes_who_still_reads():
    said = in_a_process_with_more_threads("[run_without_races(*x) for x in ((1, False), (33, False), (33, True))]")
    assert "RACE" not in said


def test_a_query_that_sees_nothing_gets_zeros():
    call = draw(replace(BASE, B=1, T=2, M=5), 0)
    call.mask[:], call.start[:], call.length[:] = False, 0, 0
    out, lse = jax.jit(tree_attention)(*call.arguments())
    assert not np.asarray(out, np.float32).any() and np.all(np.asarray(lse) == -np.inf)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(BASE, dtype=np.float32), "float32"),
        (replace(BASE, eight_bit=True), "uint8"),
        (replace(BASE, H=32), "head width 32"),
        (replace(BASE, page_size=48), "page size 48"),
    ],
)
def test_refuses_by_name(shape, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(tree_attention, *draw(shape, 0).arguments())
