"""Part 3b: what the loop around a round costs, with and without command buffers.

A round of ``decode.launch`` (lax.while_loop: how often is decided on the device, so XLA may ask it, each round) beside
the same round in a loop of known length. Each variant of XLA's command buffers is a process of its own: XLA reads its
flags once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpu_parts.rows import Rows, Settings
from gpu_parts.steps import SHAPES, Subject, contexts, subject_of
from gpu_parts.timing import best_seconds, num_kernels
from jeagle.decode import DecodeState, round_step
from jeagle.tree import parse_tree

TREES = ("off", "chain-3")
ROUNDS = 32  # per launch


def known_length(params, state: DecodeState, *, subject: Subject, tree: str, rounds: int) -> DecodeState:
    target, head = (nnx.merge(d, p) for d, p in zip(subject.definitions, params))
    program = subject.program(parse_tree(tree))
    return jax.lax.fori_loop(0, rounds, lambda _, state: round_step(target, head, state, program), state)


def time_loops(subject: Subject, tree: str, rounds: int) -> dict[str, Any]:
    """Seconds per round of both loops, timed in turns; every launch starts from the shortest context."""
    plan, context = parse_tree(tree), min(subject.contexts)
    state = subject.state(plan)
    function = partial(known_length, subject=subject, tree=tree, rounds=rounds)
    compiled = jax.jit(function, donate_argnums=1).lower(subject.params, state).compile()
    loops: dict[str, Callable[[DecodeState], DecodeState]] = {
        "while": lambda state: subject.decoder.launch(state, subject.program(plan), rounds),
        "known": lambda state: compiled(subject.params, state),
    }
    best = dict.fromkeys(loops, float("inf"))
    for _ in range(2):
        for name, loop in loops.items():

            def run(loop=loop) -> DecodeState:
                nonlocal state
                zero_B = jnp.zeros(1, jnp.int32)
                state = dataclasses.replace(state, length_B=zero_B + context, num_output_B=zero_B)
                state = loop(state)
                return state

            best[name] = min(best[name], best_seconds(run, repeats=3) / rounds)
    return dict(seconds=best["while"], known_seconds=best["known"], kernels=num_kernels(compiled), rounds=rounds)


def measure(rows: Rows, settings: Settings) -> None:
    shapes = ("tiny",) if settings.tiny else tuple(SHAPES)
    subjects = {shape: cache(partial(subject_of, shape, settings)) for shape in shapes}
    rounds = 4 if settings.tiny else ROUNDS
    for tree in TREES[:1] if settings.tiny else TREES:
        for shape, subject in subjects.items():

            def time_it(subject=subject, tree=tree) -> dict[str, Any]:
                return time_loops(subject(), tree, rounds)

            key = dict(shape=shape, implementation=settings.attention, length=min(contexts(settings)), tree=tree)
            rows.measure(time_it, what="round", flags=settings.variant, **key)
