"""What the README says of the suite's files: (what, measured) of each row or of a few that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpu_parts.report import Found, Part, over, select

__all__ = ["NUMBERS"]

Rows = Iterator[tuple[str, str]]


def check(part: Part) -> Rows:
    """A line per operation and implementation: how many cases were right, and why others were not run."""
    for operation, name in dict.fromkeys((row["operation"], row["implementation"]) for row in part["rows"]):
        rows = [row for row in part["rows"] if (row["operation"], row["implementation"]) == (operation, name)]
        done = [row for row in rows if row["status"] == "measured"]
        said = [f"{sum(row['ok'] for row in done)} of {len(done)} cases right"] if done else []
        if errors := [row["error"] for row in done if row.get("tolerance") == 1e-2]:
            said.append(f"in bfloat16 at most {max(errors):.1e} off (1e-2 is allowed)")
        if refused := sum(row["status"] == "unsupported" for row in rows):
            said.append(f"{refused} refused in a sentence")
        said += dict.fromkeys(f"not run: {row['why']}" for row in rows if row["status"] in ("error", "skipped"))
        yield f"{operation} by `{name}` against float64", "; ".join(said)


def steps(part: Part) -> Rows:
    """A line per piece, over its contexts."""
    keys = dict.fromkeys((r["shape"], r["what"], r["T"]) for r in select(part) if "shape" in r)
    for shape, what, T in keys:
        rows = select(part, shape=shape, what=what, T=T)
        contexts = " / ".join(f"{row['length']:,}" for row in rows)
        found = " / ".join(f"{row['seconds'] * 1e3:.2f}" for row in rows) + " ms"
        if what == "plain step":
            floor = " / ".join(f"{row['weight_floor_s'] / row['seconds']:.0%}" for row in rows)
            found += f", of which reading the weights once at the copy bandwidth would take {floor}"
        elif what == "verify step":
            found += f", {' / '.join(over_plain(part, row) for row in rows)} of a plain step"
        nodes = f" of {T} nodes" if T > 1 else ""
        yield f"{shape} shape, {what}{nodes}, context {contexts}", found


def over_plain(part: Part, row: Found) -> str:
    plain = select(part, shape=row["shape"], what="plain step", length=row["length"])
    return f"{row['seconds'] / plain[0]['seconds']:.2f}"


def attention(part: Part) -> Rows:
    """A line per problem: each implementation's time, and its share of the copy bandwidth."""
    (copied,) = select(part, what="copy bandwidth")
    yield "copy bandwidth", f"{copied['bytes_per_second'] / 1e9:,.0f} GB/s"
    for B, T, length in dict.fromkeys((r["B"], r["T"], r["length"]) for r in select(part) if "B" in r):
        cells = [
            f"{row['implementation']}{' (no mask)' if row['implementation'] == 'cuDNN' else ''} "
            f"{row['seconds'] * 1e6:.1f} us ({row['bytes'] / row['seconds'] / copied['bytes_per_second']:.0%})"
            for row in select(part, B=B, T=T, length=length)
        ]
        yield f"attention of an 8B layer, batch {B}, {T} new, {length:,} cached (of copy bandwidth)", ", ".join(cells)


def generate(part: Part) -> Rows:
    for row in select(part):
        theirs = select(part, shape=row["shape"], implementation="transformers")
        found = f"{row['tokens_per_second']:.1f} tokens/s"
        if row["implementation"] == "transformers":
            by = "transformers, static cache, compiled"
        else:
            by = f"jeagle, {row['implementation']}"
            if ratio := over(theirs[0]["seconds"], row["seconds"]) if theirs else None:
                found += f", {ratio:.2f}x of transformers"
        yield f"{row['shape']} shape, random weights, {row['tokens']} tokens after {row['length']}: {by}", found


def smollm2(part: Part) -> Rows:
    for row in select(part):
        pairs = row["ratio_of_pairs"]
        found = f"{row['plain_tokens_per_second']:.0f} and {row['tokens_per_second']:.0f} tokens/s"
        found += f", {pairs['median']:.2f}x ({pairs['quartile_1']:.2f} to {pairs['quartile_3']:.2f}) at "
        found += f"{row['tokens_per_call']:.2f} tokens per call; {row['same_text']} of {row['requests']} texts the same"
        yield f"SmolLM2, {row['dtype']}, plain and speculative ({row['draft_tree']})", found


NUMBERS: dict[str, Callable[[Part], Rows]] = dict(
    check=check, steps=steps, attention=attention, generate=generate, smollm2=smollm2
)
