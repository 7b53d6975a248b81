"""Which draft tree is fastest, batch size by batch size, on this machine with this head?

    python scripts/search_tree.py MODEL HEAD --prompts scripts/prompts/mt_bench.jsonl --limit 16 --out trees.json
    python scripts/search_tree.py MODEL HEAD --prompts A.jsonl --temperature 0 1 --batch 1 4 16 --nodes 2 4 8 16

Three steps. (1) The questions are answered under a wide tree, and the target's choices counted: how often it takes the
head's child of each rank at each depth, its parent being taken. Parents are first children; other ones are taken to
have children as good. Rows whose text repeats itself are drafted from it (jeagle/lookup.py), and counted apart: how
many rounds do, and how far it goes. (2) For every size and depth the tree with the most expected tokens is found
(Sequoia, arXiv:2402.12374; jeagle/tree_search.py), and given lookups of as many tokens. (3) A round of each is timed at
each batch size (jeagle/costs.py), plain decoding beside them, and lookups alone, which is what a round takes where all
rows look up; tokens per second are expected tokens over seconds.

**Expected tokens** are per call of the target and row, the bonus token included, so plain decoding has 1.
**Evenness** is what a batch's slowest row leaves of them (``Rates.evenness``): rows that are done wait for the others.
**Speed-up** is over plain decoding at the same batch size, of the decode rounds alone. **best**, for ``"auto"``, is the
fastest, or plain decoding ("off") where no tree promises --gain over it: texts differ, and short answers to MT-Bench
kept 1.9 tokens per call of a chain of 3 where SmolLM2's own questions promised 2.6. **candidates**, for ``"dispatch"``,
which finds that out, are the fastest that draft.

Written to ``trees.json`` in the head's directory, the result is what ``LLM(tree="auto")`` drafts and
``LLM(tree="dispatch")`` begins with (jeagle/tree_table.py), where two temperatures are given for greedy and for sampled
requests; it is a cost table, too, for ``Dispatch(candidates=[...], costs="trees.json")``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import add_mesh, environment, exit_code, load_questions, mesh
from reporting import check_outputs, make_console, new_table
from rich.markup import escape

from jeagle import LLM, SamplingParams
from jeagle.acceptance import Acceptance, Rates
from jeagle.costs import CostTable, Setting, measure_rounds
from jeagle.decode import Program
from jeagle.dispatch import Dispatch, seconds_with_lookups
from jeagle.sampling import Filters
from jeagle.text import REFERENCE_DATE
from jeagle.tree import LONGEST, OFF, StaticTree, tree_name, with_lookup
from jeagle.tree_search import best_trees, comb


def counted(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[Acceptance, np.ndarray]:
    """What the target took, over all answers, and the tokens per call of each."""
    assert llm.dispatcher is not None
    outputs = llm.generate(prompts, params)
    calls_R = np.array([output.metrics.tokens_per_call for output in outputs])
    return llm.dispatcher.acceptance[params.temperature > 0], calls_R


def spread(calls_R: np.ndarray) -> float:
    """``Rates.spread`` of answers with so many tokens per call."""
    kept_R = calls_R - 1
    return float(kept_R.std() / max(float(kept_R.mean()), 1e-9))


def always(plan: StaticTree) -> Dispatch:
    """A dispatcher that counts and never chooses another tree: by its table all others take an hour."""
    costs = CostTable({Setting(1, 1, False): {OFF: 3600.0, plan: 1e-3}})
    return Dispatch(candidates=[plan], costs=costs, probe_share=0.0, half_life=np.inf)


def rows_of(rates: Rates, batch: int, measured: dict[StaticTree, float]) -> list[dict[str, Any]]:
    """A row per tree, the fastest first. measured: lookups alone among them, which other rates hold of."""
    seconds = seconds_with_lookups(measured, rates.lookup_share**batch)

    def row(plan: StaticTree) -> dict[str, Any]:
        tokens, even = rates.tokens(plan), rates.evenness(plan, batch)
        return dict(
            tree=tree_name(plan),
            nodes=plan.num_nodes,
            depth=plan.max_depth,
            round_ms=seconds[plan] * 1e3,
            expected_tokens=tokens,
            evenness=even,
            speedup=tokens * even * seconds[OFF] / seconds[plan],
        )

    return sorted((row(plan) for plan in seconds if plan == OFF or plan.levels), key=lambda r: -r["speedup"])


def fastest_draft(rows: list[dict[str, Any]]) -> str:
    return next(row["tree"] for row in rows if row["tree"] != "off")


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    table = new_table(*names, title=title, right=[name for name in names if name != "tree"])
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else escape(str(value)) for value in row.values()))
    make_console().print(table)


def search(llm: LLM, prompts: list[list[int]], temperature: float, args: argparse.Namespace) -> dict[str, Any]:
    """All three steps, and what they found."""
    params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=0)
    acceptance, calls_R = counted(llm, prompts, params)
    rates = dataclasses.replace(acceptance.rates, spread=spread(calls_R))
    found_trees = best_trees(rates.rate_DC, args.nodes, args.depths)
    trees = list(dict.fromkeys([OFF, *(StaticTree((), n - 1) for n in args.nodes), *map(with_lookup, found_trees)]))
    program = Program(filters=Filters.needed([params]))
    settings = [Setting(batch, args.capacity, temperature > 0) for batch in args.batch]
    costs = CostTable({s: measure_rounds(llm._decoder, program, trees, s) for s in settings})
    found = {s.batch: rows_of(rates, s.batch, costs.seconds(s)) for s in settings}
    for batch, rows in found.items():
        print_rows(f"temperature {temperature:g}, batch {batch}", rows)
    return dict(
        temperature=temperature,
        rate=rates.rate_DC.tolist(),
        lookup_share=rates.lookup_share,
        lookup_rate=rates.lookup_rate_D.tolist(),
        spread=rates.spread,
        tried=acceptance.tried_DC.tolist(),
        lookup_tried=acceptance.looked_tried_D.tolist(),
        tokens_per_call=calls_R.tolist(),
        best={b: rows[0]["tree"] if rows[0]["speedup"] >= 1 + args.gain else "off" for b, rows in found.items()},
        candidates=list(dict.fromkeys(fastest_draft(rows) for rows in found.values())),
        trees=found,
        rounds=costs.rows(),
    )


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="converted checkpoint, HF directory, hub name or .gguf")
    parser.add_argument("head", help="EAGLE head, in the same forms or by name")
    parser.add_argument("--prompts", required=True, help="questions, a JSON-lines file")
    parser.add_argument("--limit", type=int, help="ask only so many, spread evenly over the file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0], help="0, another, or both: first 0, then sampled answers"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="1 4 16, times --data-parallel-size")
    parser.add_argument("--capacity", type=int, default=512, help="cache positions per row; half are the context")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="most nodes, the root included")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 5], help="most levels below the root")
    parser.add_argument("--ranks", type=int, default=8, help="children per node of the wide tree")
    parser.add_argument("--gain", type=float, default=0.25, help="what a tree must promise over plain decoding")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "fp8"])
    add_mesh(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the JSON here")
    args = parser.parse_args()

    def measure() -> dict[str, Any]:
        args.batch = args.batch or [batch * max(1, args.data_parallel_size) for batch in (1, 4, 16)]
        first, *more = args.temperature
        if len(more) > 1 or (more and (first != 0 or more[0] == 0)):
            raise ValueError(f"--temperature takes one number, or 0 and another, got {args.temperature}")
        for name, least in (("nodes", 2), ("depths", 1), ("batch", 1), ("ranks", 1), ("data_parallel_size", 1)):
            if np.min(getattr(args, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
        if uneven := [batch for batch in args.batch if batch % args.data_parallel_size]:
            raise ValueError(
                f"--batch {uneven[0]} does not split over {args.data_parallel_size} groups of devices; give multiples"
            )
        check_outputs(args.out, None)
        here = environment()
        wide = dataclasses.replace(comb(max(args.depths), args.ranks), lookup=LONGEST)
        llm = LLM(args.model, args.head, tree=always(wide), dtype=args.dtype, **mesh(args))
        questions = load_questions(args.prompts, args.limit)
        prompts = [llm.apply_chat_template(q.opening, today=REFERENCE_DATE) for q in questions]
        about = dict(model=args.model, head=args.head, **mesh(args), prompts=args.prompts, answers=len(prompts))
        result = dict(
            script="search_tree", **here, **about, max_tokens=args.max_tokens, **search(llm, prompts, first, args)
        )
        for temperature in more:
            result["sampled"] = search(llm, prompts, temperature, args)
        return result

    return exit_code(measure, out=args.out)


if __name__ == "__main__":
    sys.exit(main())
