"""Everything that is to be known on the day there is a GPU: right, fast, and how fast against what it could be.

    python scripts/gpu_suite.py --out runs/h100                   all parts, at most 8 minutes each; again: goes on
    python scripts/gpu_suite.py --out runs/h100 --parts 1 2       some of them
    python scripts/gpu_suite.py --out runs/h100 --only '8B.*plain|8B.*draft'    rows of these words, on a short lease
    python scripts/gpu_suite.py --out runs/tiny --tiny            minuscule shapes, for a CPU: about a minute
    PYTHONPATH=. python3 scripts/gpu_suite.py ...                 where jeagle is not installed

    1  check      every implementation of every operation against float64 and XLA
    2  attention  seconds and share of the measured copy bandwidth; beside cuDNN and PyTorch; splits: of the prefix, how
                  many; choosing: of tokens
    3  steps      plain, verify and draft steps of 1B and 8B shapes, accept + commit; loop: what the loop costs; shards:
                  what one of eight devices computes of 70B and Maverick
    4  generate   transformers with a static cache, compiled, and jeagle on the same shapes
    5  smollm2    from end to end, plain and speculative in turns
    6  mesh       a round over all devices, under each of XLA's options for collectives

A part runs in processes of its own and writes DIR/<part>.json row by row (DIR/<part>.log has what they complain of); a
part that fails or runs out of time says so and the others still run. Rows of a file are not measured again, errors are
tried again, rows during which a process died only with --retry. Each part's docstring (scripts/gpu_parts) says what is
timed. Tables of all files come last, and the targets. The exit code is 1 where a correctness check failed, else 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from common import environment
from gpu_parts.report import print_report, wrong_checks
from gpu_parts.rows import DeviceLost, OutOfTime, Rows, Settings, in_a_line, read_part, update_part
from reporting import make_console

from jeagle.attention import resolve
from jeagle.locate import cache_directory

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480.0  # seconds a part may take
NO_NEW_ROW = 0.85  # of its time, after which a part begins no row
COMMAND_BUFFERS = {
    "default": [],
    "none": ["--xla_gpu_enable_command_buffer="],
    # The loop is two commands, and XLA makes no buffer of fewer than five: without the second flag this means none.
    "+WHILE": ["--xla_gpu_enable_command_buffer=+WHILE", "--xla_gpu_graph_min_graph_size=1"],
}
ONE_SHOT = "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=true"
CAPTURED = ["--xla_gpu_enable_command_buffer=+WHILE,+COLLECTIVES", "--xla_gpu_graph_min_graph_size=1"]
COLLECTIVES = {
    "default": [],
    "one-shot all-reduce": [ONE_SHOT],
    "+WHILE": COMMAND_BUFFERS["+WHILE"],
    "+WHILE,+COLLECTIVES": CAPTURED,
    "one-shot all-reduce, +WHILE,+COLLECTIVES": [ONE_SHOT, *CAPTURED],
}
FLAGS = COMMAND_BUFFERS | COLLECTIVES  # a variant that is named here runs with these


class Part(NamedTuple):
    number: int
    name: str  # a module of gpu_parts
    variants: tuple[str, ...] = ("all",)  # a process each; PyTorch and JAX do not share the device's memory


PARTS = (
    Part(1, "check"),
    Part(2, "attention", ("torch", "jax")),
    Part(2, "splits"),
    Part(2, "choosing"),
    Part(3, "steps"),
    Part(3, "loop", tuple(COMMAND_BUFFERS)),
    Part(3, "shards"),
    Part(4, "generate", ("torch", "jax")),
    Part(5, "smollm2"),
    Part(6, "mesh", tuple(COLLECTIVES)),
)


def run_here(args: argparse.Namespace) -> int:
    """One variant of one part, in this process. Its status goes into the part's file."""
    path = part_file(args.out, args.part)
    say(path, args.variant, "running")
    try:
        settings = Settings(args.tiny, resolve(args.attention), args.variant, args.smollm2)
        heading = dict(script="gpu_suite", part=args.part, tiny=args.tiny, **environment())
        deadline = time.monotonic() + NO_NEW_ROW * args.seconds
        rows = Rows(path, heading, deadline=deadline, only=args.only)
        importlib.import_module(f"gpu_parts.{args.part}").measure(rows, settings)
    except OutOfTime:
        say(path, args.variant, "unfinished", "its time was up; run again to go on")
    except DeviceLost as error:
        say(path, args.variant, "crashed", str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        say(path, args.variant, "failed", in_a_line(error))
        return 1
    else:
        say(path, args.variant, "complete")
    return 0


def run_part(part: Part, args: argparse.Namespace) -> None:
    """Its variants, one after the other. A process that dies over a row is followed by another, which leaves it out."""
    deadline, path = time.monotonic() + args.seconds, part_file(args.out, part.name)
    if args.retry and path.exists():
        update_part(path, rows=[row for row in read_part(path).get("rows", []) if row["status"] != "crashed"])
    for variant in part.variants[-1:] if args.tiny and part.name in ("loop", "mesh") else part.variants:
        crashed = -1
        while crashed < (crashed := num_crashed(path)):
            left = deadline - time.monotonic()
            if left <= 0:
                say(path, variant, "unfinished", "the part's time was up; run again to go on")
                break
            print(f"{part.name} ({variant})", flush=True)
            run_process(part.name, variant, args, left)
            if read_part(path)["runs"][variant]["status"] != "crashed":
                break


def run_process(part: str, variant: str, args: argparse.Namespace, seconds: float) -> None:
    """A variant in a process of its own. Should it not say how it ended, that is said here."""
    path, log = part_file(args.out, part), args.out / f"{part}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out), "--part", part]
    command += ["--variant", variant, "--seconds", f"{seconds:.0f}", "--attention", args.attention]
    command += ["--smollm2", str(args.smollm2), "--only", args.only, *["--tiny"] * args.tiny]
    flags = [os.environ.get("XLA_FLAGS", ""), *FLAGS.get(variant, [])]
    flags += ["--xla_backend_optimization_level=0"] * args.tiny  # compiling is all that tiny programs cost
    defaults = dict(
        XLA_PYTHON_CLIENT_PREALLOCATE="false",  # what a part needs, and no more
        JAX_COMPILATION_CACHE_DIR=str(cache_directory() / "xla"),  # a run that goes on compiles nothing twice
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.05" if args.tiny else "0.5",
        HF_HUB_OFFLINE="1",
    )
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # JAX takes one of the two names alone
        defaults["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    environ = defaults | os.environ | dict(XLA_FLAGS=" ".join(filter(None, flags)))
    say(path, variant, "running")
    with log.open("ab") as errors:
        try:
            code = subprocess.run(command, env=environ, stderr=errors, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            say(path, variant, "timed out", f"stopped after {seconds:.0f} s")
            return
    if read_part(path)["runs"][variant]["status"] == "running":
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        say(path, variant, "crashed", f"exit code {code}: {in_a_line(lines[-1] if lines else '')}")


def part_file(out: Path, part: str) -> Path:
    return out / f"{part}.json"


def say(path: Path, variant: str, status: str, error: str | None = None) -> None:
    runs = read_part(path).get("runs", {})
    update_part(path, runs=runs | {variant: dict(status=status, **({} if error is None else dict(error=error)))})


def num_crashed(path: Path) -> int:
    return sum(row["status"] == "crashed" for row in read_part(path).get("rows", []))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a folder for the results; kept between runs"
    )
    numbers = sorted({part.number for part in PARTS})
    parser.add_argument("--parts", type=int, nargs="+", choices=numbers, default=numbers)
    parser.add_argument("--tiny", action="store_true", help="minuscule shapes, for a CPU")
    parser.add_argument("--attention", default="auto", metavar="NAME", help="what models run with (parts 3 to 5)")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="a part's time limit (default: %(default).0f)")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose key, as printed, this finds")
    parser.add_argument("--retry", action="store_true", help="measure rows again during which a process died")
    parser.add_argument("--smollm2", type=Path, default=ROOT / "models" / "smollm2-135m", metavar="CHECKPOINT")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="all", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only!r} is no regular expression: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_here(args)

    for part in PARTS:
        if part.number in args.parts:
            run_part(part, args)
    results: dict[str, dict[str, Any]] = {part.name: read_part(part_file(args.out, part.name)) for part in PARTS}
    print_report(make_console(), results)
    wrong = wrong_checks(results["check"]) if 1 in args.parts else []
    for reason in wrong:
        print(f"gpu_suite: check failed: {reason}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
