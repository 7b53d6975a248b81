"""Seconds per round by batch and tree: measured where the rounds run, read from a file, or modelled for absent devices.

A table is JSON: {"environment": {..}, "rounds": [{"batch": 8, "capacity": 256, "sampled": false, "seconds":
{"off": 0.031, "chain-3": 0.049}}]}. ``capacity`` is in cache positions per row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jeagle
from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder
from jeagle.distributed import of_first_process
from jeagle.host import described
from jeagle.sampling import RowSampling, SamplingParams, seed_keys
from jeagle.tree import OFF, StaticTree, parse_tree, tree_name

if TYPE_CHECKING:
    from jeagle.floor import Job

__all__ = [
    "CostTable",
    "Setting",
    "agreed",
    "environment_of",
    "file_name",
    "load_costs",
    "measure_rounds",
    "modelled_costs",
    "monotone",
    "save_costs",
]

MEASUREMENT = 2  # another number for another way to measure: what is kept of the old one is not read again
LAUNCHES, ROUNDS = 5, 8  # that each program is timed over, after one more launch of one round
ENOUGH = 0.25  # seconds of a launch: where rounds take long, fewer tell as much


@dataclass(frozen=True, order=True)
class Setting:
    """What a round costs depends on, but for the tree."""

    batch: int
    capacity: int  # cache positions per row
    sampled: bool  # whether the program can draw samples
    filtered: bool = False  # and whether it looks for the likely tokens first (top-k, top-p, min-p)

    def distance(self, other: Setting) -> tuple[float, float, bool, bool]:
        """How unlike another one: in batch above all, by factors."""
        batch, capacity = (
            abs(math.log2(a / b)) for a, b in ((self.batch, other.batch), (self.capacity, other.capacity))
        )
        return batch, capacity, self.sampled != other.sampled, self.filtered != other.filtered


@dataclass(frozen=True)
class CostTable:
    """Seconds per round as they were measured; what is read of it is monotone."""

    rounds: dict[Setting, dict[StaticTree, float]] = field(default_factory=dict)

    def seconds(self, setting: Setting) -> dict[StaticTree, float]:
        """Of every tree measured in ``setting``, made monotone over its batches and trees."""
        alike = [s for s in self.rounds if dataclasses.replace(s, batch=setting.batch) == setting]
        cells = [(s, plan) for s in alike for plan in self.rounds[s]]
        sizes = np.array([(s.batch, plan.num_nodes, plan.max_depth, len(plan.levels)) for s, plan in cells])
        smooth = monotone(sizes, np.array([self.rounds[s][plan] for s, plan in cells]))
        return {plan: float(value) for (s, plan), value in zip(cells, smooth) if s == setting}

    def rows(self) -> list[dict[str, Any]]:
        """As in the file."""
        return [
            {**dataclasses.asdict(setting), "seconds": {tree_name(plan): value for plan, value in seconds.items()}}
            for setting, seconds in sorted(self.rounds.items(), key=lambda row: row[0])
        ]

    def nearest(self, setting: Setting) -> Setting:
        """The setting of the table that is most like ``setting``."""
        return min(self.rounds, key=setting.distance)


def monotone(sizes_nk: np.ndarray, value_n: np.ndarray) -> np.ndarray:
    """``value_n`` such that what is larger in no size costs no more: the middle between the largest value among all
    that are no larger and the smallest among all that are no smaller. What is in order already stays as it is.

    Example: sizes 1, 2, 3 with values 5, 4, 6 become 4.5, 4.5, 6.
    """
    no_larger_nn = (sizes_nk[None, :, :] <= sizes_nk[:, None, :]).all(-1)  # [i, j]: j is no larger than i
    lower_n = np.where(no_larger_nn, value_n[None, :], -np.inf).max(1)
    upper_n = np.where(no_larger_nn.T, value_n[None, :], np.inf).min(1)
    return (lower_n + upper_n) / 2


def measure_rounds(decoder: Decoder, program: Program, plans: Iterable[StaticTree], setting: Setting) -> dict:
    """Seconds of a round of ``program`` under each plan: the median over launches, the plans in turn. Nothing is looked
    up, so that the head drafts in every round of a plan that has one.

    The programs are those that serve, less what a request asks for beside its tokens. Rows hold random tokens, and
    zeros for a context of half the capacity: what a round costs does not depend on what it says (of routed experts,
    random tokens ask for more than a text would).
    """
    # All later requests are decided by what the first one's are measured at.
    program = dataclasses.replace(program, num_logprobs=None, profile=None)
    programs = {plan: dataclasses.replace(program, plan=plan) for plan in plans}
    off = dataclasses.replace(program, plan=OFF)
    B, context = setting.batch, setting.capacity // 2
    rng = np.random.default_rng(0)
    # Kernels skip the filters that no row has.
    filters: Any = dict(top_k=50, top_p=0.9, min_p=0.01) if setting.filtered else {}
    params = SamplingParams(temperature=1.0 if setting.sampled else 0.0, **filters)
    batch = Batch(
        list(rng.integers(0, decoder.target_config.vocab_size, (B, 1)).astype(np.int32)),
        RowSampling.stack([params] * B, seed_keys(0, B)),
        np.full((B, 4), -1, np.int32),
        np.full(B, np.iinfo(np.int32).max // 2, np.int32),
    )
    state = decoder.first_state(decoder.empty_caches(B, off, setting.capacity), batch, off, setting.capacity)
    state = dataclasses.replace(state, lookup_B=decoder.put(np.zeros(B, bool)))
    spent: dict[StaticTree, list[float]] = {plan: [] for plan in programs}
    rounds = dict.fromkeys(spent, 1)
    for launch in range(-2, LAUNCHES):  # the first one compiles, the second says how many rounds are enough
        for plan, each in programs.items():
            state = decoder.switch(state, off, each)
            if state.draft is not None:
                seen = dataclasses.replace(state.draft, start_B=decoder.put(np.zeros(B, np.int32)))
                state = dataclasses.replace(state, draft=seen)
            length_B, none_B = decoder.put(np.full(B, context, np.int32)), decoder.put(np.zeros(B, np.int32))
            state = jax.block_until_ready(dataclasses.replace(state, length_B=length_B, num_output_B=none_B))
            began = time.perf_counter()
            state = jax.block_until_ready(decoder.launch(state, each, rounds[plan]))
            spent[plan].append((time.perf_counter() - began) / rounds[plan])
            state = decoder.switch(state, each, off)
        if launch == -1:
            for plan, seconds in zip(rounds, agreed([found[-1] for found in spent.values()])):
                most = min(ROUNDS, (setting.capacity - context) // (plan.max_depth + 1))
                rounds[plan] = max(1, min(most, int(ENOUGH / seconds)))
    return {plan: float(np.median(seconds[-LAUNCHES:])) for plan, seconds in spent.items()}


def modelled_costs(job: Job, plans: Iterable[StaticTree], batches: Iterable[int]) -> CostTable:
    """A table of rooflines (``jeagle/floor.py``), the expected number of unique experts among them: what to begin with
    where nothing has been measured. ``job`` says all but tree and batch, and must have a head."""
    from jeagle.plan import make_plan  # every start of ``LLM`` would pay for what few ask

    rounds: dict[Setting, dict[StaticTree, float]] = {}
    plans = tuple(plans)
    for batch in batches:
        seconds = {}
        for plan in plans:
            changes: dict[str, Any] = dict(batch=batch, tree=plan, tokens_per_call=1.0)
            if plan == OFF:
                changes |= dict(head=None, tree=None)
            seconds[plan] = make_plan(dataclasses.replace(job, **changes)).round_seconds
        rounds[Setting(batch, job.context, False)] = seconds
    return CostTable(rounds)


def environment_of(decoder: Decoder, program: Program) -> dict[str, Any]:
    """All that measured seconds depend on and ``Setting`` does not say."""
    layout, head = decoder.layout, decoder.head_config
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return dict(
        device=device.device_kind,
        host=described() if device.platform == "cpu" else None,
        mesh=None if layout is None else dict(layout.mesh.shape),
        rules=None if layout is None else dataclasses.asdict(layout.rules),
        jax=jax.__version__,
        jeagle=f"{jeagle.__version__}.{MEASUREMENT}",
        target=_digest(decoder.target_config.to_json()),
        head=None if head is None else _digest(head.to_json()),
        dtypes=[sorted({str(x.dtype) for x in jax.tree.leaves(params)}) for params in decoder.params],
        kv_cache_dtype=str(decoder.kv_cache_dtype),
        page_size=decoder.page_size,
        attention=program.attention,
        sampler=program.sampler,
    )


def file_name(environment: dict[str, Any]) -> str:
    """Of the table for this environment."""
    return f"{_digest(environment)}.json"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def save_costs(path: Path, table: CostTable, environment: dict[str, Any]) -> None:
    """Written whole or not at all: processes may share the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{secrets.token_hex(8)}")
    text = json.dumps(dict(environment=environment, rounds=table.rows()), indent=1) + "\n"
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_costs(path: str | Path) -> CostTable:
    """Raises ValueError with one sentence where the file is missing or no table."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rounds"]
        rounds = {
            Setting(
                int(row["batch"]), int(row["capacity"]), bool(row["sampled"]), bool(row.get("filtered", False))
            ): _seconds(row["seconds"])
            for row in rows
        }
    except FileNotFoundError:
        raise ValueError(f"the cost table {path} does not exist") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a cost table ({type(error).__name__}: {error}); remove it") from None
    if not rounds or any(min(s.batch, s.capacity) < 1 for s in rounds):
        raise ValueError(f"{path} is not a cost table (no rounds of at least one row); remove it")
    return CostTable(rounds)


def _seconds(row: dict[str, float]) -> dict[StaticTree, float]:
    seconds = {}
    for name, value in row.items():
        plan = parse_tree(name)
        if not isinstance(plan, StaticTree) or not 0 < float(value) < math.inf:
            raise ValueError(f"{name!r} takes {value!r} s")
        seconds[plan] = float(value)
    return seconds


def agreed(values: Sequence[float]) -> list[float]:
    """Process 0's numbers on every process: all must decide alike."""
    return of_first_process(np.array(values, np.float32)).tolist()
