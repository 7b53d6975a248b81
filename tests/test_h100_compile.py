"""Every kernel and the whole decode loop, compiled for an H100 without one (scripts/compile_h100.py).

``make test-h100-compile`` fetches the plugin and names its folder in JEAGLE_H100_PLUGIN; elsewhere only the reading of
XLA's and ptxas' words is tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PLUGIN = os.environ.get("JEAGLE_H100_PLUGIN", "")


@pytest.fixture(scope="module")
def h100():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import h100

        yield h100


@pytest.fixture(scope="module")
def programs() -> list[dict]:
    if not PLUGIN:
        pytest.skip("compiling for an H100 takes jax-cuda13-plugin: make test-h100-compile fetches it")
    if not Path(PLUGIN, "jax_plugins").exists():
        pytest.skip(f"jax-cuda13-plugin could not be fetched to {PLUGIN}")
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "compile_h100.py"), "--plugin", PLUGIN], capture_output=True, text=True
    )
    if run.returncode == 2:
        pytest.skip(run.stderr[-300:])
    assert run.returncode in (0, 1), run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])["programs"]


def test_an_attention_layer_is_at_most_two_launches_and_nothing_spills(programs):
    kernels = [row for row in programs if "B" in row and "refused" not in row]
    assert {(row["B"], row["T"], row["pages"]) for row in kernels} >= {
        (1, 1, "bfloat16"), (1, 64, "bfloat16"), (1, 64, "float8_e4m3fn"), (1, 64, "float32"), (8, 32, "bfloat16"),
        (64, 4, "bfloat16"),
    }  # fmt: skip
    for row in kernels:
        launches = 2 + (row["what"] == "mosaic")  # which lays the mask out, once for all layers
        assert row["launches"] <= launches and row["spilled_bytes"] == 0 and row["shared_bytes"] <= 232448, row
        assert row["registers"] > 0, row  # ptxas was heard


def test_a_layer_of_experts_is_two_launches_beside_its_blocks_and_nothing_spills(programs):
    rows = [row for row in programs if "E" in row]
    assert {(row["E"], row["m"]) for row in rows} == {(E, m) for E in (16, 128) for m in (1, 4, 64)}
    for row in rows:
        assert row["launches"] == 2 and row["launches_of_blocks"] <= 3 and row["spilled_bytes"] == 0, row
        assert 0 < row["registers"] <= 128 and row["shared_bytes"] <= 232448 // 2, row  # two programs fit
        assert min(row["programs"]) >= 128, row  # of 132 multiprocessors


def test_batch_one_fills_the_multiprocessors(programs):
    for row in programs:
        if row["what"] == "pallas" and row["B"] == 1 and row["K"] == 8:
            x, y, z = row["grid"]
            assert x * y * z >= 132, row


def test_the_loop_updates_its_cache_in_place_as_one_graph(programs):
    loops = [row for row in programs if "loop" in row["what"]]
    names = {row["what"] for row in loops}
    drafting = {"loop, tree of 64", "loop, tree of 64, FP8 caches", "loop, chain of 3, lookup"}
    assert names == {"loop, plain", *drafting} and len(loops) == 6
    for row in loops:
        assert row["alias_bytes"] >= row["cache_bytes"], row
        assert row["temp_bytes"] < row["page_bytes"], row  # so no copy of any layer's pages fits
        assert row["launches_per_layer"] <= 17, row
        assert row["outside_command_buffers"] <= 1, row
        assert row["spilled_bytes"] == 0, row
        assert row["whole_loop_is_command_buffer"] == bool(row["flags"]), row


SCHEDULE = """\
001: kCopy  [source       | next=002 (1)] kCopy
002: kWhile [prev=001 (1) | sink        ]
condition:
    003: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | sink]
        004: kCustomKernel [source | sink] tree_attention grid: [8, 1, 32] threads: [128, 1, 1]  shared_memory: 9 bytes
005: kCustomKernel [source | sink] last grid: [2, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
006: kCustomCall   [source | sink] kCustomCall
"""

PTXAS = """\
ptxas info    : Compiling entry function 'tree_attention' for 'sm_90a'
ptxas info    : Function properties for tree_attention
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 184 registers, used 1 barriers
"""


def test_schedules_are_read(h100):
    assert h100._read_ptxas(PTXAS) == {"tree_attention": h100.Ptxas(184, 12)} and h100._read_ptxas("") == {}
    kernels, whole = h100._read_schedule(SCHEDULE)
    assert not whole
    assert [(k.name, k.in_loop, k.in_command_buffer) for k in kernels] == [
        ("loop_and_fusion", True, False),
        ("tree_attention", True, True),
        ("last", False, False),
        ("custom call", False, False),
    ]
    assert kernels[1] == h100.Kernel("tree_attention", (8, 1, 32), 128, 9, True, True)
    inside = "000: kCommandBuffer [source | sink]\n" + "".join(f"    {line}\n" for line in SCHEDULE.splitlines())
    assert h100._read_schedule(inside)[1]
