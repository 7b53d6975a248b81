"""A batch under way: prefills, launch after launch, perhaps under changing trees, and what each did for each row."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jeagle.costs import Setting
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Batch, Decoder
from jeagle.disaggregated import Prefill
from jeagle.dispatch import PROBE_ROUNDS, Dispatcher
from jeagle.requests import Bucket
from jeagle.sharding import fetch
from jeagle.tree import OFF, StaticTree, tree_name

__all__ = ["Course", "Look", "capacities"]

log = logging.getLogger("jeagle")

SMALL_CAPACITY = 1024  # cache positions per row that are worth a program, and a copy of the cache, of their own
LEAST_ROUNDS = 8  # of a launch, for want of room: with less room than they may need caches grow


class Look(NamedTuple):
    """What the host sees after a launch."""

    finish_B: np.ndarray  # as in ``DecodeState``
    num_output_B: np.ndarray
    num_rounds_B: np.ndarray


def capacities(most: int, page_size: int) -> list[int]:
    """Cache positions per row to begin with, and to go on with as texts grow: whole pages, about half of the next, up
    to ``most``. Example: 1088, 2112 and 4224 for 4,224, and 1024 alone for 1,024.

    For CPUs: XLA can only multiply with whole arrays there (``tree_attention_xla.py``), and reads a small one faster
    than part of a large one: of 4,096 positions all but ten in 5.6 ms, 1,500 of them in 7.9
    (scripts/results/bench_attention_cpu_smollm2.json). Kernels read what is seen, and growing takes a copy.
    """
    found = [most]
    while found[0] >= 2 * SMALL_CAPACITY and (half := -(-found[0] // (2 * page_size)) * page_size) < found[0]:
        found.insert(0, half)
    return found


class Course:
    """One batch, from its prompts to its end.

    Args:
      program: with the plan to use throughout, or, with a dispatcher, any.
      dispatcher: None keeps to the program's plan.
      workers: fill in prompts, see ``disaggregated.py``; without any the decoder does.
    """

    def __init__(
        self,
        decoder: Decoder,
        program: Program,
        bucket: Bucket,
        dispatcher: Dispatcher | None = None,
        workers: Sequence[Decoder] = (),
    ):
        self.bucket = bucket
        self._shapes = dict(chunk=bucket.chunk, rows=bucket.rows)
        self._ahead: Prefill | None = None
        if workers:
            self._ahead = Prefill(decoder, workers, program, capacity=bucket.capacity, **self._shapes)
        self._decoder, self._program, self._dispatcher = decoder, program, dispatcher
        self._capacities = [bucket.capacity]
        if decoder.grows:
            self._capacities = capacities(bucket.capacity, decoder.page_size)
        self._longest = 0  # committed positions of the longest row that has not finished
        # Of the capacity to begin with: others would all be measured, which compiles all trees anew.
        filters = program.filters
        self._setting = Setting(bucket.batch, self._capacities[0], filters.sample, filters.filter)
        self._state: DecodeState | None = None
        self._counted: tuple[np.ndarray, ...] | None = None  # what the last look saw of this tree's counts
        self._most: int | None = None  # rounds that the tree was chosen for; None for any number
        self._held = 0  # and how many of them it has had
        self._refilled = False  # others have taken the places of rows that were done
        self._queued = False  # and more are to
        self.rounds_by_tree: dict[str, np.ndarray] = {}  # int [B] by the tree's name, of the rows that are seated
        self._served = Counter[str]()  # of all rows, and of a launch those of its longest
        self.acceptance_BP = np.zeros((bucket.batch, 1), int)  # as in ``DecodeState``, over all trees
        self.looked_BP = np.zeros((bucket.batch, 1), int)  # likewise
        if dispatcher is not None:
            dispatcher.prepare(decoder, program, self._setting)

    @property
    def state(self) -> DecodeState:
        """Before ``seat`` there is none."""
        if self._state is None:
            raise ValueError("nobody has been seated yet")
        return self._state

    @property
    def tree(self) -> str:
        """What ``RequestMetrics`` calls it."""
        if self._dispatcher is not None:
            return "dispatch"
        plan = self._program.plan
        return tree_name(plan if self._program.looks_up else dataclasses.replace(plan, lookup=0))

    @property
    def profile(self) -> tuple[float, ...] | None:
        """The acceptance that drafts were forced to, see ``verify.force``."""
        return self._program.profile

    def expect(self, prompts: Iterable[np.ndarray]) -> None:
        """Who will be seated, in order: workers begin with them."""
        if self._ahead is not None:
            self._ahead.expect(prompts)

    def seat(self, batch: Batch, places: np.ndarray, *, queued: bool = False) -> DecodeState:
        """Prefill the rows of ``batch`` that have ``places`` (int [n], ascending): all that are to be served, or after
        the first time such as take the places of finished ones. What is counted by row begins anew for them.

        The first launch's tree is chosen here: what begins plainly need not fill the head's cache.

        queued: whether more wait for places.
        """
        self._queued = queued
        fill = None if self._ahead is None else self._ahead.fill
        self._longest = max(self._longest, *batch.num_prompt_B)
        if self._state is None:
            self._choose()
            self._state = self._decoder.start(batch, self._program, capacity=self._roomy(), fill=fill, **self._shapes)
            return self._state
        self._refilled = True
        self._grow()
        self._state = self._decoder.refill(self._state, self._program, batch, places, fill=fill, **self._shapes)
        for counts in (*self.rounds_by_tree.values(), self.acceptance_BP, self.looked_BP, *(self._counted or ())):
            counts[places] = 0
        return self._state

    def advance(self, most_rounds: int, least_running: int = 1) -> Look:
        """One launch, under whichever tree is best now: up to ``most_rounds`` rounds, as long as ``least_running`` rows
        have not finished."""
        if self._held >= (self._most or PROBE_ROUNDS):  # streams, which launch single rounds, ask no more often
            self._choose()
        self._grow()
        rounds = most_rounds if self._most is None else min(most_rounds, self._most - self._held)
        if self._capacity < self.bucket.capacity:
            rounds = min(rounds, (self._capacity - self._longest) // self._program.num_path)
        self._held += rounds
        state = self._state = self._decoder.launch(self.state, self._program, rounds, least_running)
        look = state.finish_B, state.num_output_B, state.num_rounds_B
        counts = state.acceptance_BP, state.looked_BP, state.tried_BN, state.kept_BN
        look, counts, length_B = fetch((look, counts, state.length_B))
        self._count(*counts)
        seen = Look(*look)
        self._longest = int(length_B.max(where=seen.finish_B == 0, initial=0))
        # Where others took the places of those that had finished, nobody waited for the slowest.
        if self._dispatcher is not None and (seen.finish_B > 0).all() and not self._refilled:
            by_tree = {name: int(rounds_B.sum()) for name, rounds_B in self.rounds_by_tree.items()}
            drafted = 1 - by_tree.get(tree_name(OFF), 0) / max(1, sum(by_tree.values()))
            self._dispatcher.ended(self._setting, seen.num_output_B, seen.num_rounds_B, drafted)
        return seen

    def log(self) -> None:
        """Say which tree served how many rounds."""
        served = ", ".join(f"{rounds} {name}" for name, rounds in self._served.items())
        log.info("batch %d: rounds by tree: %s", self.bucket.batch, served or "none")

    def end(self, finish_B: np.ndarray) -> None:
        """Rows that the host has ended."""
        self._state = dataclasses.replace(self.state, finish_B=self._decoder.put(finish_B))

    @property
    def _capacity(self) -> int:
        return self.state.page_table_BM.shape[1] * self._decoder.page_size

    def _roomy(self) -> int:
        """The smallest capacity in which the next launch has room."""
        needed = self._longest + LEAST_ROUNDS * self._program.num_path
        return next((capacity for capacity in self._capacities if capacity >= needed), self.bucket.capacity)

    def _grow(self) -> None:
        """See to it that the next launch has room."""
        if self._capacity < (roomy := self._roomy()):
            self._state = self._decoder.grow(self.state, roomy)

    def _choose(self) -> None:
        """Take the tree of the next launch."""
        if self._dispatcher is None:
            return
        plan, self._most = self._dispatcher.choose(self._setting, self._queued)
        self._held = 0
        if plan != self._program.plan:
            new = dataclasses.replace(self._program, plan=plan)
            if self._state is not None:
                self._state = self._decoder.switch(self._state, self._program, new)
            self._program, self._counted = new, None

    def _count(self, *counts: np.ndarray) -> None:
        """Add what the last launch did: the state's counts run on until a switch."""
        before = self._counted or tuple(map(np.zeros_like, counts))
        self._counted = counts
        acceptance_BP, looked_BP, tried_BN, kept_BN = (now - then for now, then in zip(counts, before, strict=True))
        rounds_B = kept_BN[:, 0]
        if not rounds_B.any():
            return
        plan, name = self._program.plan, tree_name(self._program.plan)
        self.rounds_by_tree[name] = self.rounds_by_tree.get(name, 0) + rounds_B
        self._served[name] += int(rounds_B.max())
        self.acceptance_BP = _added(self.acceptance_BP, acceptance_BP)
        self.looked_BP = _added(self.looked_BP, looked_BP)
        if self._dispatcher is not None and isinstance(plan, StaticTree):
            of_all_rows = (x.sum(0) for x in (tried_BN, kept_BN, looked_BP))
            self._dispatcher.learn(self._setting, plan, int(rounds_B.max()), *of_all_rows)


def _added(histogram_BP: np.ndarray, more_BP: np.ndarray) -> np.ndarray:
    """Both histograms in one, as wide as the wider."""
    width = max(histogram_BP.shape[1], more_BP.shape[1])
    old_BP, new_BP = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (histogram_BP, more_BP))
    return old_BP + new_BP
