"""How fast is ``LLM.generate`` at every batch size, plain and with each tree?

    python scripts/bench_generate.py MODEL --draft HEAD --prompts scripts/prompts/mt_bench.jsonl --batch 1 2 4 8
    python scripts/bench_generate.py MODEL --draft HEAD --random-lengths 32 256 --tree chain-1 chain-3 --temperature 0 1
    python scripts/bench_generate.py --shape llama-3.2-1b --random-lengths 100 100 --synthetic-acceptance 2.8

For each temperature and batch size plain decoding and every tree generate for the same prompts in turns, so a machine
that slows down slows all alike; each repeat takes the next prompts of the files. A request emits --max-tokens tokens
(EOS ignored, unless --eos). Runs that had to compile are made again and do not count; compile seconds stand apart (few
where the cache of compiled programs was warm). Without --draft an untrained head drafts, at full cost.

    first token    prefill and one round, in milliseconds: the median over requests
    ms per token   decode time of a request's batch over its tokens: median and 99th percentile over requests
    tokens/s       all tokens of a batch over its wall time, tokenizer and prefill included: of all repeats
    speed-up       tokens/s over plain's in the same repeat: the median, and its spread in the JSON
    tokens a call  emitted tokens over target forwards, bonus token included; acceptance as in eval_acceptance.py
    of the floor   time that a round takes at least (weights of the target once and of the head once per draft step, at
                   the bandwidth measured at the end of this run) over the time it took
    memory         most bytes held so far by all engines: of the device where it says so, else of the process

--drop leaves a tree out of larger batches once it has been so much slower than plain decoding, which only gets worse.
--phases also times the verification of each tree alone (bench_decode.py's) and splits rounds into it and the rest: the
draft, acceptance and commit. --synthetic-acceptance forces what is kept, given as the tokens per call of a chain of 3
or as probabilities per depth: for shapes without a trained head, and said in every title. An interrupt ends the run
with the batch sizes that are done; one that was killed goes on from its --out when the same command is given again. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from bench_decode import Timed, verify_steps
from common import environment, exit_code, load_questions, spread, write_result
from engines import PLAIN, Engine, figures
from flax import nnx
from measuring import bandwidth, head_bytes, load_pair, make_batch, random_head, target_bytes
from reporting import check_outputs, make_console, new_figure, new_table, save_picture, synthetic_note
from rich.table import Table
from tqdm import tqdm

from jeagle import LLM, SamplingParams
from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.locate import cache_directory, locate
from jeagle.sizes import size
from jeagle.text import REFERENCE_DATE, encode_chat, load_tokenizer
from jeagle.tree import OFF, parse_tree
from jeagle.verify import check_profile, constant_profile


def verify_ms(target: Llama, taps: tuple[int, ...], nodes: int, batch: int) -> float:
    """Best time of one forward over ``nodes`` nodes and 100 positions, LM head, choice and commit included."""
    definition, params = nnx.split(target)
    state = Decoder(target).start(make_batch(batch, [1, 2, 3], 1), Program(plan=OFF), capacity=256, chunk=64)
    timed = Timed(partial(verify_steps, definition, num_nodes=nodes, taps=taps), params, state)
    for _ in range(3):
        timed.run()
    return timed.best * 1e3


def split_rounds(row: dict[str, Any], verify: float) -> None:
    """Rounds into verification and the rest; a best time cannot exceed what rounds took on average."""
    phases = row["ms_per_token_by_phase"]
    share = min(1.0, verify / row["round_ms"])
    rounds = phases.pop("rounds")
    row["ms_per_token_by_phase"] = dict(
        prefill=phases["prefill"], verify=rounds * share, draft=rounds * (1 - share), outside=phases["outside"]
    )


def print_table(console, runs: list[dict[str, Any]], title: str) -> None:
    names = ["batch", "first token ms", "ms per token", "p99", "tokens/s", "speed-up", "tokens a call", "of the floor"]
    names += ["memory MB", "compile s"]
    table: Table = new_table("tree", *names, "kept ≥ 1, 2, ..", title=title, right=names)
    for run in runs:
        ms = run["ms_per_token"]
        cells = [run["batch"], f"{run['first_token_ms']:.0f}", f"{ms['median']:.2f}", f"{ms['p99']:.2f}"]
        cells += [f"{run['tokens_per_second']:.1f}", f"{run['speedup']['median']:.2f}", f"{run['tokens_per_call']:.2f}"]
        cells += [f"{run['share_of_floor']:.0%}", f"{run['peak_memory_MB']:.0f}", f"{run['compile_s']:.1f}"]
        kept = " ".join(f"{share:.0%}" for share in run["acceptance_per_position"])
        table.add_row(run["tree"], *map(str, cells), kept)
    console.print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Speed-up against batch, with how many drafts the tree has that the dispatcher used most; acceptance per position
    at the smallest batch; ms per token and phase stacked."""
    first = result["runs"][0]["temperature"]
    runs = [run for run in result["runs"] if run["temperature"] == first]
    batches = sorted({run["batch"] for run in runs})
    trees = list(dict.fromkeys(run["tree"] for run in runs))
    figure = new_figure(result["title"] + f", temperature {first:g}", 15, 4.8)
    speed, kept, phases = figure.subplots(1, 3)
    colour = {tree: f"C{i % 10}" for i, tree in enumerate(trees)}
    for tree in trees:
        mine = sorted((run for run in runs if run["tree"] == tree), key=lambda run: run["batch"])
        medians = [run["speedup"]["median"] for run in mine]
        quartiles = [[run["speedup"][name] for run in mine] for name in ("quartile_1", "quartile_3")]
        about = np.abs(np.array(quartiles) - medians)
        at = [run["batch"] for run in mine]
        label = tree + " (drafts a round)" * (tree == "dispatch")
        speed.errorbar(at, medians, yerr=about, marker="o", capsize=3, color=colour[tree], label=label)
        for run, height in zip(mine if tree == "dispatch" else (), quartiles[1]):
            drafts = parse_tree(max(run["rounds_by_tree"], key=run["rounds_by_tree"].get)).num_nodes - 1
            above = dict(xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
            speed.annotate(str(drafts or "plain"), (run["batch"], height), color=colour[tree], **above)
        if acceptance := mine[0]["acceptance_per_position"]:
            kept.plot(range(1, len(acceptance) + 1), acceptance, marker="o", color=colour[tree], label=tree)
    speed.set_xscale("log", base=2)
    speed.set_xticks(batches, [str(b) for b in batches])
    highest = max(run["speedup"]["quartile_3"] for run in runs)
    speed.set(xlabel="batch", ylabel="tokens/s over plain's (median, quartiles)", ylim=(0, 1.15 * highest))
    deepest = max(1, *(len(run["acceptance_per_position"]) for run in runs))
    kept.set(xlabel="draft position k", ylabel=f"rounds that kept at least k drafts, batch {batches[0]}")
    kept.set(ylim=(0, 1.02), xlim=(0.8, deepest + 0.2), xticks=range(1, deepest + 1))
    names = list(dict.fromkeys(name for run in runs for name in run["ms_per_token_by_phase"]))
    ordered = sorted(runs, key=lambda run: (run["batch"], trees.index(run["tree"])))
    bottom = np.zeros(len(ordered))
    for i, name in enumerate(names):
        values = np.array([run["ms_per_token_by_phase"].get(name, 0.0) for run in ordered])
        phases.bar(range(len(ordered)), values, bottom=bottom, label=name, color=f"C{i}")
        bottom += values
    labels = [f"{run['tree']}, {run['batch']}" for run in ordered]
    phases.set_xticks(range(len(ordered)), labels, rotation=90, fontsize=6)
    phases.set(ylabel="ms per emitted token, all rows together", xlabel="tree, batch")
    save_picture(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="converted checkpoint, HF directory, hub name or .gguf")
    parser.add_argument("--shape", help="instead of a model: a named shape with random weights (jeagle.sizes)")
    parser.add_argument("--draft", help="EAGLE head, in the same forms or by name; none: an untrained one")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompts", nargs="+", metavar="FILE", help="JSON lines: EAGLE's, messages, or ShareGPT's")
    given.add_argument("--random-lengths", nargs=2, type=int, metavar=("LOW", "HIGH"), help="random ids, so many each")
    parser.add_argument("--limit", type=int, metavar="N", help="N questions of each file, spread evenly over it")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="B")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0], metavar="T", help="0 is greedy")
    parser.add_argument("--tree", nargs="+", default=["auto"], metavar="TREE", help="as LLM takes them")
    parser.add_argument("--drop", type=float, default=0.0, metavar="X", help="see above; 0: none")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="more of small ones, to N requests each")
    parser.add_argument("--eos", action="store_true", help="stop at EOS")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--synthetic-acceptance", nargs="+", type=float, metavar="X", help="2.8, or .7 .5 .4 by depth")
    parser.add_argument("--phases", action="store_true", help="also time verification alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    return parser.parse_args()


def repeats_of(args: argparse.Namespace, batch: int) -> int:
    return max(args.repeats, -(-args.requests // batch))


def read_prompts(args: argparse.Namespace, directory: Path | None, vocab_size: int) -> list[list[int]]:
    """Token ids: first turns through the chat template, or at random."""
    if args.random_lengths:
        low, high = args.random_lengths
        rng = np.random.default_rng(args.seed)
        lengths = rng.integers(low, high + 1, size=max(batch * repeats_of(args, batch) for batch in args.batch))
        return [rng.integers(3, vocab_size, size=length).tolist() for length in lengths]
    if directory is None:
        raise ValueError("--shape has no tokenizer: give --random-lengths")
    tokenizer = load_tokenizer(directory)
    questions = [question for path in args.prompts for question in load_questions(path, args.limit)]
    return [encode_chat(tokenizer, question.opening, today=REFERENCE_DATE) for question in questions]


def read_profile(args: argparse.Namespace) -> tuple[float, ...] | None:
    given = args.synthetic_acceptance
    if given is None:
        return None
    return constant_profile(given[0]) if len(given) == 1 and given[0] > 1 else check_profile(given)


def cut_short(path: Path | None, command: str) -> dict[str, Any]:
    """The rows that a killed run of the same command has left, and the commit that measured them; else none. All that
    is measured last is missing of them."""
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("command") == command and "bandwidth_GBps" not in found:
            return dict(runs=found["runs"], continued_from=found.get("continued_from") or found["commit"])
    return dict(runs=[], continued_from=None)


def too_slow(runs: list[dict[str, Any]], least: float, batch: int, temperature: float) -> set[str]:
    """The trees that at a smaller batch had less than ``least`` of plain decoding's speed."""
    smaller = [row for row in runs if row["temperature"] == temperature and row["batch"] < batch]
    return {row["tree"] for row in smaller if row["speedup"]["median"] < least} - {"dispatch"}


def compare(
    args: argparse.Namespace,
    engines: list[Engine],
    models: tuple[Llama, EagleHead],
    prompts: list[list[int]],
    batch: int,
    temperature: float,
) -> list[dict[str, Any]]:
    """A row per engine, the first of which is plain, at one batch size and temperature."""
    repeats = repeats_of(args, batch)
    asked = [[prompts[(r * batch + i) % len(prompts)] for i in range(batch)] for r in range(repeats)]
    common = dict(max_tokens=args.max_tokens, temperature=temperature, ignore_eos=not args.eos)
    params = [[SamplingParams(**common, seed=args.seed + r * batch + i) for i in range(batch)] for r in range(repeats)]
    for engine in engines:
        engine.warm_up(asked[0], params[0])
    for repeat in tqdm(range(repeats), desc=f"batch {batch}, temperature {temperature:g}", disable=None):
        for engine in engines:
            engine.run(asked[repeat], params[repeat])
    rows = []
    for engine in engines:
        row = dict(batch=batch, temperature=temperature, **figures(engine, engines[0]))
        if args.phases and engine.name != "dispatch":  # whose rounds are of several sizes
            nodes = engine.llm.plan.num_nodes if engine.speculative else 1
            target, head = models
            split_rounds(row, verify_ms(target, head.config.taps if engine.speculative else (), nodes, batch))
        rows.append(row)
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be refused is refused before the model is loaded, or as it is."""
    if (args.model is None) == (args.shape is None):
        raise ValueError("give a model or --shape, one of the two")
    if min(args.batch) < 1 or args.repeats < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--batch, --repeats and --limit must be at least 1")
    if args.random_lengths and not 1 <= args.random_lengths[0] <= args.random_lengths[1]:
        raise ValueError("--random-lengths must be two whole numbers from 1, the smaller one first")
    check_outputs(args.out, args.picture)
    profile = read_profile(args)
    here = environment()
    if args.shape:
        dtype = "float32" if args.dtype == "auto" else args.dtype
        target, head, directory = Llama(size(args.shape), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)), None, None
    else:
        target, head, directory = load_pair(args.model, args.draft, args.dtype)
    head = random_head(target) if head is None else head
    prompts = read_prompts(args, directory, target.config.vocab_size)
    options: dict[str, Any] = dict(max_batch_size=max(args.batch), synthetic_acceptance=profile)
    # By name where it has one, so that what comes beside it is found.
    draft = locate(args.draft, cache_directory(), kind="eagle", target=directory) if args.draft else head
    engines = [Engine(name, LLM(target, draft, tree=name, **options), True) for name in args.tree]
    engines.insert(0, Engine(PLAIN, engines[0].llm, False))

    dtype = jnp.dtype(target.compute_dtype).name
    name = (args.shape and f"{args.shape}, random weights") or Path(args.model).name
    heading = f"{name}, {(args.draft and Path(args.draft).name) or 'untrained head'}, {dtype}{synthetic_note(profile)}"
    result: dict[str, Any] = dict(
        script="bench_generate", **here, title=heading, model=args.model or args.shape, draft=args.draft, dtype=dtype
    )
    result |= dict(max_tokens=args.max_tokens, repeats=args.repeats, stops_at_eos=args.eos, seed=args.seed)
    result |= dict(prompts=args.prompts or f"random, {args.random_lengths[0]} to {args.random_lengths[1]} tokens")
    result |= dict(synthetic_acceptance=profile, prompt_tokens=spread([len(p) for p in prompts]))
    result |= dict(cut_short(args.out, here["command"]), interrupted=False)
    done = {(row["temperature"], row["batch"]) for row in result["runs"]}
    try:
        for temperature, batch in itertools.product(args.temperature, args.batch):
            if (temperature, batch) not in done:
                lost = too_slow(result["runs"], args.drop, batch, temperature)
                asked = [engine for engine in engines if engine.name not in lost]
                result["runs"] += compare(args, asked, (target, head), prompts, batch, temperature)
            if args.out:
                write_result(args.out, result)
    except KeyboardInterrupt:
        if not result["runs"]:
            raise
        result["interrupted"] = True
        print("interrupted: the batch sizes that are done are kept", file=sys.stderr)
    # Last, as its arrays would count as memory that generating takes.
    speed, read, per_step = bandwidth(), target_bytes(target), head_bytes(head, target)
    result |= dict(bandwidth_GBps=speed / 1e9, weights_MB=read / 1e6, head_MB=per_step / 1e6)
    for row in result["runs"]:
        row["share_of_floor"] = (read + row["draft_steps"] * per_step) / speed / (row["round_ms"] / 1e3)
    if args.out:
        write_result(args.out, result)
    for temperature in args.temperature:
        rows = [row for row in result["runs"] if row["temperature"] == temperature]
        print_table(make_console(), rows, f"{heading}, temperature {temperature:g}")
    if args.picture:
        draw(args.picture, result)
    return result


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    args = parse_arguments()
    return exit_code(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
