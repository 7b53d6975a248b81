"""Decode loops of the largest models for eight H100s, compiled without one (scripts/compile_mesh.py), against plans,
and a step of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jeagle.plan_command import COMPILE_ENVIRONMENT

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compile_mesh.py"
PLUGIN = os.environ.get("JEAGLE_H100_PLUGIN", "")


def test_eight_gpus_hold_what_the_plan_says_and_gather_nothing_large():
    """Four layers of each model."""
    if not Path(PLUGIN or ".none", "jax_plugins").exists():
        pytest.skip("compiling for GPUs takes jax-cuda13-plugin: make test-h100-compile fetches it")
    run = subprocess.run([sys.executable, str(SCRIPT), "--plugin", PLUGIN], capture_output=True, text=True)
    if run.returncode == 2:
        pytest.skip(run.stderr[-300:])
    assert run.returncode in (0, 1), run.stderr[-2000:]
    programs = json.loads(run.stdout.splitlines()[-1])["programs"]
    assert [(row["model"], row["tree"]) for row in programs] == [
        (model, tree) for model in ("llama-3.3-70b", "llama-4-maverick") for tree in ("plain", "chain-3")
    ]
    for row in programs:
        assert not row["faults"], row
        assert sum(c["count"] for c in row["collectives"]) >= 2 * row["layers"], row  # they were seen


def test_a_training_step_of_8b_fits_one_gpu():
    """The recipe for Llama 3.1 8B, whole (scripts/compile_train.py)."""
    if not Path(PLUGIN or ".none", "jax_plugins").exists():
        pytest.skip("compiling for GPUs takes jax-cuda13-plugin: make test-h100-compile fetches it")
    recipe = SCRIPT.parent / "recipes" / "llama-3.1-8b-eagle3.toml"
    command = [sys.executable, str(SCRIPT.with_name("compile_train.py")), str(recipe), "--shape", "llama-3.1-8b"]
    run = subprocess.run([*command, "--plugin", PLUGIN], capture_output=True, text=True)
    if run.returncode == 2:
        pytest.skip(run.stderr[-300:])
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    weights = 2 * 8.03e9 + 3 * 4 * 0.42e9  # the target's in bfloat16, the head's with AdamW's two moments in float32
    assert found["fits"] and abs(found["argument_bytes"] / weights - 1) < 0.02


INSERT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from jeagle.compile_only import CannotCompile, _shapes, absent_mesh
from jeagle.decode import Program
from jeagle.decoder import Decoder, state_axes
from jeagle.sharding import Layout
from jeagle.sizes import head_for, size
from jeagle.tree import parse_tree

target = dataclasses.replace(size("llama-3.1-8b"), num_layers=2)
try:
    layout = Layout(absent_mesh("h100", 2, 2))
except CannotCompile as error:
    sys.exit(f"cannot compile: {error}")
modules = _shapes(target, jnp.bfloat16, layout), _shapes(head_for(target, "eagle3")[0], jnp.bfloat16, layout)
decoder, alone, program = Decoder(*modules, layout=layout), Decoder(*modules), Program(parse_tree("chain-3"))
caches, rows = (jax.eval_shape(lambda: alone.empty_caches(B, program, S)) for B, S in ((16, 8192), (4, 1024)))

def placed(arrays, axes):
    shapes = lambda x, of_x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(of_x))
    return jax.tree.map(shapes, arrays, axes)

args = placed(caches, state_axes(caches)), placed(rows, rows.whole_axes()), placed(jnp.zeros(4, int), (None,))
compiled = decoder._insert.lower(decoder.params, *args).compile()
memory, text = compiled.memory_analysis(), compiled.as_text()
held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((caches.target, caches.head)))
moved = [name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if name in text]
print(json.dumps(dict(alias=memory.alias_size_in_bytes, temp=memory.temp_size_in_bytes, caches=held, moved=moved)))
"""


def test_prompts_of_prefill_workers_are_put_in_place():
    """Into caches over two groups of two GPUs (jeagle/disaggregated.py): no copy of any, no word between the groups."""
    if not Path(PLUGIN or ".none", "jax_plugins").exists():
        pytest.skip("compiling for GPUs takes jax-cuda13-plugin: make test-h100-compile fetches it")
    path = os.pathsep.join([PLUGIN, str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | COMPILE_ENVIRONMENT | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", INSERT], capture_output=True, text=True, env=environment)
    if run.returncode == 1 and run.stderr.startswith("cannot compile"):
        pytest.skip(run.stderr[-300:])
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["alias"] >= found["caches"] // 4 and found["temp"] < 1 << 16 and not found["moved"], found
