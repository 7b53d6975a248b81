"""Decode loops of the largest models for eight H100s, compiled without one (scripts/compile_mesh.py), against plans."""

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
