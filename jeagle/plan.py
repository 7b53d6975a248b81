"""What a model will need and how fast it can be at best, from its config alone: pure arithmetic, no weights, no GPU.

    round    =  a head forward per level of the tree  +  the verifying forward       (each as in ``jeagle/floor.py``)
    ms per token  =  round / tokens per call,       speed-up  =  plain forward / that

What nothing here can know, tokens per call, is the user's to say. ``Plan`` holds figures only: a compiled program's own
``memory``, ``all_reduces`` and ``kernels`` take the place of the estimates by ``dataclasses.replace``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jeagle.floor import Forward, Job, all_reduce_seconds, draft_forwards, target_forward
from jeagle.footprint import (
    FORMATS,
    PAGE_SIZE,
    Memory,
    PlanError,
    Split,
    cache_bytes,
    head_weights,
    num_bytes,
    target_weights,
    temp_bytes,
)

if TYPE_CHECKING:
    from jeagle.compile_only import Loop

__all__ = ["BATCHES", "Plan", "by_batch", "check_fits", "compiled_plan", "make_plan", "with_draft"]

BATCHES = tuple(2**i for i in range(9))  # 1 .. 256
LARGEST_BATCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of a job. Estimates, each of which a compiled program's figure may replace."""

    job: Job
    memory: Memory
    plain: Forward  # one token per row
    drafts: tuple[Forward, ...]  # one per level of the tree
    verify: Forward
    all_reduces: int  # per round, in one program
    collective_seconds: float | None = None  # of a round, where a compiled program's messages are known
    kernels: int | None = None  # launched per round; only a compiled program knows

    @cached_property
    def round_seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def seconds_per_token(self) -> float:
        """Of one row."""
        return self.round_seconds / self.job.tokens_per_call

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return self.job.batch / self.seconds_per_token

    @property
    def speed_up(self) -> float:
        """Over plain decoding of the same batch."""
        return self.plain.seconds / self.seconds_per_token

    @property
    def weight_floor(self) -> float:
        """Seconds per token that reading every weight once would take, were they spread evenly over all devices: no
        keys, no collectives, nothing read twice. The figure of published rooflines."""
        tree = self.job.tree
        return self._weight_seconds(1 if tree is None else tree.num_nodes) / self.job.tokens_per_call

    @property
    def plain_weight_floor(self) -> float:
        """The same of plain decoding."""
        return self._weight_seconds(1, drafts=False)

    def _weight_seconds(self, nodes: int, drafts: bool = True) -> float:
        whole = dataclasses.replace(self.job, split=Split(), batch=self.job.rows)
        read = target_forward(whole, "", nodes).weight_bytes
        if drafts and whole.head is not None:
            read += sum(d.weight_bytes for d in draft_forwards(whole))
        return read / self.job.device.bandwidth / self.job.split.tensor

    @property
    def terms(self) -> dict[str, float]:
        """Seconds of a round by what they are spent on, the longest first."""
        total: dict[str, float] = {}
        for forward in (*self.drafts, self.verify):
            for term, seconds in forward.terms.items():
                total[term] = total.get(term, 0.0) + seconds
        if self.collective_seconds is not None:
            total["collectives"] = self.collective_seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def binds(self) -> str:
        """The term that takes most of a round."""
        return next(iter(self.terms))

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.job.usable_bytes

    @cached_property
    def largest_batch(self) -> int:
        """The most rows of this context that fit, 0 if not one."""
        job, data = self.job, self.job.split.data
        most = _largest(LARGEST_BATCH, lambda n: _fits(dataclasses.replace(job, batch=n * data)))
        return most * data

    @cached_property
    def largest_context(self) -> int:
        """The most positions per row that fit with this batch, in whole pages or the model's max_position; 0 if no
        page does."""
        job, limit = self.job, self.job.target.max_position
        pages = _largest(
            -(-limit // PAGE_SIZE),
            lambda n: _fits(dataclasses.replace(job, context=min(n * PAGE_SIZE, limit))),
        )
        return min(pages * PAGE_SIZE, limit)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..limit that fits, where all smaller ones do too; 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _memory(job: Job) -> Memory:
    split, head = job.split, job.head
    rows, context, kept = job.rows, job.context, job.cache_format
    nodes = 1 if job.tree is None else job.tree.num_nodes
    return Memory(
        weights=num_bytes(target_weights(job.target, split), job.format),
        draft_weights=0 if head is None else num_bytes(head_weights(head, split), job.draft_format),
        cache=cache_bytes(job.target, split.tensor, kept, rows, context),
        draft_cache=0 if head is None else cache_bytes(head, split.of_draft.tensor, kept, rows, context),
        temp=temp_bytes(job.target, split.tensor, job.format, rows * nodes),
    )


def _fits(job: Job) -> bool:
    return _memory(job).total <= job.usable_bytes


def make_plan(job: Job) -> Plan:
    """The figures of a job, whether it fits or not. Raises PlanError where its split does not divide the models."""
    drafts = () if job.head is None else tuple(draft_forwards(job))
    plain = target_forward(job, "plain", 1)
    verify = plain if job.tree is None else target_forward(job, f"verify {job.tree.num_nodes}", job.tree.num_nodes)
    return Plan(
        job=job,
        memory=_memory(job),
        plain=plain,
        drafts=drafts,
        verify=verify,
        all_reduces=verify.all_reduces + sum(d.all_reduces for d in drafts),
    )


def compiled_plan(plan: Plan, loop: Loop) -> Plan:
    """``plan`` with the figures of its compiled decode loop in place of estimates."""
    memory = Memory(
        weights=loop.weights,
        draft_weights=loop.draft_weights,
        cache=loop.cache,
        draft_cache=loop.draft_cache,
        temp=loop.temp,
        measured=True,
    )
    seconds = sum(all_reduce_seconds(plan.job, message.bytes) for message in loop.collectives)
    return dataclasses.replace(
        plan,
        memory=memory,
        all_reduces=len(loop.collectives),
        collective_seconds=seconds,
        kernels=loop.kernels,
    )


def with_draft(job: Job) -> list[Plan]:
    """Plans of a job with its head split and with its head whole on every device, the faster first; one where that is
    the same. A head whose MLP or heads the tensor axis does not divide can only be whole."""
    if job.head is None or job.split.tensor == 1:
        return [make_plan(job)]
    plans = []
    for draft in ("tensor", "replicated"):
        try:
            plans.append(make_plan(dataclasses.replace(job, split=dataclasses.replace(job.split, draft=draft))))
        except PlanError:
            if draft == "replicated":
                raise
    return sorted(plans, key=lambda plan: (not plan.fits, plan.round_seconds))


def by_batch(job: Job, batches: Iterable[int] = BATCHES) -> list[Plan]:
    """A plan per batch, rounded up to what the data axis divides. Tokens per call are taken to stay what they are."""
    rounded = dict.fromkeys(-(-n // job.split.data) * job.split.data for n in batches)
    return [make_plan(dataclasses.replace(job, batch=n)) for n in rounded]


def check_fits(plan: Plan) -> None:
    """Raises PlanError, which says by how much a plan does not fit and what would."""
    if plan.fits:
        return
    job = plan.job
    over = plan.memory.total - job.usable_bytes
    ways = [*_fewer_rows(plan), *_more_devices(job), *_smaller_formats(job)]
    raise PlanError(
        f"{job.name} in {job.format.name} needs {_gb(plan.memory.total)} on each of {job.split.devices} "
        f"{job.device.name}, {_gb(over)} more than the {_gb(job.usable_bytes)} it may use "
        f"({_gb(job.device.memory_bytes)} x {job.memory_fraction:g}); "
        + (f"what fits: {'; '.join(ways)}" if ways else "no number of devices up to 64 and no format here helps")
    )


def _fewer_rows(plan: Plan) -> Iterator[str]:
    if plan.largest_batch:
        yield f"a batch of at most {plan.largest_batch}"
    if plan.largest_context:
        yield f"a context of at most {plan.largest_context:,}"


def _more_devices(job: Job) -> Iterator[str]:
    for tensor in (t for t in (2, 4, 8, 16, 32, 64) if t > job.split.tensor):
        try:
            fits = _fits(dataclasses.replace(job, split=dataclasses.replace(job.split, tensor=tensor)))
        except PlanError:
            continue
        if fits:
            yield f"{tensor * job.split.data} devices"
            return


def _smaller_formats(job: Job) -> Iterator[str]:
    for format in sorted(FORMATS.values(), key=lambda f: -f.bits):
        if format.runs and format.bits < job.format.bits and _fits(dataclasses.replace(job, format=format)):
            yield f"weights in {format.name}"
            return


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
