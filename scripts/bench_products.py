"""How should a CPU multiply a few rows with large matrices?

    python scripts/bench_products.py                        the products of SmolLM2-135M's 30 layers and of its LM head
    python scripts/bench_products.py --shape llama-3.2-1b --layers 4 --out products.json

Times all products of a forward, and nothing else, for 1 to 64 float32 rows, three ways: as XLA:CPU does it (YNNPACK),
each row apart (matrix-vector products), and through Eigen (``few_rows.eigen``). The LM head, whose weights are a tied
embedding [V, D], is timed by itself, as its best way is another. Ways take turns; medians, and multiples of one row's
time, which is that of reading the weights. ``few_rows.multiply_rows`` chooses by this table. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, exit_code
from reporting import check_outputs, make_console, new_figure, new_table, save_picture, with_picture

from jeagle.few_rows import apart, eigen
from jeagle.sizes import size

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MOST_APART = 8  # beyond it this takes long, and longer with every row
REPEATS_IN_LOOP = 4

Ways = dict[str, Callable[[jax.Array, jax.Array], jax.Array]]


def tied(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("TD,VD->TV", x, weights)


LAYERS: Ways = {
    "ynnpack": jnp.matmul,
    "apart": lambda x, w: apart(lambda row: row @ w, x),
    "eigen": eigen,
}
HEAD: Ways = {
    "ynnpack": tied,
    "apart": lambda x, w: apart(lambda row: tied(row, w), x),
    "eigen": lambda x, w: eigen(w, x.T).T,
}


def all_layers(multiply, x: jax.Array, layers: list[list[jax.Array]]) -> jax.Array:
    """Every matrix once, each reading what it can take of the result before it: no matrix of a layer takes more."""
    for matrices in layers:
        for weights in matrices:
            x = multiply(x[:, : len(weights)], weights)
    return x


def timed(ways: Ways, forward, width: int, weights: Any, repeats: int) -> dict[str, dict[int, float]]:
    """Median ms of each way at each number of rows."""
    programs = {}
    for name, multiply in ways.items():
        for rows in ROWS:
            if name == "apart" and rows > MOST_APART:
                continue

            def loop(x: jax.Array, weights, multiply=multiply) -> jax.Array:
                def once(_, x: jax.Array) -> jax.Array:
                    return x + 1e-3 * jnp.max(forward(multiply, x, weights), axis=-1, keepdims=True)

                return jax.lax.fori_loop(0, REPEATS_IN_LOOP, once, x)

            x = jnp.ones((rows, width))
            program = jax.jit(loop).lower(x, weights).compile()
            jax.block_until_ready(program(x, weights))
            programs[name, rows] = (program, x)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for _ in range(repeats):
        for key, (program, x) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(x, weights))
            seconds[key].append((time.perf_counter() - began) / REPEATS_IN_LOOP)
    return {way: {n: float(np.median(s)) * 1e3 for (w, n), s in seconds.items() if w == way} for way in ways}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    check_outputs(args.out, args.picture)
    result = dict(script="bench_products", **environment())
    config = size(args.shape)
    D, F, V, H = config.width, config.mlp_width, config.vocab_size, config.head_dim
    fused = config.num_kv_heads * (config.queries_per_kv + 2) * H
    shapes = [(D, fused), (config.num_heads * H, D), (D, 2 * F), (F, D)]
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, int]) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02)

    layers = [[random(shape) for shape in shapes] for _ in range(args.layers or config.num_layers)]
    of_layers = timed(LAYERS, all_layers, D, layers, args.repeats)
    of_head = timed(HEAD, lambda multiply, x, w: multiply(x, w), D, random((V, D)), args.repeats)
    about = dict(model=args.shape, dtype="float32", layers=len(layers), repeats=args.repeats)
    return result | about | dict(layers_ms=of_layers, tied_head_ms=of_head)


def show(result: dict[str, Any]) -> None:
    console = make_console()
    for title, key in (("layers", "layers_ms"), ("tied LM head", "tied_head_ms")):
        ways = result[key]
        table = new_table("rows", *ways, title=f"{title}: ms (multiples of one row)", right=("rows", *ways))
        one = ways["ynnpack"][1]
        for n in ROWS:
            table.add_row(str(n), *(f"{ms[n]:.1f} ({ms[n] / one:.2f})" if n in ms else "" for ms in ways.values()))
        console.print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Milliseconds over rows, a line per way; the dashed one is the time of one row."""
    figure = new_figure(f"{result['model']}, {result['layers']} layers, {result['device']}", 11, 4.5)
    both = (("layers_ms", "products of all layers"), ("tied_head_ms", "tied LM head"))
    for axes, (field, title) in zip(figure.subplots(1, 2), both, strict=True):
        for way, ms in result[field].items():
            axes.plot([int(n) for n in ms], list(ms.values()), marker="o", markersize=4, label=way)
        axes.axhline(result[field]["ynnpack"]["1"], color="black", linestyle="--", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([n for n in ROWS if n & (n - 1) == 0], [str(n) for n in ROWS if n & (n - 1) == 0])
        axes.set(title=title, xlabel="rows", ylabel="ms (median)", ylim=(0, None))
    save_picture(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a name of jeagle.sizes (%(default)s)")
    parser.add_argument("--layers", type=int, help="so many of its layers (all)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    return exit_code(lambda: measure(args), with_picture(show, draw, args.picture), args.out)


if __name__ == "__main__":
    sys.exit(main())
