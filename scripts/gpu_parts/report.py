"""Tables of the suite's files, and its targets. Knows no device: it reads what the parts wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reporting import new_table
from rich.console import Console
from rich.table import Table

__all__ = ["print_report", "targets", "wrong_checks"]

Part = dict[str, Any]  # a part's file
Found = dict[str, Any]  # one of its rows
REFERENCES = ("xla", "cuDNN", "torch SDPA")


def select(part: Part, **wanted: Any) -> list[Found]:
    """The measured rows with these fields."""
    rows = (row for row in part.get("rows", []) if row["status"] == "measured")
    return [row for row in rows if all(row.get(field) == value for field, value in wanted.items())]


def seconds(part: Part, **wanted: Any) -> float | None:
    return min((row["seconds"] for row in select(part, **wanted)), default=None)


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def show(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value)


def wrong_checks(check: Part) -> list[str]:
    """What is wrong, one sentence each; being unfinished is not."""
    runs = [f"{run['status']}: {run.get('error')}" for run in check.get("runs", {}).values()]
    wrong = [run for run in runs if run.startswith(("failed", "crashed", "timed out"))]
    for row in check.get("rows", []):
        if row["status"] in ("error", "crashed") or row.get("ok") is False:
            said = row.get("why", f"error {row['error']:.2g}" if "error" in row else f"{row.get('wrong')} wrong")
            wrong.append(f"{row['operation']}, {row['implementation']}, {row['case']}: {said}")
    return wrong


def check_table(part: Part) -> Table:
    table = new_table("operation", "case", "implementation", "error", "to XLA's", "tolerance", "found")
    for row in part["rows"]:
        if row["status"] == "measured":
            figures = [show(row.get(f), "{:.1e}") for f in ("error", "error_to_xla", "tolerance")]
            if "wrong" in row:
                figures[0] = f"{row['wrong']} of {row['choices']}"
            found = "right" if row["ok"] else "WRONG"
        else:
            figures, found = [""] * 3, row["status"]
        table.add_row(row["operation"], row["case"], row["implementation"], *figures, found)
    return table


def attention_table(part: Part) -> Table:
    """Per cell: ms, share of the copy bandwidth, time over that of T = 1."""
    bandwidth = next((row["bytes_per_second"] for row in select(part, what="copy bandwidth")), None)
    names = list(dict.fromkeys(row["implementation"] for row in part["rows"] if "implementation" in row))
    kernels = [name for name in names if name not in REFERENCES]
    others = [name for name in REFERENCES if name in names]
    ratios = [(kernel, other) for kernel in kernels for other in others]
    cells = [f"{name}: ms, of bandwidth, over T=1" for name in names]
    table = new_table("B", "length", "T", *cells, *(f"{kernel} / {other}" for kernel, other in ratios))
    shapes = dict.fromkeys((r["B"], r["length"], r["T"]) for r in part["rows"] if "B" in r)
    for B, length, T in sorted(shapes):
        row: dict[str, Found] = {
            r["implementation"]: r for r in part["rows"] if (r.get("B"), r.get("length"), r.get("T")) == (B, length, T)
        }
        taken = {name: found.get("seconds") for name, found in row.items()}
        texts = []
        for name in names:
            spent = taken.get(name)
            if spent is None:
                texts.append(row[name]["status"] if name in row else "")
                continue
            share = None if bandwidth is None else row[name]["bytes"] / spent / bandwidth
            single = seconds(part, implementation=name, B=B, length=length, T=1)
            texts.append(f"{spent * 1e3:.4f} {show(share, '{:.0%}'):>4} {show(over(spent, single))}")
        table.add_row(str(B), str(length), str(T), *texts, *(show(over(taken.get(a), taken.get(b))) for a, b in ratios))
    if bandwidth is not None:
        table.caption = f"copy bandwidth {bandwidth / 1e9:.1f} GB/s"
    return table


def splits_table(part: Part) -> Table:
    table = new_table("B", "length", "T", "waves", "splits", "ms")
    for row in part["rows"]:
        spent, problem = row.get("seconds"), (str(row[field]) for field in ("B", "length", "T"))
        time = row["status"] if spent is None else f"{spent * 1e3:.4f}"
        table.add_row(*problem, row["case"], show(row.get("splits"), "{}"), time)
    return table


def choosing_table(part: Part) -> Table:
    bandwidth = next((row["bytes_per_second"] for row in select(part, what="copy bandwidth")), None)
    table = new_table("nodes", "parameters", "sampler", "ms", "of bandwidth", "over XLA")
    for row in part["rows"]:
        if "case" in row:
            spent = row.get("seconds")
            xla = seconds(part, implementation="xla", case=row["case"], T=row["T"])
            share = None if spent is None or bandwidth is None else row["bytes"] / spent / bandwidth
            time = row["status"] if spent is None else f"{spent * 1e3:.4f}"
            figures = (time, show(share, "{:.0%}"), show(over(spent, xla)))
            table.add_row(str(row["T"]), row["case"], row["implementation"], *figures)
    return table


def steps_table(part: Part) -> Table:
    table = new_table("shape", "what", "attention", "T", "context", "ms", "floor / time", "over plain", "kernels")
    for row in part["rows"]:
        if "shape" in row:
            same = dict(shape=row["shape"], implementation=row["implementation"], length=row["length"])
            spent, plain = row.get("seconds"), seconds(part, what="plain step", **same)
            target_step = row["what"] in ("plain step", "verify step")
            floor = over(row.get("weight_floor_s"), spent) if target_step else None
            what = (row["shape"], row["what"], row["implementation"], str(row["T"]), str(row["length"]))
            kernels = show(row.get("kernels"), "{}")
            time = row["status"] if spent is None else f"{spent * 1e3:.4f}"
            table.add_row(*what, time, show(floor, "{:.0%}"), show(over(spent, plain)), kernels)
    return table


def loop_table(part: Part) -> Table:
    table = new_table(
        "shape", "tree", "attention", "command buffers", "ms a round", "known length", "overhead", "kernels"
    )
    for row in part["rows"]:
        what = (row["shape"], row["tree"], row["implementation"], row["flags"])
        if row["status"] == "measured":
            times = [f"{row[f] * 1e3:.4f}" for f in ("seconds", "known_seconds")]
            table.add_row(*what, *times, f"{row['seconds'] / row['known_seconds'] - 1:+.1%}", str(row["kernels"]))
        else:
            table.add_row(*what, row["status"], "", "", "")
    return table


def generate_table(part: Part) -> Table:
    table = new_table("shape", "by", "prompt", "tokens", "seconds", "tokens/s", "over transformers")
    for row in part["rows"]:
        theirs = seconds(part, shape=row["shape"], length=row["length"], implementation="transformers")
        by = row["implementation"] if row["implementation"] == "transformers" else f"jeagle, {row['implementation']}"
        figures = [show(row.get("tokens"), "{}"), show(row.get("seconds"), "{:.3f}") or row["status"]]
        figures += [show(row.get("tokens_per_second"), "{:.1f}"), show(over(theirs, row.get("seconds")))]
        table.add_row(row["shape"], by, str(row["length"]), *figures)
    return table


def smollm2_table(part: Part) -> Table:
    names = ("dtype", "attention", "plain tokens/s", "speculative", "ratio", "per pair", "tokens a call", "same texts")
    table = new_table(*names)
    for row in part["rows"]:
        figures = [row["status"], *[""] * 5]
        if row["status"] == "measured":
            pairs, same = row["ratio_of_pairs"], f"{row['same_text']} of {row['requests']}"
            figures = [f"{row[f]:.1f}" for f in ("plain_tokens_per_second", "tokens_per_second")]
            figures += [f"{row['ratio']:.2f}", f"{pairs['min']:.2f} .. {pairs['max']:.2f}"]
            figures += [f"{row['tokens_per_call']:.2f} ({row['draft_tree']})", same]
        table.add_row(row["dtype"], row["implementation"], *figures)
    return table


def mesh_table(part: Part) -> Table:
    table = new_table("shape", "tree", "attention", "XLA's options", "ms per round", "over default")
    for row in part["rows"]:
        usual = seconds(part, shape=row["shape"], tree=row["tree"], flags="default")
        figures = show(row.get("seconds") and row["seconds"] * 1e3, "{:.3f}"), show(over(row.get("seconds"), usual))
        table.add_row(
            row["shape"], row["tree"], row["implementation"], row["flags"], figures[0] or row["status"], figures[1]
        )
    return table


def targets(results: dict[str, Part]) -> Iterator[tuple[str, float, float | None, bool]]:
    """(what, wanted, measured, whether more is better), for one H100, bf16, batch 1, the 8B shape."""
    steps, attention, loop = (results.get(name, {}) for name in ("steps", "attention", "loop"))

    def step(what: str, T: int, length: int) -> float | None:
        return seconds(steps, shape="8B", what=what, T=T, length=length)

    floor = next((row["weight_floor_s"] for row in select(steps, shape="8B", what="plain step")), None)
    yield "plain step over the weight floor", 1.35, over(step("plain step", 1, 1024), floor), False
    for length, wanted in ((1024, 1.10), (8192, 1.15)):
        ratio = over(step("verify step", 32, length), step("plain step", 1, length))
        yield f"verifying 32 nodes over a plain step, context {length}", wanted, ratio, False
    for what, T, wanted in (("draft step", 1, 0.40), ("accept + commit", 32, 0.3)):
        spent = step(what, T, 1024)
        yield f"{what}, ms", wanted, None if spent is None else spent * 1e3, False
    rounds = select(loop, shape="8B", tree="off")
    known = min((row["known_seconds"] for row in rounds), default=None)
    overhead = over(min((row["seconds"] for row in rounds), default=None), known)
    yield "loop overhead per round, best flags, %", 3.0, None if overhead is None else (overhead - 1) * 100, False
    bandwidth = next((row["bytes_per_second"] for row in select(attention, what="copy bandwidth")), None)
    for T in (1, 32):
        kernels = [r for r in select(attention, B=1, T=T, length=32_768) if r["implementation"] not in REFERENCES]
        rate = max((row["bytes"] / row["seconds"] for row in kernels), default=None)
        share = over(rate, bandwidth)
        percent = None if share is None else share * 100
        yield f"attention kernel, T = {T}, context 32768, % of copy bandwidth", 80.0, percent, True


def target_table(results: dict[str, Part]) -> Table:
    """Judged on an H100 alone."""
    judged = all("H100" in part["device"] and not part["tiny"] for part in results.values() if "device" in part)
    table = new_table("target (one H100, bf16, batch 1, 8B shape)", "wanted", "measured", "")
    for what, wanted, measured, more in targets(results):
        verdict = "not measured"
        if measured is not None:
            met = measured >= wanted if more else measured <= wanted
            verdict = ("met" if met else "missed") if judged else "not judged: no H100"
        table.add_row(what, f"{'>=' if more else '<='} {wanted:g}", show(measured, "{:.3g}"), verdict)
    return table


def shards_table(part: Part) -> Table:
    """The last two columns but one were measured by no one: what ``jeagle plan`` says of the collectives left out."""
    table = new_table("of", "what", "T", "context", "measured ms", "modelled collectives", "sum", "plan's floor")
    for row in part["rows"]:
        shape = (row["shape"], row["what"], str(row["T"]), str(row["length"]))
        spent, moved, floor = (row.get(f) for f in ("seconds", "modelled_collectives_s", "plan_floor_s"))
        total = None if spent is None else spent + moved
        figures = (show(x and x * 1e3, "{:.3f}") for x in (moved, total, floor))
        table.add_row(*shape, row["status"] if spent is None else f"{spent * 1e3:.3f}", *figures)
    return table


TABLES = dict(
    check=check_table,
    attention=attention_table,
    splits=splits_table,
    choosing=choosing_table,
    steps=steps_table,
    loop=loop_table,
    shards=shards_table,
    generate=generate_table,
    smollm2=smollm2_table,
    mesh=mesh_table,
)


def print_report(console: Console, results: dict[str, Part]) -> None:
    """A table per part that has rows, what is missing in each and why, and the targets."""
    for name, part in results.items():
        if part.get("rows"):
            table = TABLES[name](part)
            table.title = f"{name}, on {part['device']}, JAX {part['jax']}{', TINY SHAPES' if part['tiny'] else ''}"
            console.print(table)
        for variant, run in part.get("runs", {}).items():
            if run["status"] != "complete":
                console.print(f"{name} ({variant}): {run['status']}: {run.get('error', '')}", markup=False)
        reasons: dict[str, list[Found]] = {}
        for row in part.get("rows", []):
            if row["status"] != "measured":
                why = f"{row.get('implementation', row.get('what'))}: {row['status']}: {row['why']}"
                reasons.setdefault(why, []).append(row)
        for why, rows in reasons.items():
            console.print(f"{name}: {why} ({len(rows)} rows)", markup=False, highlight=False)
    console.print(target_table(results))
