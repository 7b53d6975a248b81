"""Part 6: a round of decoding over all devices of this machine, under each of XLA's options for collectives.

Random bf16 weights, batch 1, heads and MLPs split over one tensor axis. An all-reduce of a few tokens' states is all
latency: XLA can do it in one kernel of its own instead of NCCL's, and can capture collectives in the loop's command
buffer. Each variant is a process of its own: XLA reads its flags once. With one device there is nothing to measure.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import numpy as np

from gpu_parts.rows import Rows, Settings, Skip
from gpu_parts.shards import whole_model
from gpu_parts.steps import Subject, contexts
from gpu_parts.timing import best_seconds
from jeagle.decode import DecodeState
from jeagle.sharding import Layout, make_mesh
from jeagle.tree import parse_tree

MODELS = ("llama-3.1-8b", "llama-3.3-70b")
TREES = ("off", "chain-3")
ROUNDS = 32  # per launch


def seconds_per_round(subject: Subject, tree: str, rounds: int) -> float:
    """Of launches that all start from the shortest context."""
    plan, decoder = parse_tree(tree), subject.decoder
    state = subject.state(plan)

    def run() -> DecodeState:
        nonlocal state
        length_B, none_B = (decoder.put(np.full(1, n, np.int32)) for n in (min(subject.contexts), 0))
        state = dataclasses.replace(state, length_B=length_B, num_output_B=none_B)
        state = decoder.launch(state, subject.program(plan), rounds)
        return state

    return best_seconds(run) / rounds


def measure(rows: Rows, settings: Settings) -> None:
    devices = jax.device_count()
    for model in MODELS[: 1 if settings.tiny else None]:

        @cache
        def subject(model=model) -> Subject:
            if devices == 1:
                raise Skip("needs several devices, and JAX sees one")
            return Subject(*whole_model(model, settings.tiny), settings, Layout(make_mesh(1, devices)))

        for tree in TREES[-1:] if settings.tiny else TREES:

            def time_it(subject=subject, tree=tree) -> dict[str, Any]:
                rounds = 2 if settings.tiny else ROUNDS
                return dict(seconds=seconds_per_round(subject(), tree, rounds), devices=devices, rounds=rounds)

            key = dict(shape=f"{model} over {devices}", implementation=settings.attention, tree=tree)
            rows.measure(time_it, what="round", flags=settings.variant, length=min(contexts(settings)), **key)
