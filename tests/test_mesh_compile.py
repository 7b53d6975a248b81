"""Decode loops of the largest models for eight H100s, compiled without one (scripts/compile_mesh.py), against plans,
and a step of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
