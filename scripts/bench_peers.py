"""How fast is jeagle beside HF transformers, llama.cpp and vLLM, on the same prompts and weights?

    python -m convert.export_target models/smollm2-135m smollm2-hf --gguf smollm2-f32.gguf
    python scripts/bench_peers.py smollm2-hf --gguf smollm2-f32.gguf --draft smollm2-135m-eagle3 --batch 1 8 \\
        --prompts scripts/prompts/mt_bench.jsonl --peer-python PYTHON_WITH_TORCH --out peers.json

All read one Hugging Face directory (llama.cpp a GGUF file of the same weights) in one dtype, get the same token ids,
and emit --max-tokens tokens greedily, EOS ignored. Each peer is a process that lives through the run (scripts/peers;
--peer-python names its Python, PEER=PATH that of one peer alone) and takes turns with jeagle: every repeat times all of
them once on the same prompts, after one run that does not count. Seconds are of a whole call, prefill included.

    tokens/s      median over the repeats, and quartiles
    jeagle / it   jeagle's tokens/s over the peer's in the same repeat: median, quartiles, least; also speculatively
    equal         share of the tokens that stand where jeagle's plain text has the same
    a call        tokens per target forward, of all repeats, where drafts are counted; the JSON has jeagle's trees

--vllm-head is the head for a second vLLM, as ``python -m convert.export`` writes it: the same drafts in another engine.

A peer that is not installed stands in the table and in the JSON as "not installed". transformers' prompt lookup decodes
one prompt at a time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common import environment, exit_code, load_questions, pooled, spread, write_result
from measuring import compiled_before
from reporting import (
    check_outputs,
    grouped_bars,
    make_console,
    new_figure,
    new_table,
    save_picture,
    synthetic_note,
    with_picture,
)
from tqdm import tqdm

from jeagle import LLM, RequestMetrics, SamplingParams
from jeagle.text import REFERENCE_DATE
from jeagle.tree import tree_name
from jeagle.verify import constant_profile

PEERS = {"transformers": "hf.py", "llama.cpp": "llama_cpp_engine.py", "vllm": "vllm_engine.py"}
LOOKUP = "transformers, prompt lookup"
VLLM_HEAD = "vllm, EAGLE-3"
JEAGLE, SPECULATIVE = "jeagle", "jeagle, speculative"
PAUSE = 0.2  # seconds between contenders: threads of the last one may still spin
Ids = list[list[int]]


class Turn(NamedTuple):
    ids: Ids
    seconds: float
    metrics: Sequence[RequestMetrics] = ()  # of jeagle's requests
    rounds: int | None = None  # of a peer that drafts with a head, summed over rows


class Missing(Exception):
    """Why a contender cannot take part, in a line."""


class Worker:
    """A peer's process. Raises Missing where it is not installed or has failed."""

    def __init__(self, python: str, script: Path):
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | dict(HF_HUB_OFFLINE="1"),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Missing(f"failed: the process ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "missing" in answer:
            raise Missing(f"not installed: {answer['missing']}")
        if "error" in answer:
            raise Missing(f"failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """Its standard input ends, and so does it."""
        with contextlib.suppress(BrokenPipeError), self.process:
            pass


class Contender:
    """Someone who generates for a batch, what it took, and what was said at first."""

    def __init__(self, name: str, run: Callable[[Ids], Turn], most_rows: int | None = None):
        self.name, self.most_rows = name, most_rows
        self.run = run
        self.status = "measured"
        self.rates: list[float] = []
        self.texts: list[Ids] = []
        self.metrics: list[RequestMetrics] = []
        self.rounds: list[int] = []

    def reset(self, rows: int) -> None:
        self.rates, self.texts, self.metrics, self.rounds = [], [], [], []
        if not self.status.startswith(("not installed", "failed")):
            few = self.most_rows is None or rows <= self.most_rows
            self.status = "measured" if few else f"takes {self.most_rows} prompt at a time"

    def take_turn(self, prompts: Ids, *, counts: bool) -> None:
        if self.status != "measured":
            return
        time.sleep(PAUSE)
        try:
            turn = self.run(prompts)
        except Missing as why:
            self.status = str(why)
            return
        if counts:
            self.texts.append(turn.ids)
            self.rates.append(sum(map(len, turn.ids)) / turn.seconds)
            self.metrics += turn.metrics
            self.rounds += [] if turn.rounds is None else [turn.rounds]

    @property
    def tokens_per_call(self) -> float | None:
        """Of jeagle every token comes of a counted round; a peer's first ones come of its prompts' forwards."""
        if self.metrics:
            return pooled(self.metrics).tokens_per_call
        emitted = sum(len(ids) - 1 for turn in self.texts for ids in turn)
        return emitted / sum(self.rounds) if self.rounds else None


def ours(llm: LLM, max_tokens: int, speculative: bool) -> Callable[[Ids], Turn]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)  # greedy; the seed is synthetic rounds'

    def run(prompts: Ids) -> Turn:
        def timed() -> Turn:
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, speculative=speculative, use_tqdm=False)
            ids, seconds = [list(o.outputs[0].token_ids) for o in outputs], time.perf_counter() - began
            return Turn(ids, seconds, [o.metrics for o in outputs])

        return compiled_before(llm, timed)

    return run


def theirs(worker: Worker, max_tokens: int, lookup: int) -> Callable[[Ids], Turn]:
    def run(prompts: Ids) -> Turn:
        answer = worker.ask(do="generate", prompts=prompts, max_tokens=max_tokens, lookup=lookup)
        if short := [len(ids) for ids in answer["ids"] if len(ids) != max_tokens]:
            raise Missing(f"failed: emitted {short[0]} tokens, not {max_tokens}")
        return Turn(answer["ids"], answer["seconds"], rounds=answer["rounds"])

    return run


def equal_share(texts: Sequence[Ids], reference: Sequence[Ids]) -> float:
    """Of all tokens of ``reference``, those that ``texts`` have in the same place.

    Example: [1, 2, 3, 4] against [1, 2, 9, 4] is 0.75.
    """
    pairs = [(a, b) for ours, theirs in zip(texts, reference) for a, b in zip(ours, theirs, strict=True)]
    same = sum(x == y for a, b in pairs for x, y in zip(a, b))
    return same / sum(len(b) for _, b in pairs)


def summarize(contenders: Sequence[Contender], batch: int) -> dict[str, Any]:
    by_name = {c.name: c for c in contenders}
    rows = []
    for c in contenders:
        row: dict[str, Any] = dict(name=c.name, status=c.status)
        if c.status == "measured":
            row |= dict(tokens_per_second=spread(c.rates), equal_tokens=equal_share(c.texts, by_name[JEAGLE].texts))
            if c.tokens_per_call is not None:
                row |= dict(tokens_per_call=c.tokens_per_call)
            if c.metrics:
                row |= dict(rounds_by_tree=pooled(c.metrics).rounds_by_tree)
            for field, name in (("jeagle_over_it", JEAGLE), ("speculative_over_it", SPECULATIVE)):
                if name in by_name:
                    row[field] = spread([a / b for a, b in zip(by_name[name].rates, c.rates, strict=True)])
        rows.append(row)
    return dict(batch=batch, contenders=rows)


def print_table(run: dict[str, Any], title: str) -> None:
    ratios = ("jeagle / it", "speculative / it")
    numbers = ("tokens/s", *ratios, "equal", "a call")
    table = new_table("", "tokens/s", "quartiles", *numbers[1:], title=title, right=numbers)
    for row in run["contenders"]:
        if row["status"] != "measured":
            table.add_row(row["name"], row["status"])
            continue
        rate, cells = row["tokens_per_second"], []
        for field in ("jeagle_over_it", "speculative_over_it"):
            if found := row.get(field):
                quartiles = f"{found['quartile_1']:.2f} to {found['quartile_3']:.2f}, least {found['min']:.2f}"
                cells.append(f"{found['median']:.2f} ({quartiles})")
            else:
                cells.append("")
        about = f"{rate['quartile_1']:.1f} to {rate['quartile_3']:.1f}"
        cells += [f"{row['equal_tokens']:.0%}", f"{row['tokens_per_call']:.2f}" if "tokens_per_call" in row else ""]
        table.add_row(row["name"], f"{rate['median']:.1f}", about, *cells)
    make_console().print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Tokens per second, a group of contenders per batch; who could not take part has no bar."""
    runs = result["runs"]
    found: dict[str, list] = {row["name"]: [] for run in runs for row in run["contenders"]}
    for run in runs:
        for row in run["contenders"]:
            found[row["name"]].append(row.get("tokens_per_second"))
    figure = new_figure(f"{result['title']}\n{result['max_tokens']} tokens, {result['device']}", 10, 4.8)
    axes = figure.subplots()
    measured = {name: rates for name, rates in found.items() if any(rates)}
    grouped_bars(axes, [f"batch {run['batch']}" for run in runs], measured)
    axes.set(ylabel="tokens/s, prefill included (median, quartiles)")
    save_picture(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face directory, with a tokenizer")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp")
    parser.add_argument("--draft", help="EAGLE head, for jeagle's speculative runs")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--synthetic-acceptance", type=float, metavar="X", help="tokens per call of a chain of 3")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines, as EAGLE has them")
    parser.add_argument("--limit", type=int, metavar="N", help="N questions of each file, spread evenly over it")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="B")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--peer-python", nargs="+", default=[sys.executable], metavar="PATH", help="or PEER=PATH")
    parser.add_argument("--lookup", type=int, default=10, help="tokens that prompt lookup drafts; 0: without it")
    parser.add_argument("--vllm-head", type=Path, metavar="DIR", help="exported EAGLE-3 head, for a second vLLM")
    parser.add_argument("--vllm-drafts", type=int, default=3, metavar="N", help="tokens that it drafts")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    return parser.parse_args()


def pythons(given: Sequence[str]) -> dict[str, str]:
    """The interpreter of every peer. Example: ["py", "vllm=other"] is py for all but vllm."""
    named = dict(entry.split("=", 1) for entry in given if entry.split("=", 1)[0] in PEERS)
    common = [entry for entry in given if entry.split("=", 1)[0] not in PEERS] or [sys.executable]
    return {peer: named.get(peer, common[-1]) for peer in PEERS}


def join(args: argparse.Namespace, longest: int, contenders: list[Contender], workers: list[Worker]) -> dict[str, Any]:
    """Start every peer; those that cannot run stay in the table with the reason. Returns versions."""
    versions = {}
    entries: list[tuple[str, str, str | None]] = [(peer, peer, None) for peer in args.peers]
    if args.vllm_head:
        entries.append((VLLM_HEAD, "vllm", str(args.vllm_head)))
    for name, peer, head in entries:
        entrants = [Contender(name, lambda _: Turn([], 1.0))]
        if peer == "transformers" and args.lookup:
            entrants.append(Contender(LOOKUP, lambda _: Turn([], 1.0), most_rows=1))
        contenders += entrants
        try:
            worker = Worker(pythons(args.peer_python)[peer], Path(__file__).parent / "peers" / PEERS[peer])
            workers.append(worker)
            request = dict(do="load", model=str(args.model), gguf=args.gguf and str(args.gguf), dtype=args.dtype)
            request |= dict(head=head, drafts=args.vllm_drafts)
            size = dict(positions=longest + args.max_tokens, batch=max(args.batch), threads=os.cpu_count())
            versions[name] = worker.ask(**request, **size)["versions"]
        except (Missing, OSError) as why:
            for entrant in entrants:
                entrant.status = str(why) if isinstance(why, Missing) else f"failed: {why}"
            continue
        for entrant in entrants:
            entrant.run = theirs(worker, args.max_tokens, args.lookup if entrant.name == LOOKUP else 0)
    return versions


def measure(args: argparse.Namespace, workers: list[Worker]) -> dict[str, Any]:
    if min(args.batch) < 1 or args.repeats < 1 or args.max_tokens < 1 or args.lookup < 0:
        raise ValueError("--batch, --repeats and --max-tokens must be at least 1, --lookup at least 0")
    check_outputs(args.out, args.picture)
    if not args.model.is_dir():
        raise ValueError(f"{args.model} is not a directory; python -m convert.export_target writes one")
    if args.vllm_head and not args.vllm_head.is_dir():
        raise ValueError(f"{args.vllm_head} is not a directory; python -m convert.export writes one")
    questions = [q for path in args.prompts for q in load_questions(path, args.limit)]
    profile = None if args.synthetic_acceptance is None else constant_profile(args.synthetic_acceptance)
    here = environment()
    options: dict[str, Any] = dict(max_batch_size=max(args.batch), synthetic_acceptance=profile)
    llm = LLM(args.model, args.draft, tree=args.tree, dtype=args.dtype, **options)
    prompts = [llm.apply_chat_template(q.opening, today=REFERENCE_DATE) for q in questions]
    contenders = [Contender(JEAGLE, ours(llm, args.max_tokens, False))]
    if args.draft:
        contenders.append(Contender(SPECULATIVE, ours(llm, args.max_tokens, True)))
    versions = join(args, max(map(len, prompts)), contenders, workers)

    tree = tree_name(llm.plan) if args.draft else None
    title = f"{args.model.name}, {jnp.dtype(llm.dtype).name}{synthetic_note(profile)}"
    result: dict[str, Any] = dict(script="bench_peers", **here, title=title, model=str(args.model), draft=args.draft)
    result |= dict(tree=tree, dtype=jnp.dtype(llm.dtype).name, prompts=args.prompts, max_tokens=args.max_tokens)
    result |= dict(synthetic_acceptance=profile, repeats=args.repeats, peer_versions=versions, runs=[])
    result |= dict(prompt_tokens=spread([len(p) for p in prompts]))
    for batch in args.batch:
        for c in contenders:
            c.reset(batch)
        for repeat in tqdm(range(-1, args.repeats), desc=f"batch {batch}", disable=None):
            chosen = [prompts[(max(repeat, 0) * batch + i) % len(prompts)] for i in range(batch)]
            turn = np.roll(np.arange(len(contenders)), repeat)  # nobody always follows the same one
            for i in turn:
                contenders[i].take_turn(chosen, counts=repeat >= 0)
        result["runs"].append(summarize(contenders, batch))
        print_table(result["runs"][-1], f"{title}, batch {batch}, {args.max_tokens} tokens")
        if args.out:
            write_result(args.out, result)
    return result


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    args = parse_arguments()
    workers: list[Worker] = []
    try:
        return exit_code(lambda: measure(args, workers), with_picture(lambda result: None, draw, args.picture))
    finally:
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
