"""What does a training step cost, and how much of its arithmetic is the two models' matrix products?

    python scripts/bench_train.py scripts/recipes/smollm2-135m-eagle3.toml
    python scripts/bench_train.py RECIPE --shape llama-3.2-1b      the recipe's head on another target, random weights

Builds the recipe's step on one device, over random rows without padding, and times it and its three pieces: teach (the
target over a micro-batch), learn (loss and gradient of the head over one) and update (AdamW). Times are the best of
several repeats taken in turns. A piece's share is what it takes alone, as often as a step runs it, over the step's
time; "other" is what is left (the sum of gradients, copies), below 0 where XLA does better on the whole.

Arithmetic is counted three ways. By hand, from the shapes: the products with the models' weights, and those of
attention apart. From the step's jaxpr, where every dot_general counts as often as its loops run; both must agree. And
by XLA's cost analysis of the pieces, which takes in elementwise work and transcendentals (one FLOP each): before they
are compiled, so that no device's library calls hide a product. ``matmul_share`` is the products with weights, without
attention's, over all that; below 0.6 the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import environment, write_result
from flax import nnx
from products import count_products, products_by_hand
from reporting import check_outputs
from rich import box
from rich.console import Console
from rich.table import Table

from jeagle.checkpoint import load_llama
from jeagle.config import LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.locate import cache_directory, locate
from jeagle.sharding import data_mesh
from jeagle.sizes import size
from jeagle.training import unroll
from jeagle.training.packing import Rows
from jeagle.training.recipe import Recipe, load_recipe
from jeagle.training.run import starting_head
from jeagle.training.step import Trainable, TrainState, jit_step
from jeagle.training.trainer import make_optimizer
from jeagle.training.unroll import learn, num_learnt, teach

LEAST_SHARE = 0.6  # of the arithmetic, in products with the models' weights


class Piece:
    """A compiled ``function(carry, *arguments) -> (carry, result)``, its carry donated; its FLOPs and best time."""

    def __init__(self, function: Callable, carry: Any, *arguments: Any):
        began = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=0).lower(carry, *arguments)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.carry, self.arguments, self.flops, self.best = carry, arguments, arithmetic(lowered), math.inf

    def run(self) -> Any:
        began = time.perf_counter()
        self.carry, result = jax.block_until_ready(self.compiled(self.carry, *self.arguments))
        self.best = min(self.best, time.perf_counter() - began)
        return result


def arithmetic(lowered: jax.stages.Lowered) -> float:
    """FLOPs and transcendentals by XLA's count, which sees the body of a loop once."""
    cost: Any = lowered.cost_analysis()
    return cost["flops"] + cost.get("transcendentals", 0.0)


def random_rows(vocab_size: int, shape: tuple[int, ...], seed: int) -> Rows:
    """One document per row: what a step costs does not depend on what it reads."""
    token = np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)
    position = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    learnt = np.broadcast_to(np.arange(shape[-1]) < shape[-1] - 1, shape)
    return jax.device_put(Rows(token, np.ones(shape, np.int32), position, learnt, np.ones(shape, np.float32)))


def load_pair(recipe: Recipe, shape: str | None) -> tuple[Llama, EagleHead]:
    """The recipe's target, or one of another shape and random weights, and a head of the form that training gives it.

    What would be learnt from data (draft ids, heads that copy) is left as it comes: no time depends on it.
    """
    start = recipe.head.start
    if shape is not None:
        chosen = LlamaConfig.tiny() if shape == "tiny" else size(shape)
        target = Llama(chosen, dtype=jnp.dtype(recipe.run.dtype), rngs=nnx.Rngs(0))
        start = "random"
    else:
        target = load_llama(locate(recipe.target, cache_directory(), kind="llama"), dtype=recipe.run.dtype)
        start = "random" if start == "target" else start
    plain = dataclasses.replace(recipe, head=dataclasses.replace(recipe.head, start=start, copy_heads=0))
    return target, starting_head(plain, target, [], random_rows(target.config.vocab_size, (1, 4), 0))


def step_function(parts: Trainable, recipe: Recipe) -> Callable:
    """The trainer's ``step(state, target_params, tables, rows)`` on one device, with the target as an argument."""
    run, objective = recipe.run, recipe.objective.objective()
    optimizer = make_optimizer(recipe.optimizer, run.total_updates)
    mesh = data_mesh(jax.devices()[:1])
    return jit_step(parts, optimizer, objective, echo=run.echo, seed=run.seed, mesh=mesh, dtype=jnp.dtype(run.dtype))


def measure(target: Llama, head: EagleHead, recipe: Recipe, repeats: int) -> dict[str, Any]:
    """All figures of the recipe's step, as JSON has them. Raises ValueError where two counts of products differ."""
    run, length, dtype = recipe.run, recipe.data.pack_length, jnp.dtype(recipe.run.dtype)
    objective, optimizer = recipe.objective.objective(), make_optimizer(recipe.optimizer, run.total_updates)
    parts, params = Trainable.split(target, head)
    weights = parts.target_params, parts.head_tables
    micro_batches = run.updates * run.accumulate
    step = step_function(parts, recipe)

    def teach_one(nothing, target_params, tables, params, rows):
        head = parts.head(params, tables, dtype)
        return nothing, teach(parts.target(target_params), head, rows, **objective.asked_of_target())

    def learn_one(nothing, target_params, tables, params, rows, teacher, key):
        def loss(params):
            head, count_K = parts.head(params, tables, dtype), num_learnt(rows, objective.depth)
            return learn(head, parts.target(target_params), rows, teacher, count_K, objective, key)

        return nothing, jax.value_and_grad(loss, has_aux=True)(params)

    def update_one(state, gradient):
        change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        state = TrainState(optax.apply_updates(state.params, change), opt_state, state.step + 1)
        return state, optax.tree.norm(gradient)

    def fresh() -> TrainState:
        copy = jax.tree.map(jnp.copy, params)
        return TrainState(copy, optimizer.init(copy), jnp.int32(0))

    rows = random_rows(target.config.vocab_size, (run.updates, run.accumulate, run.rows, length), run.seed)
    one = jax.tree.map(lambda x: x[0, 0], rows)
    pieces = {"step": Piece(step, fresh(), *weights, rows), "teach": Piece(teach_one, None, *weights, params, one)}
    teacher = pieces["teach"].run()
    pieces["learn"] = Piece(learn_one, None, *weights, params, one, teacher, jax.random.key(run.seed))
    pieces["update"] = Piece(update_one, fresh(), pieces["learn"].run()[1])
    for piece in pieces.values():  # the first run is not timed
        piece.run()
        piece.best = math.inf
    for _ in range(repeats):
        for piece in pieces.values():
            piece.run()

    times = {"teach": micro_batches, "learn": run.echo * micro_batches, "update": run.echo * run.updates}
    seconds = {name: piece.best for name, piece in pieces.items()}
    shares = {name: count * seconds[name] / seconds["step"] for name, count in times.items()}
    flops = {name: pieces[name].flops for name in times}
    # Counted, never run: no loop over chunks of the logits, and no library's attention, whose products nobody sees.
    seen = mock.patch.object(unroll, "attended_by", return_value="xla")
    with seen, mock.patch.object(unroll, "CHUNK", run.rows * length):
        flops["teach"] = arithmetic(jax.jit(partial(teach_one, None)).lower(*weights, params, one))
    total = sum(count * flops[name] for name, count in times.items())
    by_hand = products_by_hand(target.config, head.config, recipe)
    attention = sum(count for name, count in by_hand.items() if name.endswith("attention"))
    matmuls = sum(by_hand.values()) - attention
    with seen:  # a function of its own, as the other's trace is remembered
        jaxpr = jax.make_jaxpr(step_function(parts, recipe))(fresh(), *weights, rows).jaxpr
    counted = count_products(jaxpr)
    if counted != (matmuls, attention):
        raise ValueError(f"products by hand ({matmuls}, attention {attention}) and in the jaxpr ({counted}) differ")
    memory: Any = pieces["step"].compiled.memory_analysis()
    tokens = micro_batches * run.rows * length
    return dict(
        rows=[run.updates, run.accumulate, run.rows, length],
        echo=run.echo,
        depth=objective.depth,
        dtype=run.dtype,
        repeats=repeats,
        tokens_per_second=tokens / seconds["step"],
        updated_tokens_per_second=run.echo * tokens / seconds["step"],
        seconds=seconds,
        runs_per_step=times,
        target_share=shares["teach"],
        head_share=shares["learn"],
        update_share=shares["update"],
        other_share=1 - sum(shares.values()),
        memory_bytes={
            kind: getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp")
        },
        products=by_hand,
        piece_flops=flops,
        flops=total,
        matmul_flops=matmuls,
        attention_flops=attention,
        matmul_share=matmuls / total,
        attention_share=attention / total,
        flops_per_second=total / seconds["step"],
        compile_s={name: round(piece.compile_seconds, 2) for name, piece in pieces.items()},
    )


def print_tables(console: Console, found: dict[str, Any]) -> None:
    step = found["seconds"]["step"]
    table = Table(title="a step, by its pieces", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("piece", "runs", "ms each", "share of the step", "GFLOP each"):
        table.add_column(name, justify="left" if name == "piece" else "right")
    for (name, runs), share in zip(found["runs_per_step"].items(), ("target", "head", "update"), strict=True):
        each, flops = found["seconds"][name], found["piece_flops"][name]
        table.add_row(name, f"{runs}", f"{each * 1e3:.1f}", f"{found[f'{share}_share']:.1%}", f"{flops / 1e9:.2f}")
    table.add_row("other", "", "", f"{found['other_share']:.1%}", "")
    table.add_section()
    table.add_row("step", "1", f"{step * 1e3:.1f}", "100%", f"{found['flops'] / 1e9:.2f}")
    console.print(table)
    table = Table(title="its arithmetic", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("matrix products", "GFLOP", "share"):
        table.add_column(name, justify="left" if name == "matrix products" else "right")
    for name, flops in found["products"].items():
        table.add_row(name, f"{flops / 1e9:.2f}", f"{flops / found['flops']:.1%}")
    table.add_section()
    table.add_row("with weights", f"{found['matmul_flops'] / 1e9:.2f}", f"{found['matmul_share']:.1%}")
    console.print(table)
    memory = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in found["memory_bytes"].items())
    console.print(f"memory of the step: {memory}", highlight=False)
    console.print(
        f"{found['tokens_per_second']:.0f} tokens/s, {found['updated_tokens_per_second']:.0f} updated tokens/s (echo "
        f"{found['echo']}), {found['flops_per_second'] / 1e9:.1f} GFLOP/s",
        highlight=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for a share below the least or an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", help="a TOML file; see scripts/recipes. Its data is not read")
    parser.add_argument("--shape", choices=["tiny", "smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures")
    args = parser.parse_args(argv)
    try:
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        check_outputs(args.out, None)
        here = environment()
        recipe = load_recipe(args.recipe)
        target, head = load_pair(recipe, args.shape)
        found = measure(target, head, recipe, args.repeats)
    except (ValueError, OSError) as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 1
    model = recipe.target if args.shape is None else f"{args.shape}, random weights"
    print_tables(Console(width=None if sys.stdout.isatty() else 120), found)
    if args.out:
        write_result(args.out, dict(script="bench_train", **here, recipe=args.recipe, model=model, **found))
    if found["matmul_share"] < LEAST_SHARE:
        print(f"only {found['matmul_share']:.1%} of the arithmetic is products with weights", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
