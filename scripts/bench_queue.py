"""More requests than places: what is it worth that who waits takes the place of who has finished?

    python scripts/bench_queue.py models/smollm2-135m --prompts scripts/prompts/mt_bench.jsonl --places 8 32

The questions of the files, each with its own limit of tokens, drawn from --lengths, go through ``LLM.generate`` twice,
in turns: all at once, so that rows take turns in the batch, and in batches of --places, each as long as its longest row
(of neighbours in the queue's own order). Shown are tokens per second, prefill included, and the rounds that all batches
took. With --draft both ways draft.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import environment, exit_code, load_questions, pooled, spread
from measuring import compiled_before
from reporting import check_outputs, grouped_bars, make_console, new_figure, new_table, save_picture, with_picture

from jeagle import LLM, RequestOutput, SamplingParams
from jeagle.decode import DecodeState, Program
from jeagle.text import REFERENCE_DATE

WAYS = ("in turns", "in batches")


def read_prompts(llm: LLM, args: argparse.Namespace) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, the longest first as ``requests.queues`` has them, and their parameters."""
    questions = [question for path in args.prompts for question in load_questions(path, args.limit)]
    chats = (llm.apply_chat_template(question.opening, today=REFERENCE_DATE) for question in questions)
    prompts = sorted(chats, key=len, reverse=True)
    limits = np.random.default_rng(args.seed).integers(args.lengths[0], args.lengths[1] + 1, len(prompts)).tolist()
    return prompts, [SamplingParams(max_tokens=n, temperature=args.temperature, seed=i) for i, n in enumerate(limits)]


class Rounds:
    """Counts those that a decoder runs, whatever takes part."""

    def __init__(self, llm: LLM):
        self.count = 0
        self._launch = llm._decoder.launch
        llm._decoder.launch = self._counted  # type: ignore[method-assign]

    def _counted(self, state: DecodeState, program: Program, most_rounds: int, least_running: int = 1) -> DecodeState:
        before = np.array(state.num_rounds_B)  # copied: the state is donated
        state = self._launch(state, program, most_rounds, least_running)
        self.count += int((np.array(state.num_rounds_B) - before).max())
        return state


def serve(llm: LLM, way: str, places: int, prompts: list, params: Sequence[SamplingParams]) -> list[RequestOutput]:
    size = len(prompts) if way == "in turns" else places
    slices = [slice(i, i + size) for i in range(0, len(prompts), size)]
    once = dict(speculative=llm.plan.num_nodes > 1, use_tqdm=False)
    return [out for some in slices for out in llm.generate(prompts[some], params[some], **once)]


def compare(args: argparse.Namespace, places: int) -> dict[str, Any]:
    sizes = dict(max_batch_size=places, prefill_workers=args.prefill_workers)
    llm = LLM(args.model, args.draft, tree=args.tree, dtype=args.dtype, **sizes)
    prompts, params = read_prompts(llm, args)
    rounds = Rounds(llm)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    counts: dict[str, int] = {}
    texts: dict[str, list] = {}
    for repeat in range(args.repeats + 1):
        for way, found in rates.items():
            rounds.count = 0

            def timed(way: str = way) -> tuple[float, list[RequestOutput]]:
                began = time.perf_counter()
                outputs = serve(llm, way, places, prompts, params)
                return time.perf_counter() - began, outputs

            seconds, outputs = timed() if repeat == 0 else compiled_before(llm, timed)
            if repeat:  # the first compiles
                found.append(sum(len(out.outputs[0].token_ids) for out in outputs) / seconds)
                counts[way] = rounds.count
            texts[way] = [out.outputs[0].token_ids for out in outputs]
    ours, theirs = rates.values()
    tau = pooled([out.metrics for out in outputs]).tokens_per_call
    return dict(
        places=places,
        requests=len(prompts),
        tokens=sum(map(len, texts[WAYS[0]])),
        tokens_per_second={way: spread(found) for way, found in rates.items()},
        ratio=spread([a / b for a, b in zip(ours, theirs, strict=True)]),
        rounds=counts,
        tokens_per_call=tau,
        equal_texts=sum(a == b for a, b in zip(*texts.values(), strict=True)),
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= args.lengths[0] <= args.lengths[1]:
        raise ValueError(f"--lengths must be two numbers, the smaller first, got {args.lengths}")
    if min(args.places) < 1 or args.repeats < 1:
        raise ValueError("--places and --repeats must be at least 1")
    check_outputs(args.out, args.picture)
    here = environment()
    about = dict(model=args.model, draft=args.draft, tree=args.tree if args.draft else None, dtype=args.dtype)
    about |= dict(prompts=list(map(str, args.prompts)), lengths=args.lengths, temperature=args.temperature)
    about |= dict(prefill_workers=args.prefill_workers)
    if args.dtype == "auto":
        about["dtype"] = jnp.dtype(LLM(args.model).dtype).name
    return dict(script="bench_queue", **here, **about, runs=[compare(args, places) for places in args.places])


def print_table(result: dict[str, Any]) -> None:
    columns = ("places", "requests", "tokens", *(f"tokens/s {way}" for way in WAYS), "ratio", "rounds", "equal texts")
    table = new_table(*columns, title=f"{result['model']}, {result['dtype']}", right=columns)
    for run in result["runs"]:
        rates = [f"{found['median']:.1f}" for found in run["tokens_per_second"].values()]
        cells = [run["places"], run["requests"], run["tokens"], *rates, f"{run['ratio']['median']:.2f}"]
        table.add_row(*map(str, cells), " / ".join(map(str, run["rounds"].values())), str(run["equal_texts"]))
    make_console().print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Tokens per second and rounds, a group of both ways per number of places."""
    runs, (low, high) = result["runs"], result["lengths"]
    about = f"{runs[0]['requests']} requests of {low} to {high} tokens"
    figure = new_figure(f"{result['model']}, {result['dtype']}, {about}, {result['device']}", 10, 4.5)
    places = [f"{run['places']} places" for run in runs]
    both = (
        ("tokens_per_second", "tokens/s, prefill included (median, quartiles)"),
        ("rounds", "rounds of all batches"),
    )
    for axes, (field, label) in zip(figure.subplots(1, 2), both, strict=True):
        grouped_bars(axes, places, {way: [run[field][way] for run in runs] for way in WAYS})
        axes.set(ylabel=label)
    save_picture(figure, path)


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="converted checkpoint, HF directory, hub name or .gguf, with a chat template")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE.jsonl", help="of questions")
    parser.add_argument("--limit", type=int, help="questions of each file, spread over it")
    parser.add_argument("--draft", help="EAGLE head, in the same forms or by name; without one both ways are plain")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--places", type=int, nargs="+", default=[8], help="rows side by side")
    parser.add_argument("--prefill-workers", type=int, default=0, metavar="N", help="further devices, for prompts")
    parser.add_argument("--lengths", type=int, nargs=2, default=[16, 256], help="of the answers, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    return exit_code(lambda: measure(args), with_picture(print_table, draw, args.picture), args.out)


if __name__ == "__main__":
    sys.exit(main())
