"""How many tokens does one call of the target give, with this head, on these questions?

    python scripts/eval_acceptance.py MODEL HEAD --prompts scripts/prompts/mt_bench.jsonl --out result.json
    python scripts/eval_acceptance.py MODEL HEAD --prompts A.jsonl B.jsonl --temperature 0 1 --tree chain-4 eagle-26 ...
    python scripts/eval_acceptance.py MODEL HEAD --prompts A.jsonl --limit 16 --speed --picture result.png

One table per prompt file, temperature and tree: a row per category and one for the whole file.

**Tokens per call** (tau) is the number of tokens that the decode rounds emitted over the number of target forwards in
those rounds, one per round. It includes the bonus token, the target's own choice after the last draft token it kept: a
round that keeps k draft tokens emits k + 1, and plain decoding has tau = 1. The prompt's prefill is not counted,
neither its forwards nor a token: an answer's first token, too, is emitted by a round. Over a set of answers tau is all
tokens over all rounds, not the mean of the answers' ratios, so long answers weigh more. A round that EOS or max_tokens
cuts short counts as one round with the tokens it still emitted. (Meta's "tokens per call", arXiv:2508.08192; EAGLE's
"average acceptance length", arXiv:2401.15077.)

**Acceptance** at position k is the share of rounds that kept at least k draft tokens, a cut round again with what it
emitted; tau is 1 plus the sum over k. The **histogram** counts the rounds that kept 0, 1, 2, ... draft tokens.

**Repeated** is no property of the head but of the text, and says how easy it was: the share of the answers' tokens
that followed the two tokens before them the last time those stood side by side, in the prompt or the answer. A small
model repeats itself, the more the lower the temperature.

A tree without "+lookup" in its name measures the head alone. With it, **lookups** is the share of the rounds whose
drafts were looked up in the text (jeagle/lookup.py).

Sampled answers (temperature above 0) have a seed per question and turn, made of --seed and the question's line in its
file: the same text for every tree, --batch and --limit. Only the first turn is asked, unless --all-turns goes on with
the model's own answer.

--speed serves the questions one at a time (batch 1), plainly and speculatively in turns in one process, and adds tokens
per second of both, prefill included, and the speed-up: the median over answers of the ratio of the two, and its spread.
Compiling is not timed. In float32 the two answers must be equal, else the exit code is 1; in bfloat16 the number of
equal ones is only reported (the README says why they may part).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import (
    Question,
    add_mesh,
    chat,
    chat_in_pairs,
    environment,
    load_questions,
    mesh,
    pooled,
    spread,
    tokens_per_second,
    write_result,
)
from reporting import check_outputs, make_console, new_figure, new_table
from rich.console import Console

from jeagle import LLM, RequestOutput, SamplingParams
from jeagle.tree import parse_tree

WHOLE = "whole file"


@dataclass(frozen=True)
class Answer:
    """One turn of one question."""

    question: Question
    speculative: RequestOutput
    plain: RequestOutput | None = None  # with --speed


def repeated(prompt: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens of the answer followed the two before them the last time. Example: of [1, 2, 3] after [1, 2, 3]
    the last one."""
    followed: dict[tuple[int, int], int] = {}
    ids, found = [*prompt, *answer], 0
    for i in range(2, len(ids)):
        pair = ids[i - 2], ids[i - 1]
        found += i >= len(prompt) and followed.get(pair) == ids[i]
        followed[pair] = ids[i]
    return found


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """A row of the table."""
    total = pooled([a.speculative.metrics for a in answers])
    texts = [(a.speculative.prompt_token_ids, a.speculative.outputs[0].token_ids) for a in answers]
    return dict(
        answers=len(answers),
        rounds=total.num_rounds,
        tokens=total.num_emitted,
        tokens_per_call=total.tokens_per_call,
        acceptance_per_position=total.acceptance_per_position,
        acceptance_histogram=total.acceptance_histogram,
        lookup_histogram=total.lookup_histogram,
        repeated=sum(repeated(*text) for text in texts) / sum(len(answer) for _, answer in texts),
    )


def speed_figures(pairs: Sequence[tuple[RequestOutput, RequestOutput]]) -> dict[str, Any]:
    """Of (plain, speculative) answers to the same questions. Ratios are of tokens per second."""

    def ratios(prefill: bool) -> list[float]:
        return [tokens_per_second([s], prefill=prefill) / tokens_per_second([p], prefill=prefill) for p, s in pairs]

    return dict(
        plain_tokens_per_second=tokens_per_second([p for p, _ in pairs]),
        speculative_tokens_per_second=tokens_per_second([s for _, s in pairs]),
        speedup=spread(ratios(prefill=True)),
        speedup_without_prefill=spread(ratios(prefill=False)),
        equal_answers=sum(p.outputs[0].token_ids == s.outputs[0].token_ids for p, s in pairs),
    )


def converse(llm: LLM, questions: Sequence[Question], temperature: float, args: argparse.Namespace) -> list[Answer]:
    """Every question answered, turn by turn."""
    talks = [q.opening[:-1] for q in questions]
    answers = []
    for turn in range(max(len(q.turns) for q in questions) if args.all_turns else 1):
        asked = [(q, talk) for q, talk in zip(questions, talks, strict=True) if turn < len(q.turns)]
        params = []
        for q, talk in asked:
            talk.append({"role": "user", "content": q.turns[turn]})
            (seed,) = np.random.SeedSequence([args.seed, q.line, turn]).generate_state(1, np.uint64).tolist()
            params.append(SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=seed))
        conversations = [talk for _, talk in asked]
        plain: Sequence[RequestOutput | None] = [None] * len(asked)
        if args.speed:
            plain, speculative = chat_in_pairs(llm, conversations, params)
        else:
            speculative = chat(llm, conversations, params)
        for (q, talk), p, s in zip(asked, plain, speculative, strict=True):
            answers.append(Answer(q, s, p))
            talk.append({"role": "assistant", "content": s.outputs[0].text})
    return answers


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """What one run (file, temperature, tree) found: the whole file, its categories in order, speeds if timed."""
    categories: dict[str, list[Answer]] = {}
    for answer in answers:
        categories.setdefault(answer.question.category, []).append(answer)
    found: dict[str, Any] = dict(whole=figures(answers), categories={c: figures(a) for c, a in categories.items()})
    if pairs := [(a.plain, a.speculative) for a in answers if a.plain is not None]:
        found["speed"] = speed_figures(pairs)
    return found


def label(run: dict[str, Any]) -> str:
    return f"{Path(run['prompts']).stem}, temperature {run['temperature']:g}, {run['tree']}"


def rows(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {**run["categories"], WHOLE: run["whole"]}


def print_table(console: Console, run: dict[str, Any]) -> None:
    depth = len(run["whole"]["acceptance_per_position"])
    numbers = (
        "answers",
        "tokens",
        "rounds",
        "tokens per call",
        *(f"kept ≥ {k}" for k in range(1, depth + 1)),
        "lookups",
        "repeated",
    )
    table = new_table("category", *numbers, "rounds that kept 0, 1, 2, ...", title=label(run), right=numbers)
    for name, row in rows(run).items():
        cells = [f"{row['answers']}", f"{row['tokens']}", f"{row['rounds']}", f"{row['tokens_per_call']:.2f}"]
        lookups = sum(row["lookup_histogram"]) / max(1, row["rounds"])
        cells += [f"{share:.0%}" for share in (*row["acceptance_per_position"], lookups, row["repeated"])]
        if name == WHOLE:
            table.add_section()
        table.add_row(name, *cells, " ".join(map(str, row["acceptance_histogram"])))
    console.print(table)
    if "speed" in run:
        speed, ratio = run["speed"], run["speed"]["speedup"]
        console.print(
            f"  plain {speed['plain_tokens_per_second']:.1f} tok/s, speculative "
            f"{speed['speculative_tokens_per_second']:.1f} tok/s: {ratio['median']:.2f}x (quartiles "
            f"{ratio['quartile_1']:.2f} to {ratio['quartile_3']:.2f}, all {ratio['min']:.2f} to {ratio['max']:.2f}; "
            f"without prefill {speed['speedup_without_prefill']['median']:.2f}x); {speed['equal_answers']} of "
            f"{run['whole']['answers']} answers equal\n",
            highlight=False,
        )


def draw(path: Path, runs: Sequence[dict[str, Any]], title: str) -> None:
    """Left: acceptance per position, a line per run. Right: tokens per call, a bar per category and run."""
    names = [*dict.fromkeys(c for run in runs for c in run["categories"]), WHOLE]
    bars = [(name, i, rows(run)[name]) for name in names for i, run in enumerate(runs) if name in rows(run)]
    figure = new_figure(title, 13, max(4.5, 1.8 + 0.2 * len(bars) + 0.15 * len(names)))
    curves, columns = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        acceptance = run["whole"]["acceptance_per_position"]
        style = dict(color=f"C{i % 10}", marker="osD^v"[i // 10 % 5], clip_on=False, label=label(run))
        curves.plot(range(1, len(acceptance) + 1), acceptance, **style)
    deepest = max(len(run["whole"]["acceptance_per_position"]) for run in runs)
    curves.set(xlabel="draft position k", ylabel="share of rounds that kept at least k draft tokens")
    curves.set(ylim=(0, 1.02), xlim=(0.8, max(deepest, 2) + 0.2), xticks=range(1, max(deepest, 2) + 1))
    curves.grid(alpha=0.3)

    # One unit per bar and one of air between categories, from the top down.
    place, ticks, at = 0.0, {}, []
    for name in names:
        count = sum(bar[0] == name for bar in bars)
        ticks[name] = place + (count - 1) / 2
        at += [place + j for j in range(count)]
        place += count + 1
    values = [row["tokens_per_call"] for *_, row in bars]
    drawn = columns.barh(at, values, height=0.9, color=[f"C{i % 10}" for _, i, _ in bars])
    columns.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    columns.axvline(1, color="black", linewidth=0.8, linestyle="--")
    columns.set_yticks([*ticks.values()], [*ticks])
    columns.set(xlabel="tokens per call (dashed: plain decoding)", xlim=(0, max(values) * 1.12))
    columns.invert_yaxis()
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(runs)), fontsize=9)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="converted checkpoint, HF directory, hub name or .gguf; with a chat template")
    parser.add_argument("head", help="EAGLE head, in any of the same forms")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines, as EAGLE has them")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0], metavar="T", help="0 is greedy")
    parser.add_argument("--tree", nargs="+", default=["chain-4"], metavar="TREE", help="chain-K, eagle-26, dynamic...")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--batch", type=int, default=8, help="questions side by side; 1 with --speed")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add_mesh(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="N questions of each file, spread evenly over it")
    turns = parser.add_mutually_exclusive_group()
    turns.add_argument("--first-turn-only", action="store_true", help="the default")
    turns.add_argument("--all-turns", action="store_true", help="go on with the model's answer")
    parser.add_argument("--speed", action="store_true", help="also time plain and speculative decoding at batch 1")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures, anew after every table")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    args.batch = 1 if args.speed else args.batch
    return args


def evaluate(args: argparse.Namespace) -> int:
    """Everything that can be refused is refused before the model is loaded, or as it is."""
    for name, low in (("limit", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            raise ValueError(f"--{name} must be at least {low}, got {value}")
    for temperature in args.temperature:
        SamplingParams(max_tokens=args.max_tokens, temperature=temperature)
    trees = {name: parse_tree(name) for name in args.tree}
    files = {path: load_questions(path, args.limit) for path in args.prompts}
    check_outputs(args.out, args.picture)

    about = environment()
    llm = LLM(args.model, args.head, dtype=args.dtype, max_batch_size=args.batch, **mesh(args))
    dtype = jnp.dtype(llm.dtype).name
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = dict(
        script="eval_acceptance",
        **about,
        model=args.model,
        head=args.head,
        dtype=dtype,
        batch=args.batch,
        **mesh(args),
        max_tokens=args.max_tokens,
        seed=args.seed,
        turns="all" if args.all_turns else "first",
        runs=runs,
    )
    console = make_console()
    for path, questions in files.items():
        for temperature in args.temperature:
            for name, plan in trees.items():
                llm.plan = plan  # one copy of the weights for all trees
                answers = converse(llm, questions, temperature, args)
                shape = dict(nodes=plan.num_nodes, depth=plan.max_depth)
                asked = dict(prompts=path, temperature=temperature, tree=name, **shape)
                runs.append({**asked, **summarize(answers)})
                print_table(console, runs[-1])
                if args.out:
                    write_result(args.out, result)
    if args.picture:
        draw(args.picture, runs, f"{Path(args.head).name} on {Path(args.model).name}, {dtype}, batch {args.batch}")
    unequal = [label(run) for run in runs if args.speed and run["speed"]["equal_answers"] < run["whole"]["answers"]]
    if unequal and dtype == "float32":
        raise ValueError(f"plain and speculative answers differ in float32: {'; '.join(unequal)}")
    return 0


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    args = parse_arguments()
    try:
        return evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
