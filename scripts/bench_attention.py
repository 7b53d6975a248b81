"""What does attention over the cache cost on this device, and what of it is the copies that paging takes?

    python scripts/bench_attention.py --size smollm2-135m --out attention.json

Times ``jeagle.attention`` alone, one call per layer of the model, each over pages of its own and the answer of one
being the next one's queries. Twice: over pages that lie in the rows' order, as jeagle lays them, and over the same
pages shuffled, where none can be read as they lie. Shown are milliseconds of all layers and the keys and values that
they see per second; the bandwidth of reading memory, of the same run, is in the title. For kernels on a GPU see
gpu_suite.py, part 2.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, exit_code
from measuring import bandwidth
from reporting import check_outputs, grouped_bars, make_console, new_figure, new_table, save_picture, with_picture

from jeagle.attention import IMPLEMENTATIONS, resolve
from jeagle.sizes import size

ORDERS = ("in order", "shuffled")
# Rows, positions per row, and how many of them are seen.
CACHES = ((1, 256, 246), (1, 4096, 1500), (1, 4096, 4086), (8, 256, 246), (8, 512, 502), (32, 256, 246), (32, 512, 502))
PAGE_SIZE = 64


def milliseconds(args: argparse.Namespace, rows: int, capacity: int, seen: int, new: int, order: str) -> float:
    """Of all layers: the median."""
    config, dtype = size(args.size), jnp.dtype(args.dtype)
    K, G, H = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    rng = np.random.default_rng(0)
    M = capacity // PAGE_SIZE
    table = np.arange(rows * M) if order == "in order" else rng.permutation(rows * M)
    normal = rng.standard_normal((K, rows * M, PAGE_SIZE, H), np.float32)
    layers = [(jnp.asarray(normal, dtype), jnp.asarray(normal, dtype)) for _ in range(config.num_layers)]
    attend = IMPLEMENTATIONS[args.attention]

    @jax.jit
    def run(q, k, mask, layers, table, length) -> jax.Array:
        for pages in layers:
            q = attend(q, k, k, mask, *pages, table, jnp.zeros_like(length), length)[0]
        return q

    q = jnp.asarray(rng.standard_normal((rows, new, K, G, H)), dtype)
    k = jnp.asarray(rng.standard_normal((rows, new, K, H)), dtype)
    mask = jnp.tril(jnp.ones((1, new, new), bool))
    operands = q, k, mask, layers, jnp.asarray(table.reshape(rows, M), jnp.int32), jnp.full(rows, seen, jnp.int32)
    jax.block_until_ready(run(*operands))
    spent = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(*operands))
        spent.append(time.perf_counter() - began)
    return float(np.median(spent)) * 1e3


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.repeats < 1 or min(args.new) < 1:
        raise ValueError("--repeats and --new must be at least 1")
    check_outputs(args.out, args.picture)
    args.attention = resolve(args.attention)
    here = environment()
    config = size(args.size)
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(args.dtype).itemsize
    runs = []
    for (rows, capacity, seen), new in itertools.product(CACHES, args.new):
        found = {order: milliseconds(args, rows, capacity, seen, new, order) for order in ORDERS}
        read = rows * seen * per_position
        runs.append(
            dict(rows=rows, capacity=capacity, seen=seen, new=new, milliseconds=found)
            | dict(GBps={order: read / ms / 1e6 for order, ms in found.items()})
        )
    about = dict(model=args.size, dtype=args.dtype, attention=args.attention, page_size=PAGE_SIZE)
    return dict(script="bench_attention", **here, **about, bandwidth_GBps=bandwidth() / 1e9, runs=runs)


def print_table(result: dict[str, Any]) -> None:
    columns = ("rows", "positions", "seen", "new", *(f"ms {order}" for order in ORDERS), *(f"GB/s {o}" for o in ORDERS))
    about = f"{result['model']}, {result['dtype']}, {result['attention']}, {result['bandwidth_GBps']:.1f} GB/s"
    table = new_table(*columns, title=about, right=columns)
    for run in result["runs"]:
        cells = [f"{x:.1f}" for name in ("milliseconds", "GBps") for x in run[name].values()]
        table.add_row(*(f"{run[name]:,}" for name in ("rows", "capacity", "seen", "new")), *cells)
    make_console().print(table)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Above: milliseconds. Below: keys and values per second. A group per cache and number of new positions."""
    runs = result["runs"]
    about = f"{result['model']}, {result['dtype']}, {result['attention']}, {result['device']}"
    figure = new_figure(f"attention of all layers: {about}", 13, 7.5)
    groups = [f"{r['rows']} x {r['seen']:,}\nof {r['capacity']:,}\n{r['new']} new" for r in runs]
    both = (("milliseconds", "ms of all layers (median)"), ("GBps", "GB/s of keys and values"))
    for axes, (field, label) in zip(figure.subplots(2, 1), both, strict=True):
        grouped_bars(axes, groups, {order: [run[field][order] for run in runs] for order in ORDERS})
        axes.set(ylabel=label)
    figure.axes[1].set(xlabel="rows x positions seen, of how many, new ones per row")
    figure.axes[1].margins(y=0.4)  # its legend has a line more
    figure.axes[1].axhline(result["bandwidth_GBps"], color="black", linestyle="--", label="reading memory")
    save_picture(figure, path)


def main() -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="smollm2-135m", help="a model's shape, by name")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="auto", help="implementation, see jeagle.attention")
    parser.add_argument("--new", type=int, nargs="+", default=[1, 4], help="new positions per row")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    return exit_code(lambda: measure(args), with_picture(print_table, draw, args.picture), args.out)


if __name__ == "__main__":
    sys.exit(main())
