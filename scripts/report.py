"""Numbers and pictures, made of the JSON files in scripts/results/.

    python scripts/report.py            writes the tables and draws the pictures
    python scripts/report.py --check    exit code 1 and a sentence where a table says something else

scripts/results/README.md has everything, a table per result file; the headlines among the rows stand between two
comments in README.md. What has no file has no row. The pictures are bench_generate's, drawn anew beside its JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_parts.numbers import NUMBERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"
EVERYTHING = """# Everything that was measured

Made by `python scripts/report.py` of the JSON files beside it. Ratios are within one run; in brackets are quartiles.
Steps are greedy ones. CPUs are shared virtual machines of 2 cores, AMD EPYCs, "with AVX-512" or with AVX2; what names
no vectors was measured on AVX2, with earlier heads. Each file also has the versions, commit and load of its run.

"""
BEGIN, END = "<!-- numbers: made by scripts/report.py -->", "<!-- end of numbers -->"

Result = dict[str, Any]


def steps(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_decode.py."""
    speed, floor, weights = (result[f] for f in ("bandwidth_GBps", "floor_ms", "weights_MB"))
    yield (
        f"memory bandwidth in the same run; floor of a step ({weights:.0f} MB of weights read once)",
        f"{speed:.1f} GB/s; {floor:.1f} ms",
    )
    yield "plain step", f"{result['plain_ms']:.1f} ms, {result['plain_over_floor']:.2f}x the floor (wanted 1.25x)"
    verified = {int(n): ratio for n, ratio in result["verify_over_plain"].items() if int(n) > 1}
    nodes, ratios = " / ".join(map(str, verified)), " / ".join(f"{ratio:.2f}" for ratio in verified.values())
    yield f"verifying T = {nodes} nodes, relative to a plain step", f"{ratios} (wanted 1.6 at T = 4)"
    draft = f"{result['draft_ms']:.1f} ms, {result['draft_over_plain']:.2f} of a plain step"
    yield "one step of an EAGLE-3 head with the target's full vocabulary", draft
    if switches := result.get("switch_ms"):
        yield "going on under another tree", ", ".join(f"{name} {ms:.1f} ms" for name, ms in switches.items())
    if host := result.get("host"):
        share = f"{host['host_share']:.2%} of the time"
        yield f"outside the device loop, generating {host['tokens']} tokens", share


def products(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_products.py."""
    for what, ways in (("all layers", result["layers_ms"]), ("the tied LM head", result["tied_head_ms"])):
        shown = [n for n in ("2", "4", "8", "16", "32") if n in ways["ynnpack"]]
        one = ways["ynnpack"]["1"]
        found = [
            f"{name} {' / '.join(f'{ms[n] / one:.2f}' for n in shown)}"
            for name, ms in (("as XLA:CPU has it", ways["ynnpack"]), ("through Eigen", ways["eigen"]))
        ]
        yield f"products of {what} with {' / '.join(shown)} rows, relative to one row", "; ".join(found)


def acceptance(result: Result) -> Iterator[tuple[str, str]]:
    """Of eval_acceptance.py; with --speed what it makes of the time."""
    for run in result["runs"]:
        whole = run["whole"]
        asked = f"{Path(run['prompts']).stem}, {whole['answers']} answers, temperature {run['temperature']:g}"
        what = f"{asked}, {run['tree']}: tokens per call"
        found = f"{whole['tokens_per_call']:.2f}"
        if lookups := sum(whole.get("lookup_histogram", [])):
            found += f", {lookups / whole['rounds']:.0%} of the rounds looked up"
        if speed := run.get("speed"):
            ratio = speed["speedup"]
            what += "; speculative over plain"
            found += f"; {spread_of(ratio)}"
        yield what, found


def alignment(result: Result) -> Iterator[tuple[str, str]]:
    """Of eval_alignment.py."""
    rates = f"{result['agreement_in_training']:.1%} in training, {result['agreement_in_decoding']:.1%} in decoding"
    yield (
        f"first drafts that are the target's choice, at {result['positions']} positions of {result['answers']} answers",
        f"{rates}; they differ at {result['positions_that_differ']}",
    )


def generation(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_generate.py."""
    for run in result["runs"]:
        what = f"LLM.generate, batch {run['batch']}, temperature {run['temperature']:g}, {run['tree']}"
        found = f"{run['tokens_per_second']:.1f} tokens/s"
        if run["tree"] != "plain":
            found += f", {run['tokens_per_call']:.2f} tokens per call, {spread_of(run['speedup'])} of plain"
        yield what + forced(result), f"{found}, {run['share_of_floor']:.0%} of the floor"


def peers(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_peers.py."""
    for run in result["runs"]:
        for row in run["contenders"]:
            what = f"{row['name']}, batch {run['batch']}{forced(result) if 'speculative' in row['name'] else ''}"
            if row["status"] != "measured":
                yield what, row["status"]
                continue
            found = f"{row['tokens_per_second']['median']:.1f} tokens/s{served_by(row)}"
            if "jeagle" not in row["name"]:
                found += f"; jeagle is {spread_of(row['jeagle_over_it'])} as fast"
                if speculative := row.get("speculative_over_it"):
                    found += f", speculative {spread_of(speculative)}{forced(result)}"
            yield what, found


def served_by(row: Result) -> str:
    """Tokens per call and the trees of at least 10% of the rounds, where a contender counted them."""
    if "tokens_per_call" not in row:
        return ""
    rounds = row.get("rounds_by_tree")
    if not rounds:
        return f", {row['tokens_per_call']:.2f} tokens per call"
    if set(rounds) == {"off"}:
        return ", decoding plainly"
    often = [f"`{tree}`" for tree, n in rounds.items() if n >= 0.1 * sum(rounds.values())]
    return f", {row['tokens_per_call']:.2f} tokens per call, {', '.join(often)}"


def steady(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_steady.py."""
    for name, run in result["runs"].items():
        length, memory = run["length"], run["memory"]
        yield f"{name}: outside the device loop", f"{run['host']['host_share']:.2%} of the time"
        lengths = f"of {length['long']} tokens over those of {length['short']}"
        calls = " and ".join(f"{tau:.2f}" for tau in reversed(length["tokens_per_call"].values()))
        yield f"{name}: tokens/s {lengths}", f"{spread_of(length['ratio'])}, at {calls} tokens per call"
        yield f"{name}: rounds/s {lengths}", spread_of(length["ratio_of_rounds"])
        grown = f"{memory['growth_MB']:+.1f} MB of {memory['settled_MB']:.0f}"
        yield f"{name}: memory over {memory['requests']} requests", grown


def queue(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_queue.py."""
    low, high = result["lengths"]
    for run in result["runs"]:
        rates = " and ".join(f"{found['median']:.0f}" for found in run["tokens_per_second"].values())
        rounds = " and ".join(map(str, run["rounds"].values()))
        what = f"{run['requests']} requests of {low} to {high} tokens, {run['places']} at a time"
        yield f"{what}, in turns and batch after batch", f"{rates} tokens/s, {rounds} rounds; {spread_of(run['ratio'])}"


def cache_attention(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_attention.py."""
    for run in result["runs"]:
        rows = f"{run['rows']} row{'s' * (run['rows'] > 1)}"
        what = f"attention of all layers, {rows}, {run['new']} new, {run['seen']:,} of {run['capacity']:,} positions"
        found = [f"{name} {ms:.1f} ms, {run['GBps'][name]:.0f} GB/s" for name, ms in run["milliseconds"].items()]
        yield what, "; ".join(found)


def cold_start(result: Result) -> Iterator[tuple[str, str]]:
    """Of bench_start.py."""
    phases = ", ".join(f"{name} {found['median']:.1f}" for name, found in result["phases"].items())
    total = result["seconds"]["median"]
    yield "first word of `jeagle generate`, compiled programs in the cache", f"{total:.1f} s ({phases})"


def gpu_suite(result: Result) -> Iterator[tuple[str, str]]:
    """Of a part of gpu_suite.py; not all have words."""
    yield from NUMBERS.get(result["part"], lambda part: iter(()))(result)


def spread_of(ratio: dict[str, float]) -> str:
    """The median and, of several, the quartiles."""
    quartiles = f" ({ratio['quartile_1']:.2f} to {ratio['quartile_3']:.2f})" if ratio["min"] < ratio["max"] else ""
    return f"{ratio['median']:.2f}x{quartiles}"


def forced(result: Result) -> str:
    profile = result.get("synthetic_acceptance")
    return "" if profile is None else f", synthetic acceptance of {1 + chances(profile):.1f} tokens per call"


def chances(profile: list[float]) -> float:
    """Drafts that a chain as deep as the profile keeps. Example: [0.5, 0.5] is 0.75."""
    kept = total = 1.0
    for p in profile:
        kept *= p
        total += kept
    return total - 1


ROWS: dict[str, Callable[[Result], Iterator[tuple[str, str]]]] = {
    "bench_decode": steps,
    "bench_products": products,
    "eval_acceptance": acceptance,
    "eval_alignment": alignment,
    "bench_generate": generation,
    "bench_peers": peers,
    "bench_steady": steady,
    "bench_queue": queue,
    "bench_attention": cache_attention,
    "bench_start": cold_start,
    "gpu_suite": gpu_suite,
}


# Of each script, what a row that the README shows must have in it, one or the other.
HEADLINES: dict[str, tuple[str, ...]] = {
    "eval_acceptance": ("temperature 0, chain-4:", "temperature 1, chain-4:", "speculative over plain"),
    "bench_generate": ("dispatch",),
    "bench_peers": ("jeagle, ", "transformers, batch", "llama.cpp", "vllm"),
    "bench_steady": ("outside the device loop", "tokens/s", "rounds/s"),
    "bench_queue": ("",),
    "bench_start": ("",),
    "gpu_suite": ("8B shape", "1B shape, random", "SmolLM2"),
}


def title(result: Result) -> str:
    """What all rows of a file share."""
    if result["script"] == "gpu_suite":
        return f"gpu_suite, {result['part']}, {result['device']}, JAX {result['jax']}"
    tokens = f", {result['max_tokens']} tokens" if result["script"] in ("bench_generate", "bench_peers") else ""
    prefix = f", prefix of {result['prefix']} tokens" if "prefix" in result else ""
    batch = f", batch {result['batch']}" if "batch" in result else ""
    head = result.get("head") or result.get("draft")
    names = Path(result["model"]).name + (f" with {Path(head).name}" if head else "")
    dtype = "dtype as stored" if result["dtype"] == "auto" else result["dtype"]
    return f"{names}, {dtype}{batch}{prefix}{tokens}, {result['device']}, JAX {result['jax']}"


def section(results: dict[str, Result]) -> str:
    """A table per file: its title, the rows, and the command that measured them."""
    parts = []
    for name, result in results.items():
        rows = [f"| {what} | {found} |" for what, found in ROWS[result["script"]](result)]
        if not rows:
            continue
        said = f"{title(result)}. By `{short_command(result['command'])}` (`scripts/results/{name}`{cut(result)}):"
        parts.append("\n".join([said, "", "| what | measured |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def headlines(results: dict[str, Result]) -> str:
    """One table of the rows that README.md shows, with what they were measured on."""
    rows = []
    for name, result in results.items():
        wanted = HEADLINES.get(result["script"], ())
        device, _, about = result["device"].partition(" (")
        device += " with AVX-512" * (device == "cpu" and "AVX-512" in about)
        for what, found in ROWS[result["script"]](result):
            if any(part in what for part in wanted):
                rows.append(f"| {what} | {found} | [{device}](scripts/results/{name}) |")
    return "\n".join(["| what | measured | where |", "| --- | --- | --- |", *rows])


def cut(result: Result) -> str:
    """What happened to a run that did not go through: its command promises more than its rows hold."""
    said = ""
    if commit := result.get("continued_from"):
        said += f"; killed and continued: rows at {commit}, the floor's bandwidth later"
    if note := result.get("note"):
        said += f"; {note}"
    return said + "; interrupted: not all batch sizes were run" * result.get("interrupted", False)


def short_command(command: str) -> str:
    """Without the files written. Example: "python scripts/x.py --a 1 --out b.json" loses its last two words."""
    words = command.split(" ")
    for option in ("--out", "--picture"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return " ".join(words)


def read_results(directory: Path) -> dict[str, Result]:
    """The files that have rows, by their path in ``directory``, in the order of ROWS."""
    paths = sorted(directory.rglob("*.json"))
    found = {str(path.relative_to(directory)): json.loads(path.read_text(encoding="utf-8")) for path in paths}
    order = list(ROWS)
    known = {name: result for name, result in found.items() if result.get("script") in order}
    return dict(sorted(known.items(), key=lambda item: order.index(item[1]["script"])))


def with_numbers(readme: str, numbers: str) -> str:
    """The README with its numbers replaced. Raises ValueError where the comments are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold the lines {BEGIN!r} and {END!r} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{numbers}\n\n{END}{rest.split(END)[1]}"


def draw_pictures(results: dict[str, Result], directory: Path) -> None:
    from bench_generate import draw

    for name, result in results.items():
        if result["script"] == "bench_generate":
            draw(directory / Path(name).with_suffix(".png").name, result)


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say whether tables are what JSON gives")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        results = read_results(args.results)
        everything = args.results / "README.md"
        wanted = {
            args.readme: with_numbers(args.readme.read_text(encoding="utf-8"), headlines(results)),
            everything: EVERYTHING + section(results) + "\n",
        }
        for path, text in wanted.items():
            if args.check and (not path.exists() or path.read_text(encoding="utf-8") != text):
                raise ValueError(f"the numbers in {path.name} are not what the results give: run scripts/report.py")
        if not args.check:
            for path, text in wanted.items():
                path.write_text(text, encoding="utf-8")
            draw_pictures(results, args.results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
