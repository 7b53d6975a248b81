"""How long until ``jeagle generate`` says its first word, and what does that time go to?

    python scripts/bench_start.py models/smollm2-135m --draft smollm2-135m-eagle3 --out start.json

Each run is a process of its own that does what the command does, up to the first piece of text. The first one fills the
cache of compiled programs and stands apart as "cold cache" only with --cold, which gives it an empty one; the others
find the cache warm. In the order they happen:

    python     from the start of the process to its first line
    import     jeagle, JAX, the tokenizer's library
    restore    the model and the head from disk, and the tokenizer
    trace      of every program to XLA's language
    compile    of every program, or its way out of the cache
    run        everything else up to the first piece: tokens, prefill, rounds

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# Only the standard library up here: what the measured process imports for its own sake would count as Python's start.
PHASES = ("python", "import", "restore", "trace", "compile", "run")


def first_piece(options: dict[str, Any]) -> dict[str, float]:
    """In a new process: generate until the first piece of text; seconds of every phase."""
    marks = [options["began"], time.time()]
    import jax

    from jeagle.llm import LLM
    from jeagle.sampling import SamplingParams

    compiling: list[float] = []

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    marks.append(time.time())
    llm = LLM(options["model"], options["draft"], tree=options["tree"], dtype=options["dtype"])
    tokenizer = llm.tokenizer
    marks.append(time.time())
    before = sum(compiling)  # loading runs programs of its own
    asked = [dict(role="user", content=options["prompt"])] if tokenizer.chat_template else options["prompt"]
    next(llm.stream(asked, SamplingParams(max_tokens=options["max_tokens"])))
    end = time.time()
    compiled = sum(compiling) - before
    # The programs' own seconds are tracing and compiling; small ones outside them are compiled as well.
    trace = max(0.0, sum(p.seconds for p in llm.compiled_programs) - compiled)
    spent = [b - a for a, b in pairwise(marks)]
    return dict(zip(PHASES, [*spent, trace, compiled, end - marks[-1] - trace - compiled], strict=True))


def start(options: dict[str, Any], cache: str | None) -> dict[str, float]:
    """The same from outside. cache: where compiled programs are kept, None as ever."""
    environ = dict(os.environ) if cache is None else os.environ | dict(JAX_COMPILATION_CACHE_DIR=cache)
    given = json.dumps(options | dict(began=time.time()))
    command = [sys.executable, str(Path(__file__).resolve()), "--first-piece", given]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the process failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from common import environment, spread
    from reporting import check_outputs

    if args.repeats < 1:
        raise ValueError("--repeats must be at least 1")
    check_outputs(args.out, args.picture)
    here = environment()
    options = dict(model=args.model, draft=args.draft, tree=args.tree, dtype=args.dtype, prompt=args.prompt)
    options |= dict(max_tokens=args.max_tokens)
    cold = None
    if args.cold:
        with tempfile.TemporaryDirectory() as empty:
            cold = start(options, empty)
    start(options, None)  # fills the cache, and the kernel's of the files
    runs = [start(options, None) for _ in range(args.repeats)]
    result = dict(script="bench_start", **here, **options, repeats=args.repeats, cold=cold)
    phases = {name: spread([run[name] for run in runs]) for name in PHASES}
    return result | dict(seconds=spread([sum(run.values()) for run in runs]), phases=phases)


def rows(result: dict[str, Any]) -> dict[str, tuple[dict[str, float], float]]:
    """Seconds of every phase, and of all, with each kind of cache."""
    medians = {name: found["median"] for name, found in result["phases"].items()}
    warm = {"warm, median": (medians, result["seconds"]["median"])}
    cold = result["cold"]
    return warm if cold is None else {"cold": (cold, sum(cold.values()))} | warm


def print_table(result: dict[str, Any]) -> None:
    from reporting import make_console, new_table

    table = new_table("cache", *PHASES, "first word after", title=f"{result['model']}, seconds", right=PHASES)
    for name, (run, total) in rows(result).items():
        table.add_row(name, *(f"{run[phase]:.2f}" for phase in PHASES), f"{total:.2f}")
    make_console().print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """A bar per kind of cache, of its phases end to end."""
    from reporting import new_figure

    found = rows(result)
    figure = new_figure(f"{result['model']}, {result['device']}", 9, 1.8 + 0.7 * len(found))
    axes = figure.subplots()
    for at, (run, total) in enumerate(found.values()):
        left = 0.0
        for i, (phase, seconds) in enumerate(run.items()):
            bar = axes.barh(at, seconds, 0.6, left=left, color=f"C{i}", label=phase if at == 0 else None)
            if seconds > 0.04 * max(whole for _, whole in found.values()):
                axes.bar_label(bar, fmt="%.2f", label_type="center", fontsize=8)
            left += seconds
        axes.annotate(f"{total:.2f} s", (left, at), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel="seconds until the first word", ylim=(len(found) - 0.5, -0.5))
    axes.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=len(PHASES), fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="converted checkpoint with a tokenizer")
    parser.add_argument("--draft", help="EAGLE head, or the name of one")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--max-tokens", type=int, default=256, help="as the command has it; not all are waited for")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also once with an empty cache of compiled programs")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--first-piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_piece:
        print(json.dumps(first_piece(json.loads(args.first_piece))))
        return 0
    if args.model is None:
        parser.error("a model is needed")
    from common import exit_code
    from reporting import with_picture

    return exit_code(lambda: measure(args), with_picture(print_table, draw, args.picture), args.out)


if __name__ == "__main__":
    sys.exit(main())
