"""Part 2c: into how many splits should the prefix go? The ``pallas`` kernel with other numbers of waves.

``pallas_kernels/plan.py`` fills every multiprocessor ``WAVES`` times. Too few splits leave memory idle, too many cost
the merge: this says which number it should be, on this device. Timed as part 2 times attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import jax.numpy as jnp

from gpu_parts.attention import Problem, ours_seconds
from gpu_parts.rows import Rows, Settings
from pallas_kernels import plan as rule

WAVES = (1, 2, 4, 8)


def with_waves(waves: int, problem: Problem, tiny: bool) -> dict[str, Any]:
    p = problem
    with mock.patch.object(rule, "WAVES", waves):  # read when the call is traced
        chosen = rule.plan(B=p.B, T=p.T, K=p.K, G=p.G, H=p.H, capacity=p.length, dtype=jnp.bfloat16)
        return dict(seconds=ours_seconds("pallas", problem, tiny), splits=chosen.splits)


def measure(rows: Rows, settings: Settings) -> None:
    shapes = [(1, 1, 1024), (1, 1, 8192), (1, 32, 8192), (1, 64, 32_768), (8, 32, 8192)]
    problems = [Problem(B, T, length) for B, T, length in shapes]
    if settings.tiny:
        problems = [Problem(1, 4, 512, K=1, G=2, H=16)]
    for problem in problems:
        for waves in WAVES:
            key = dict(case=f"{waves} waves", B=problem.B, T=problem.T, length=problem.length)
            rows.measure(partial(with_waves, waves, problem, settings.tiny), implementation="pallas", **key)
