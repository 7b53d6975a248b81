"""Does it stay as fast, and as small? Host share, long answers, and memory over many requests.

    python scripts/bench_steady.py models/smollm2-135m --draft smollm2-135m-eagle3 --out steady.json

Three things, at batch 1, plain and (with a draft) speculative:

    host     the share of generate's decode time that is spent outside the device loop
    length   decode tokens per second of answers of --long tokens over those of answers of --short ones, in turns; each
             in the cache that LLM gives a request of its length. And the same of rounds: what a text repeats of itself
             makes drafts good or bad, and is no matter of length
    memory   bytes held after each of --requests requests of different lengths, one after the other; the growth is that
             from the end of the first quarter, when every shape has been compiled, to the last request

host and length ask a prompt of random ids, after which the model soon says the same again and again and drafts are
nearly always right; --prompt asks a text of yours.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import environment, exit_code, pooled, spread, tokens_per_second
from measuring import compiled_before, host_share, memory_now
from reporting import check_outputs, grouped_bars, make_console, new_figure, new_table, save_picture, with_picture
from tqdm import tqdm

from jeagle import LLM, SamplingParams
from jeagle.tree import tree_name

PROMPT = 100  # tokens
LENGTHS = (5, 40, 100, 17, 63, 90)  # of the prompts whose memory is watched


def make_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, size=length).tolist()


def read_prompt(llm: LLM, text: str | None) -> list[int]:
    """What a user says, or random ids."""
    if text is None:
        return make_prompt(llm.config.vocab_size, PROMPT, 0)
    return llm.apply_chat_template([dict(role="user", content=text)])


def long_and_short(
    llm: LLM, prompt: list[int], speculative: bool, long: int, short: int, repeats: int
) -> dict[str, Any]:
    """Decode tokens per second of answers of both lengths, prefill left out."""
    rates: dict[int, list[float]] = {short: [], long: []}
    calls: dict[int, float] = {}
    for _ in tqdm(range(repeats), desc="lengths", disable=None):
        for tokens, found in rates.items():
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            run = partial(llm.generate, prompt, params, speculative=speculative, use_tqdm=False)
            outputs = compiled_before(llm, run)
            found.append(tokens_per_second(outputs, prefill=False))
            calls[tokens] = pooled([output.metrics for output in outputs]).tokens_per_call
    ratios = [a / b for a, b in zip(rates[long], rates[short], strict=True)]
    return dict(
        short=short,
        long=long,
        tokens_per_second={n: spread(r) for n, r in rates.items()},
        tokens_per_call=calls,
        ratio=spread(ratios),
        ratio_of_rounds=spread([ratio * calls[short] / calls[long] for ratio in ratios]),
    )


def watch_memory(llm: LLM, speculative: bool, requests: int, max_tokens: int) -> dict[str, Any]:
    held = []
    for i in tqdm(range(requests), desc="requests", disable=None):
        prompt = make_prompt(llm.config.vocab_size, LENGTHS[i % len(LENGTHS)], i)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i)
        llm.generate(prompt, params, speculative=speculative, use_tqdm=False)
        gc.collect()  # what Python has not yet let go of is no leak
        held.append(memory_now())
    settled = held[requests // 4]
    growth = held[-1] - settled
    return dict(requests=requests, first_MB=held[0] / 1e6, settled_MB=settled / 1e6, last_MB=held[-1] / 1e6) | dict(
        most_MB=max(held) / 1e6,
        growth_MB=growth / 1e6,
        growth_share=growth / settled,
        held_MB=[round(n / 1e6, 3) for n in held],
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= args.short < args.long:
        raise ValueError(f"--short must be at least 1 and less than --long, got {args.short} and {args.long}")
    if args.requests < 4 or args.repeats < 1:
        raise ValueError("--requests must be at least 4 and --repeats at least 1")
    check_outputs(args.out, args.picture)
    here = environment()
    llm = LLM(args.model, args.draft, tree=args.tree, dtype=args.dtype, max_batch_size=1)
    prompt = read_prompt(llm, args.prompt)
    found: dict[str, Any] = {}
    for name, speculative in (("plain", False), *([("speculative", True)] if args.draft else [])):
        found[name] = dict(
            host=host_share(llm, prompt, args.short, args.repeats, speculative=speculative),
            length=long_and_short(llm, prompt, speculative, args.long, args.short, args.repeats),
            memory=watch_memory(llm, speculative, args.requests, args.request_tokens),
        )
    plan = tree_name(llm.plan) if args.draft else None
    about = dict(model=args.model, draft=args.draft, tree=plan, dtype=jnp.dtype(llm.dtype).name)
    about |= dict(prompt="random ids" if args.prompt is None else args.prompt, prompt_tokens=len(prompt))
    return dict(script="bench_steady", **here, **about, runs=found)


def print_table(result: dict[str, Any]) -> None:
    columns = ("host share", "tokens/s, short", "tokens/s, long", "long / short", "of rounds", "MB settled", "MB grown")
    table = new_table("", *columns, title=f"{result['model']}, {result['dtype']}, batch 1", right=columns)
    for name, run in result["runs"].items():
        length, memory = run["length"], run["memory"]
        rates = [f"{r['median']:.1f}" for r in length["tokens_per_second"].values()]
        ratios = [f"{length[name]['median']:.2f}" for name in ("ratio", "ratio_of_rounds")]
        cells = [f"{run['host']['host_share']:.2%}", *rates, *ratios]
        table.add_row(name, *cells, f"{memory['settled_MB']:.0f}", f"{memory['growth_MB']:+.1f}")
    make_console().print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Left: memory over the requests. Right: decode tokens per second of short and long answers."""
    runs = result["runs"]
    figure = new_figure(f"{result['model']}, {result['dtype']}, batch 1, {result['device']}", 11, 4.5)
    memory, speed = figure.subplots(1, 2)
    for name, run in runs.items():
        held = run["memory"]["held_MB"]
        memory.plot(range(1, len(held) + 1), held, label=name)
    memory.set(xlabel="requests served", ylabel="MB held", ylim=(0, None))
    lengths = dict.fromkeys(n for run in runs.values() for n in run["length"]["tokens_per_second"])
    rates = {f"{n} tokens": [run["length"]["tokens_per_second"][n] for run in runs.values()] for n in lengths}
    grouped_bars(speed, list(runs), rates)
    speed.set(ylabel="decode tokens/s (median, quartiles)")
    save_picture(figure, path)


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="converted checkpoint, HF directory, hub name or .gguf")
    parser.add_argument("--draft", help="EAGLE head, in the same forms or by name")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--prompt", metavar="TEXT", help="what a user says, through the chat template; else random ids")
    parser.add_argument("--short", type=int, default=256, help="tokens of a short answer")
    parser.add_argument("--long", type=int, default=4096, help="tokens of a long one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="after which memory is to be what it was")
    parser.add_argument("--request-tokens", type=int, default=16, help="tokens that each of them asks for")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    return exit_code(lambda: measure(args), with_picture(print_table, draw, args.picture), args.out)


if __name__ == "__main__":
    sys.exit(main())
