"""The choice of the draft tree by measurement: most expected tokens per second, plain decoding among the candidates.

    value of a tree  =  expected tokens per call (``acceptance.py``) / seconds per round (``costs.py``) * evenness

Where all rows of a round look their drafts up, the head does not draft, and the round takes as long as that of lookups
alone (``seconds_with_lookups``).

A batch ends with its slowest row. Drafts are kept more often in some rows than in others, so a batch that drafts runs
on for a few rows where a plain one would be done: evenness (``acceptance.py``) is the share that this leaves. Where
others wait to take the places of rows that are done, it is 1.

Decided per batch and again between launches, on finished rounds; the text never depends on it. All that enters a
decision is the same on every process, so all decide alike.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jeagle.acceptance import Acceptance, Rates
from jeagle.costs import (
    CostTable,
    Setting,
    agreed,
    environment_of,
    file_name,
    load_costs,
    measure_rounds,
    save_costs,
)
from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.host import like_here
from jeagle.tree import OFF, StaticTree, TreePlan, parse_tree, tree_name
from jeagle.tree_table import Plans, TreeTable

__all__ = [
    "CANDIDATES",
    "PROBE_ROUNDS",
    "Choice",
    "Dispatch",
    "Dispatcher",
    "asked_tree",
    "plans_of",
    "seconds_with_lookups",
]

log = logging.getLogger("jeagle")

CANDIDATES = tuple(f"{tree}+lookup" for tree in ("chain-1", "chain-2", "chain-3", "chain-5", "bush-8"))
PROBE_ROUNDS = 8  # of a probe, of a tree's first launch, and at least between two switches
KNOWN_TRIES = 64  # of first drafts: with fewer nothing is known of a head that comes without a table


@dataclass(frozen=True)
class Dispatch:
    """What may be chosen, and how readily. ``LLM(tree=Dispatch(candidates=["chain-2", "bush-8"]))``

    Args:
      candidates: static trees, by name, as paths or as plans; "off" is always one. None: those of ``trees``, else
        CANDIDATES. Each is compiled for every batch size in use, to be measured.
      trees: what was searched for the head (``tree_table.py``): candidates and how often they are taken at first. None:
        the head's own, where ``LLM`` finds one beside it.
      costs: a table or its file, of which the nearest batch counts; None measures each batch size when it first comes
        up, and keeps the seconds in the cache directory.
      gain: what a tree must promise over plain decoding, and over the tree it takes over from, as a share of tokens per
        second. Going back to plain decoding asks for none: it is what drafting is judged by.
      probe_share: of the time, to look at trees that are not in use.
      half_life: see ``Acceptance``.

    Raises ValueError for dynamic trees, whose nodes are not the same in every round, and for numbers out of range.
    """

    candidates: Sequence[str | StaticTree | Sequence[Sequence[int]]] | None = None
    trees: TreeTable | None = None
    costs: CostTable | str | Path | None = None
    gain: float = 0.05
    probe_share: float = 0.01
    half_life: float = 400.0

    def __post_init__(self) -> None:
        if self.candidates is not None and not isinstance(self.candidates, (list, tuple)):
            raise ValueError(f"candidates must be a list of trees, got {self.candidates!r}")
        for plan in map(parse_tree, self.candidates or ()):
            if not isinstance(plan, StaticTree):
                raise ValueError(
                    f"candidate {tree_name(plan)} is a dynamic tree; only static ones can be chosen between"
                )
        numbers = self.gain, self.probe_share, self.half_life
        if not all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers):
            raise ValueError(f"gain, probe_share and half_life must be numbers, got {numbers}")
        if not self.gain >= 0 or not 0 <= self.probe_share < 1 or not self.half_life > 0:
            raise ValueError(
                f"gain must be 0 or more, probe_share in 0..1 and half_life above 0, got {self.gain}, "
                f"{self.probe_share} and {self.half_life}"
            )

    @property
    def plans(self) -> tuple[StaticTree, ...]:
        """The candidates, each once, plain decoding first."""
        given = self.candidates
        if given is None:
            given = CANDIDATES
            if self.trees is not None:
                given = (*self.trees.greedy.candidates, *self.trees.sampled.candidates)
        parsed = [plan for plan in map(parse_tree, given) if isinstance(plan, StaticTree)]
        return tuple(dict.fromkeys([OFF, *parsed]))


class Choice(NamedTuple):
    plan: StaticTree
    rounds: int | None  # of its launch at most; None for any number


@dataclass
class Seat:
    """The tree in use in one setting."""

    plan: StaticTree
    rounds: int = 0  # since it was chosen, probes among them


class Dispatcher:
    """Costs, statistics and the trees in use, over all batches of an ``LLM``. Safe to share between threads.

    While a tree is in use nothing is learnt about nodes that it does not have; while none is, about none at all. So
    every round in use earns ``probe_share`` of its seconds, and when they pay for what PROBE_ROUNDS rounds of another
    tree may lose, one is run for so long: those that have nodes the one in use lacks take turns, unless they would lose
    even if all they draft were taken. What they may lose is their time over that of one token a round, the least they
    yield. As long as nothing is known of the head, probes are free.

    What a probe in mid-text costs in acceptance, as a head that comes back remembers nothing, is counted against the
    tree: short texts, whose probes begin with them, are judged more truly than long ones.
    """

    def __init__(self, dispatch: Dispatch, *, directory: Path | None = None):
        """directory: where measured costs are kept; None keeps none."""
        self.plans = dispatch.plans
        # Of no candidate, but needed to judge them: rounds in which all rows look up.
        self._timed = tuple(dict.fromkeys((*self.plans, *(_alone(plan) for plan in self.plans if plan.lookup))))
        self._options = dispatch
        self._directory = directory
        given = dispatch.costs
        self._given = given if given is None or isinstance(given, CostTable) else load_costs(given)
        if self._given is not None:
            lacking = {tree_name(p) for row in self._given.rounds.values() for p in self.plans if p not in row}
            if lacking or not self._given.rounds:
                raise ValueError(f"the cost table lacks {', '.join(sorted(lacking)) or 'all rows'}; measure it again")
        self._table = self._given or CostTable()  # what decisions are made of: settings in use, alike on every process
        self._stored: CostTable | None = None  # the directory's table, once read; process 0 alone has one
        self._seconds: dict[Setting, dict[StaticTree, float]] = {}  # what ``seconds`` has worked out
        # Greedy and sampled texts are not guessed equally well.
        trees = dispatch.trees
        priors: dict[bool, Rates | None] = {False: None, True: None}
        if trees is not None:
            priors = {False: trees.greedy.rates, True: trees.sampled.rates}
        self.acceptance = {
            sampled: Acceptance(self.plans, half_life=dispatch.half_life, prior=prior)
            for sampled, prior in priors.items()
        }
        self._tries_to_know = KNOWN_TRIES if dispatch.trees is None else 0
        self._tries = {False: 0, True: 0}  # of first drafts, greedy and sampled
        self._seats: dict[Setting, Seat] = {}
        self._served = dict.fromkeys(self.plans, 0)  # rounds, in any setting
        self._credit = 0.0  # seconds earned for probes
        self._turn = 0
        self._lock = threading.RLock()

    def prepare(self, decoder: Decoder, program: Program, setting: Setting) -> None:
        """See to it that rounds of ``program`` have costs in ``setting``: read, or measured, which compiles every
        candidate and takes seconds. ``program``'s plan does not matter."""
        with self._lock:
            if self._given is not None or setting in self._seats:
                return
            environment = environment_of(decoder, program)
            path = None if self._directory is None else self._directory / file_name(environment)
            stored = self._stored = self._stored or _read(path)
            row = stored.rounds.get(setting, {})
            known = agreed([row.get(plan, np.nan) for plan in self._timed])
            if np.isnan(known).any():
                log.info("measuring %d trees at batch %d", len(self._timed), setting.batch)
                measured = measure_rounds(decoder, program, self._timed, setting)
                known = agreed([measured[plan] for plan in self._timed])
                stored.rounds.update(_read(path).rounds)  # what other processes have measured meanwhile
                stored.rounds[setting] = {**stored.rounds.get(setting, {}), **measured}
                if path is not None and jax.process_index() == 0:
                    _save(path, stored, environment)
            self._table.rounds[setting] = dict(zip(self._timed, known))
            self._seconds.clear()

    def seconds(self, setting: Setting) -> dict[StaticTree, float]:
        """Of a round under each candidate, and of lookups alone where they have been timed."""
        if setting not in self._seconds:
            seconds = self._table.seconds(setting if self._given is None else self._table.nearest(setting))
            self._seconds[setting] = {plan: seconds[plan] for plan in self._timed if plan in seconds}
        return self._seconds[setting]

    def values(self, setting: Setting, refilled: bool = False) -> dict[StaticTree, float]:
        """Expected tokens per second of each row under each candidate, over a batch's whole course."""
        rates = self.acceptance[setting.sampled].rates
        seconds = seconds_with_lookups(self.seconds(setting), rates.lookup_share**setting.batch)

        def evenness(plan: StaticTree) -> float:
            return 1.0 if refilled else rates.evenness(plan, setting.batch)

        return {plan: rates.tokens(plan) / seconds[plan] * evenness(plan) for plan in self.plans}

    def choose(self, setting: Setting, refilled: bool = False) -> Choice:
        """The tree of the next launch. refilled: others take the places of rows that are done."""
        with self._lock:
            values = self.values(setting, refilled)
            seat = self._seat(setting, values)
            probe = self._probe(setting, seat, values[seat.plan])
            if probe is not None:
                log.debug("batch %d: probing %s", setting.batch, tree_name(probe))
                return Choice(probe, PROBE_ROUNDS)
            # What has never run is believed on the prior alone: look again soon.
            proven = self._served[seat.plan] >= PROBE_ROUNDS or seat.plan == OFF
            return Choice(seat.plan, None if proven else PROBE_ROUNDS)

    def learn(
        self,
        setting: Setting,
        plan: StaticTree,
        rounds: int,
        tried_N: np.ndarray,
        kept_N: np.ndarray,
        looked_P: np.ndarray | None = None,
    ) -> None:
        """What a finished launch of ``rounds`` rounds counted, summed over its rows; as ``Acceptance.add``."""
        with self._lock:
            self.acceptance[setting.sampled].add(plan, tried_N, kept_N, looked_P)
            self._served[plan] += rounds
            if plan.levels:
                self._tries[setting.sampled] += int(tried_N[1])
            seat = self._seats[setting]
            seat.rounds += rounds
            if plan == seat.plan:
                self._credit += self._options.probe_share * rounds * self.seconds(setting)[plan]

    def ended(self, setting: Setting, num_output_B: np.ndarray, num_rounds_B: np.ndarray, drafted: float) -> None:
        """A batch is done whose rows nobody took over; as ``Acceptance.ended``."""
        with self._lock:
            self.acceptance[setting.sampled].ended(num_output_B, num_rounds_B, drafted)

    def _seat(self, setting: Setting, value: Mapping[StaticTree, float]) -> Seat:
        """The seat, given to the best tree if that is worth a switch."""
        gain = 1 + self._options.gain
        best = max(value, key=lambda plan: value[plan])
        if value[best] < gain * value[OFF]:
            best = OFF
        seat = self._seats.get(setting)
        if seat is None:
            reason = "at first"
        elif (
            best != seat.plan
            and seat.rounds >= PROBE_ROUNDS
            and value[best] >= (1 if best == OFF else gain) * value[seat.plan]
        ):
            reason = f"instead of {tree_name(seat.plan)}, after {seat.rounds} rounds"
        else:
            return seat
        log.info(
            "batch %d%s: %s %s, %.2fx plain expected",
            setting.batch,
            ", sampled" if setting.sampled else "",
            tree_name(best),
            reason,
            value[best] / value[OFF],
        )
        seat = self._seats[setting] = Seat(best)
        return seat

    def _probe(self, setting: Setting, seat: Seat, enough: float) -> StaticTree | None:
        """A tree that has something to teach, if one is due and paid for. enough: the value of the one in use."""
        known, seconds = _cells(seat.plan), self.seconds(setting)
        others = [p for p in self.plans if not _cells(p) <= known and (p.max_depth + 1) / seconds[p] > enough]
        if not others or not self._options.probe_share:
            return None
        drafting = [p for p in others if p.levels]
        if drafting and not seat.plan.levels and self._tries[setting.sampled] < self._tries_to_know:
            return max(drafting, key=lambda p: p.max_depth)
        plan = others[self._turn % len(others)]
        price = PROBE_ROUNDS * max(0.0, seconds[plan] - 1 / enough)  # counting on one token a round
        if self._credit < price:
            return None
        self._credit -= price
        self._turn += 1
        return plan


def asked_tree(tree: str | TreePlan | Sequence[Sequence[int]] | Dispatch) -> TreePlan | Dispatch | None:
    """What ``LLM(tree=...)`` means; None for "auto". Raises ValueError for what is no tree."""
    if isinstance(tree, Dispatch) or (isinstance(tree, str) and tree == "auto"):
        return tree if isinstance(tree, Dispatch) else None
    return Dispatch() if isinstance(tree, str) and tree == "dispatch" else parse_tree(tree)


def plans_of(
    asked: TreePlan | Dispatch | None, head: Path | None, devices: tuple[int, int], costs: Path
) -> tuple[Plans, Dispatcher | None]:
    """What to draft with a head, and who chooses between trees, if anyone.

    asked: by ``asked_tree``. head: its directory, where ``trees.json`` may lie; None for a module. devices: how many
    share the rows and a layer. costs: where a dispatcher keeps what it has measured.
    """
    if isinstance(asked, TreePlan):
        return Plans.always(asked), None
    searched = None if head is None else TreeTable.of_head(head)
    if isinstance(asked, Dispatch):
        if asked.trees is None:
            asked = dataclasses.replace(asked, trees=searched)
        dispatcher = Dispatcher(asked, directory=costs)
        # The largest, of those that draft if any does: what is prepared for it serves all.
        return Plans.always(max(dispatcher.plans, key=lambda p: (bool(p.levels), p.num_nodes))), dispatcher
    if searched is not None and like_here(searched.device) and searched.devices == devices:
        return Plans(searched.greedy.best, searched.sampled.best), None
    # Of a head that brings no trees of its own, or of other devices.
    return Plans.always(parse_tree("chain-1+lookup" if jax.default_backend() == "cpu" else "chain-3+lookup")), None


def _read(path: Path | None) -> CostTable:
    """A table kept by an earlier process; an empty one if there is none, or a damaged one."""
    if path is not None and path.exists() and jax.process_index() == 0:
        try:
            return load_costs(path)
        except ValueError as error:
            log.warning("%s: measuring again", error)
    return CostTable()


def _save(path: Path, table: CostTable, environment: dict[str, Any]) -> None:
    """Where that is possible: with a disk that is full or read only, what was measured serves this process."""
    try:
        save_costs(path, table, environment)
    except OSError as error:
        log.warning("%s cannot be written (%s): another process will have to measure again", path, error)


def seconds_with_lookups(seconds: Mapping[StaticTree, float], all_look_up: float) -> dict[StaticTree, float]:
    """Of a round under each plan, where in a share ``all_look_up`` of the rounds no row asks the head."""
    return {
        plan: s - all_look_up * max(0.0, s - seconds.get(_alone(plan), s)) if plan.lookup else s
        for plan, s in seconds.items()
    }


def _alone(plan: StaticTree) -> StaticTree:
    """The plan's lookups, without its tree."""
    return StaticTree((), plan.lookup)


def _cells(plan: StaticTree) -> set[tuple[int, int]]:
    """Depth and rank of every node, and depth and -1 of what is looked up."""
    return {(len(path), path[-1]) for path in plan.paths} | {(depth, -1) for depth in range(1, plan.lookup + 1)}
