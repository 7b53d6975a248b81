"""What does a step cost, and how far is it from what the memory allows?

    python scripts/bench_decode.py                                  SmolLM2-135M's shape, random weights, float32
    python scripts/bench_decode.py --model models/smollm2-135m      the real model; also times LLM.generate
    python scripts/bench_decode.py --shape llama-3.2-1b --dtype bfloat16

Times one target forward inside the compiled loop for T = 1 (a plain step) and T = 2..32 (verifying a tree of T nodes),
one step of the EAGLE head, what it takes to go on under another tree between two launches, and the share of
``LLM.generate``'s time that is spent outside the device loop. Every time is the best of several repeats taken in turns,
so that a busy machine disturbs all of them alike; read the ratios. The floor is the bytes of the weights read once per
step over the bandwidth measured in this run (the best of a numpy and an XLA read of 1 GB). The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, exit_code
from flax import nnx
from measuring import bandwidth, host_share, make_batch, random_head, target_bytes
from reporting import check_outputs, new_figure, save_picture, with_picture

from jeagle import LLM
from jeagle.cache import after, commit
from jeagle.checkpoint import load_llama
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Decoder
from jeagle.llama import Llama
from jeagle.sampling import Filters, choose
from jeagle.sizes import size
from jeagle.tree import OFF, StaticTree, Tree, ancestor_mask, tree_name
from jeagle.verify import accept

STEPS = 16  # per timed launch


def chain_tree(state: DecodeState, num_nodes: int) -> Tree:
    """A chain of T nodes that all hold the root's token: what it costs does not depend on what it says."""
    B = state.root_B.shape[0]
    depth_BT = jnp.broadcast_to(jnp.arange(num_nodes, dtype=jnp.int32), (B, num_nodes))
    parent_BT = jnp.maximum(depth_BT - 1, 0)
    token_BT = jnp.broadcast_to(state.root_B[:, None], (B, num_nodes))
    mask = ancestor_mask(parent_BT, num_nodes - 1)
    return Tree(token_BT, parent_BT, depth_BT, mask, jnp.ones_like(token_BT, dtype=bool))


def verify_steps(
    definition, params, state: DecodeState, *, num_nodes: int, taps: tuple[int, ...], attention: str = "auto"
) -> DecodeState:
    """STEPS times: forward over T nodes, LM head, choice, acceptance, commit of one position."""
    target: Llama = nnx.merge(definition, params)

    def step(_, state: DecodeState) -> DecodeState:
        tree = chain_tree(state, num_nodes)
        position_BT = state.length_B[:, None] + tree.depth_BT
        given = tree.token_BT, position_BT, tree.mask_BTT, state.cache, state.prefix
        forward = target(*given, taps=taps, attention=attention)
        chosen_BT = choose(target.logits(forward.hidden_BTD), position_BT + 1, state.sampling, Filters())
        path_BP, _ = accept(tree, chosen_BT, num_nodes)
        one_B = jnp.ones_like(state.length_B)
        cache = commit(state.cache, forward.new_kv, state.prefix, one_B, path_BP)
        return DecodeState(**{**vars(state), "cache": cache, "length_B": state.length_B + 1, "root_B": chosen_BT[:, 0]})

    return jax.lax.fori_loop(0, STEPS, step, state)


def draft_steps(definitions, params, state: DecodeState, *, attention: str = "auto") -> DecodeState:
    """STEPS times: one position through the head, its LM head, and the best 4 children."""
    target, head = (nnx.merge(d, p) for d, p in zip(definitions, params))
    draft = state.draft
    assert draft is not None

    def step(_, carry):
        cache, length_B, token_B1, feature_B1D = carry
        prefix = state.prefix.with_length(length_B)
        see_self = jnp.ones((1, 1, 1), bool)
        given = token_B1, feature_B1D, length_B[:, None], see_self, cache, prefix
        ran = head(*given, target=target, attention=attention)
        _, best = jax.lax.top_k(head.logits(ran.hidden_BTD, target), 4)
        cache = commit(cache, after(ran.new_kv, best), prefix, jnp.ones_like(length_B))
        token_B1 = best[:, :, 0] if head.draft_to_target is None else head.draft_to_target[...][best[:, :, 0]]
        return cache, length_B + 1, token_B1, ran.feature_BTD

    first = (draft.cache, state.length_B, state.root_B[:, None], head.fuse(draft.feature_BPX[:, :1]))
    cache, *_ = jax.lax.fori_loop(0, STEPS, step, first)
    return DecodeState(**{**vars(state), "draft": type(draft)(**{**vars(draft), "cache": cache})})


class Timed:
    """A compiled function of a state, its compile seconds and its best time."""

    def __init__(self, function: Callable, params, state: DecodeState):
        began = time.perf_counter()
        self.compiled = jax.jit(function, donate_argnums=(1,)).lower(params, state).compile()
        self.compile_seconds = time.perf_counter() - began
        self.params, self.state, self.best = params, state, np.inf

    def run(self) -> None:
        state = DecodeState(**{**vars(self.state), "length_B": self.state.length_B * 0 + 100})  # same prefix every time
        began = time.perf_counter()
        self.state = jax.block_until_ready(self.compiled(self.params, state))
        self.best = min(self.best, (time.perf_counter() - began) / STEPS)


def switch_ms(decoder: Decoder, state: DecodeState, repeats: int) -> dict[str, float]:
    """Of ``Decoder.switch`` from one tree to the next: the best of several. ``state`` is plain."""
    plans = [OFF, *map(StaticTree.chain, (3, 1, 3)), OFF]
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for old, new in itertools.pairwise(Program(plan=plan) for plan in plans):
            state = jax.block_until_ready(decoder.launch(state, old, 1))
            began = time.perf_counter()
            state = jax.block_until_ready(decoder.switch(state, old, new))
            name, took = f"{tree_name(old.plan)} to {tree_name(new.plan)}", (time.perf_counter() - began) * 1e3
            if repeat:  # the first time compiles
                best[name] = min(best.get(name, np.inf), took)
    return best


def measure(args: argparse.Namespace) -> dict[str, Any]:
    check_outputs(args.out, args.picture)
    here = environment()
    dtype = jnp.dtype(args.dtype)
    args.nodes = sorted({1, *args.nodes})  # everything is told in plain steps
    if args.model:
        target = load_llama(args.model, dtype=args.dtype)
    else:
        target = Llama(size(args.shape), dtype=dtype, rngs=nnx.Rngs(0))
    head = random_head(target)
    prompt = list(range(10, 111))
    decoder = Decoder(target, head)
    definitions, params = tuple(nnx.graphdef(m) for m in (target, head)), decoder.params

    def fresh(plan: StaticTree) -> DecodeState:
        batch = make_batch(args.batch, prompt, 1)
        return decoder.start(batch, Program(plan=plan), capacity=args.capacity, chunk=64)

    timed = {
        f"verify_{n}": Timed(
            partial(verify_steps, definitions[0], num_nodes=n, taps=head.config.taps), params[0], fresh(OFF)
        )
        for n in args.nodes
    }
    timed["draft"] = Timed(partial(draft_steps, definitions), params, fresh(StaticTree.chain(1)))
    speed = 0.0
    for _ in range(args.repeats):
        speed = max(speed, bandwidth(repeats=1))
        for each in timed.values():
            each.run()

    weights = target_bytes(target)
    floor = weights / speed
    plain = timed["verify_1"].best
    result: dict[str, Any] = dict(
        script="bench_decode",
        **here,
        model=args.model or f"{args.shape}, random weights",
        dtype=args.dtype,
        batch=args.batch,
        prefix=100,
        capacity=args.capacity,
        bandwidth_GBps=speed / 1e9,
        weights_MB=weights / 1e6,
        floor_ms=floor * 1e3,
        plain_ms=plain * 1e3,
        plain_over_floor=plain / floor,
        verify_ms={n: timed[f"verify_{n}"].best * 1e3 for n in args.nodes},
        verify_over_plain={n: timed[f"verify_{n}"].best / plain for n in args.nodes},
        draft_ms=timed["draft"].best * 1e3,
        draft_over_plain=timed["draft"].best / plain,
        switch_ms=switch_ms(decoder, fresh(OFF), args.repeats),
        compile_s={name: round(each.compile_seconds, 2) for name, each in timed.items()},
    )
    if args.batch == 1:
        llm = LLM(args.model or target, dtype=args.dtype)
        result["host"] = host_share(llm, prompt, 256, max(2, args.repeats // 3))
    return result


def title(result: dict[str, Any]) -> str:
    about = f"batch {result['batch']}, prefix {result['prefix']} of {result['capacity']}"
    return f"{result['model']}, {result['dtype']}, {about}, {result['device']}"


def show(result: dict[str, Any]) -> None:
    speed, weights, over = (result[name] for name in ("bandwidth_GBps", "weights_MB", "plain_over_floor"))
    print(title(result))
    print(f"bandwidth {speed:.1f} GB/s, weights {weights:.0f} MB, floor {result['floor_ms']:.2f} ms")
    print(f"plain step {result['plain_ms']:.2f} ms: {over:.2f}x the floor, {1 / over:.0%} of bandwidth")
    for n, ms in list(result["verify_ms"].items())[1:]:
        print(f"verify T={n:<3} {ms:.2f} ms: {result['verify_over_plain'][n]:.2f}x a plain step")
    print(f"draft step  {result['draft_ms']:.2f} ms: {result['draft_over_plain']:.2f}x a plain step")
    switches = ", ".join(f"{name} {ms:.1f}" for name, ms in result["switch_ms"].items())
    print(f"ms to go on under another tree: {switches}")
    if "host" in result:
        share, tokens = result["host"]["host_share"], result["host"]["tokens"]
        print(f"outside the device loop: {share:.2%} of generating {tokens} tokens")


def draw(path: Path, result: dict[str, Any]) -> None:
    """Milliseconds of verifying T nodes, beside one step of the head and the floor."""
    figure = new_figure(title(result), 9, 4.5)
    axes = figure.subplots()
    nodes, ms = [int(n) for n in result["verify_ms"]], list(result["verify_ms"].values())
    axes.plot(nodes, ms, marker="o", label="forward over T nodes")
    for n, spent in zip(nodes, ms, strict=True):
        over = f"{spent / result['plain_ms']:.2f}x"
        axes.annotate(over, (n, spent), xytext=(-2, 6), textcoords="offset points", ha="right", fontsize=8)
    axes.axhline(result["floor_ms"], color="black", linestyle="--", label="weights read once")
    axes.axhline(result["draft_ms"], color="C1", linestyle="--", label="one step of the head")
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, map(str, nodes))
    axes.set(xlabel="T (1: a plain step)", ylabel="ms (best)", ylim=(0, 1.1 * max(ms)))
    save_picture(figure, path)


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a converted checkpoint; without one, --shape with random weights")
    parser.add_argument("--shape", default="smollm2-135m", choices=["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=512, help="cache positions per row; the prefix is 100 long")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    return exit_code(lambda: measure(args), with_picture(show, draw, args.picture), args.out)


if __name__ == "__main__":
    sys.exit(main())
