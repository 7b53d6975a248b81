"""A plan for people: tables on the terminal and a picture over batch sizes. Computes nothing of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jeagle.floor import Forward
from jeagle.footprint import PlanError
from jeagle.plan import Plan
from jeagle.published import LARGE_BATCH_SPEED_UP, MEASURED, Measured
from jeagle.sizes import SIZES

__all__ = ["as_json", "print_plan", "save_picture"]


def _optional(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise PlanError(f"{package} is not installed; run: pip install 'jeagle[plan]'") from None


def print_plan(plans: Sequence[Plan], by_batch: Sequence[Plan], notes: Sequence[str]) -> None:
    """plans: the plan and, where there is a choice, the one with the head laid out otherwise."""
    console = _optional("rich.console").Console(highlight=False, width=_width())
    plan, job = plans[0], plans[0].job
    mesh = f" ({job.split.data} data x {job.split.tensor} tensor)" if job.split.devices > 1 else ""
    console.print(
        f"[bold]{job.name}[/], {job.format.name}, {job.split.devices} x {job.device.name}{mesh}, batch {job.batch}, "
        f"context {job.context:,}, caches {job.cache_format.name}"
    )
    console.print(_memory_table(plan), _time_table(plan), _batch_table(by_batch))
    for line in [*_verdict(plans), *_comparisons(by_batch), *notes, f"device: {'; '.join(job.device.sources)}"]:
        console.print(f"- {line}", markup=False, soft_wrap=True)


def _width() -> int | None:
    """Of a file or a pipe what the tables need, of a terminal its own."""
    return None if sys.stdout.isatty() else 100


def _table(title: str, *columns: str) -> Any:
    table = _optional("rich.table").Table(title=title, title_justify="left", box=_optional("rich.box").SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _memory_table(plan: Plan) -> Any:
    memory, job = plan.memory, plan.job
    table = _table(
        "memory of each device, GB", "weights", "head", "cache", "head's cache", "temporary", "all", "usable"
    )
    parts = (memory.weights, memory.draft_weights, memory.cache, memory.draft_cache, memory.temp, memory.total)
    table.add_row(*(f"{n / 1e9:.3f}" for n in parts), f"{job.usable_bytes / 1e9:.1f}")
    return table


def _time_table(plan: Plan) -> Any:
    share = "" if plan.job.efficiency == 1 else f" at {plan.job.efficiency:.0%} of the peaks"
    table = _table(
        f"floor of each forward, ms{share}",
        "forward",
        "read GB",
        "weights",
        "KV",
        "compute",
        "all-reduces",
        "links",
        "all",
        "binds",
    )
    forwards = [plan.plain, *plan.drafts, *([plan.verify] if plan.drafts else [])]
    for forward in forwards:
        table.add_row(*_time_row(forward))
    if plan.drafts:
        table.add_row("round", *[""] * 4, str(plan.all_reduces), "", _ms(plan.round_seconds), plan.binds)
    return table


def _time_row(forward: Forward) -> list[str]:
    return [
        forward.name,
        f"{forward.weight_bytes / 1e9:.3f}",
        _ms(forward.weights),
        _ms(forward.kv),
        _ms(forward.compute),
        str(forward.all_reduces),
        _ms(forward.collectives),
        _ms(forward.seconds),
        max(forward.terms, key=forward.terms.__getitem__),
    ]


def _batch_table(plans: Sequence[Plan]) -> Any:
    table = _table(
        "by batch", "batch", "plain ms/token", "ms/token", "speed-up", "tokens/s", "binds", "GB a device", "fits"
    )
    for plan in plans:
        table.add_row(
            str(plan.job.batch),
            _ms(plan.plain.seconds),
            _ms(plan.seconds_per_token),
            f"{plan.speed_up:.2f}",
            f"{plan.tokens_per_second:,.0f}",
            plan.binds,
            f"{plan.memory.total / 1e9:.1f}",
            "yes" if plan.fits else "no",
        )
    return table


def _verdict(plans: Sequence[Plan]) -> list[str]:
    plan, job = plans[0], plans[0].job
    lines = [
        f"{_ms(plan.seconds_per_token)} ms/token, {plan.tokens_per_second:,.0f} tokens/s"
        + (f", {plan.speed_up:.2f}x of plain" if plan.drafts else "")
        + f"; most of it is {plan.binds}; the weights alone, read once, take {_ms(plan.weight_floor)} ms/token",
        f"at most a batch of {plan.largest_batch:,} at this context, or a context of {plan.largest_context:,} at this "
        "batch",
    ]
    if len(plans) > 1:
        lines.append(
            "head: "
            + "; ".join(
                f"{p.job.split.draft} {_ms(p.round_seconds)} ms/round and {p.memory.total / 1e9:.1f} GB" for p in plans
            )
            + f"; {job.split.draft} is taken"
        )
    if job.split.tensor > job.device.per_machine:
        lines.append(
            f"a tensor axis of {job.split.tensor} leaves the machine of {job.device.per_machine}: its all-reduces will "
            "take longer than an NVLink's, which are counted here"
        )
    if not plan.memory.measured:
        lines.append(
            "temporary memory is an estimate of greedy decoding's; prefill and sampling take of the unused part"
        )
    return lines


def _comparisons(by_batch: Sequence[Plan]) -> list[str]:
    """Published speeds beside the plan of one row, and Meta's speed-ups beside those of larger batches."""
    lines = []
    one = next((plan for plan in by_batch if plan.job.batch == 1), None)
    if one is not None:
        for found in MEASURED:
            if _same(found, one) and (found.tokens_per_call == 1 or one.drafts):
                seconds = one.plain.seconds if found.tokens_per_call == 1 else one.seconds_per_token
                floor = one.plain_weight_floor if found.tokens_per_call == 1 else one.weight_floor
                lines.append(
                    f"measured: {found.who}: {_ms(found.seconds_per_token)} ms/token at {found.tokens_per_call:g} "
                    f"tokens per call, {found.seconds_per_token / seconds:.1f}x this plan at batch 1 and "
                    f"{found.seconds_per_token / floor:.1f}x the weights' floor"
                )
    large = [plan for plan in by_batch if plan.job.batch >= 8 and plan.drafts]
    if large:
        low, high = LARGE_BATCH_SPEED_UP
        fitting = [p for p in large if p.fits] or large
        inside = [str(p.job.batch) for p in fitting if low <= p.speed_up <= high]
        lines.append(
            f"Meta (arXiv:2508.08192) reports {low:g} to {high:g}x at large batches; this plan is "
            f"{min(p.speed_up for p in fitting):.2f} to {max(p.speed_up for p in fitting):.2f}x for batches of "
            f"{fitting[0].job.batch} to {fitting[-1].job.batch}{' that fit' if fitting is not large else ''}, "
            f"within that range at {', '.join(inside) or 'none'}"
        )
    return lines


def _same(found: Measured, plan: Plan) -> bool:
    job = plan.job
    here = (job.device.name, job.split.devices, job.target, job.format.bits)
    return here == (found.gpu, found.devices, SIZES[found.model], found.bits)


def save_picture(path: Path, by_batch: Sequence[Plan]) -> None:
    """ms per token and speed-up over batch sizes; what does not fit is hollow. Raises PlanError without matplotlib."""
    figure_module = _optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    drafts = bool(by_batch[0].drafts)
    times, *rest = figure.subplots(1, 2, squeeze=False)[0] if drafts else [figure.subplots()]
    job = by_batch[0].job
    batches = [plan.job.batch for plan in by_batch]

    def draw(axes: Any, values: list[float], label: str, colour: str) -> None:
        axes.plot(batches, values, color=colour, label=label, linewidth=1.5)
        for plan, value in zip(by_batch, values, strict=True):
            face = colour if plan.fits else "white"
            axes.plot([plan.job.batch], [value], "o", color=colour, markerfacecolor=face, markersize=6)

    draw(times, [p.plain.seconds * 1e3 for p in by_batch], "plain", "tab:gray")
    for ratios in rest:
        draw(times, [p.seconds_per_token * 1e3 for p in by_batch], "with drafts", "tab:blue")
        draw(ratios, [p.speed_up for p in by_batch], "this plan", "tab:blue")
        ratios.set(
            title=f"speed-up over plain, {job.tokens_per_call:g} tokens per call", ylabel="times", ylim=(0, None)
        )
        ratios.axhspan(*LARGE_BATCH_SPEED_UP, color="tab:orange", alpha=0.2, label="Meta's, large batches")
    one = next((plan for plan in by_batch if plan.job.batch == 1), None)
    shown = [m for m in MEASURED if one is not None and _same(m, one) and (m.tokens_per_call == 1 or drafts)]
    for found, marker in zip(shown, "*PXD", strict=False):
        colour = "tab:gray" if found.tokens_per_call == 1 else "tab:orange"
        times.plot([1], [found.seconds_per_token * 1e3], marker, color=colour, markersize=11, label=found.who)
    times.set(title="time of a row's token", ylabel="ms per token", yscale="log")
    for set_formatter in (times.yaxis.set_major_formatter, times.yaxis.set_minor_formatter):
        set_formatter(_optional("matplotlib.ticker").LogFormatter())  # 60, not 6 x 10^1
    for axes in (times, *rest):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.set_xlabel("batch (hollow: does not fit)")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.suptitle(
        f"{job.name}, {job.format.name}, {job.split.devices} x {job.device.name}, context {job.context:,}: "
        + ("the floor" if job.efficiency == 1 else f"at {job.efficiency:.0%} of the peaks")
    )
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # of a suffix that matplotlib does not write
        raise PlanError(f"cannot write {path}: {error}") from None


def as_json(plan: Plan, by_batch: Sequence[Plan]) -> dict[str, Any]:
    """The figures, bytes and seconds, for other programs."""

    def one(plan: Plan) -> dict[str, Any]:
        memory = {name: getattr(plan.memory, name) for name in plan.memory.__dataclass_fields__}
        return dict(
            batch=plan.job.batch,
            memory=memory | dict(total=plan.memory.total, usable=plan.job.usable_bytes),
            fits=plan.fits,
            round_seconds=plan.round_seconds,
            seconds_per_token=plan.seconds_per_token,
            plain_seconds_per_token=plan.plain.seconds,
            speed_up=plan.speed_up,
            tokens_per_second=plan.tokens_per_second,
            binds=plan.binds,
            terms=plan.terms,
            all_reduces=plan.all_reduces,
            kernels=plan.kernels,
        )

    job = plan.job
    return dict(
        model=job.name,
        gpu=job.device.name,
        devices=job.split.devices,
        data=job.split.data,
        tensor=job.split.tensor,
        draft_sharding=job.split.draft,
        dtype=job.format.name,
        context=job.context,
        tokens_per_call=job.tokens_per_call,
        efficiency=job.efficiency,
        largest_batch=plan.largest_batch,
        largest_context=plan.largest_context,
        weight_floor_seconds=plan.weight_floor,
        **one(plan),
        by_batch=[one(p) for p in by_batch],
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
