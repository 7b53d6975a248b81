"""What would eight H100s be given to run? Answered on a machine that has none.

    python scripts/compile_mesh.py --plugin .h100                          four layers each, a minute or two
    python scripts/compile_mesh.py --plugin .h100 --layers 80 --models llama-3.3-70b --out FILE.json    all of it

Compiles the decode loop of Llama 3.3 70B and of Llama 4 Maverick, sharded over a tensor axis of eight (bfloat16, paged
cache, Pallas kernels), plain and with an EAGLE-3 head and a chain of 3. Checks each against ``jeagle plan``: weights
and caches to the byte, caches updated in place, no room for copies of weights, two all-reduces per layer, and nothing
gathered but what a few tokens need, so neither logits nor weights. ``make test-h100-compile`` fetches the plugin and
runs this.

The last line is one JSON object. Exit code 1 where something is not as it must be, 2 where nothing can be compiled.
"""

# ruff: noqa: E402  (JAX reads its environment when it is imported)
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from jeagle.plan_command import COMPILE_ENVIRONMENT

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("--models", nargs="*", default=["llama-3.3-70b", "llama-4-maverick"])
parser.add_argument("--layers", type=int, default=4, help="of each model, the first ones")
parser.add_argument("--dtype", default="bfloat16", help="of the targets: bfloat16 or fp8; heads are bfloat16")
parser.add_argument("--gpu", default="h100")
parser.add_argument("--devices", type=int, default=8)
parser.add_argument("--context", type=int, default=8192)
parser.add_argument("--plugin", type=Path, help="folder that jax-cuda13-plugin and -pjrt were installed to")
parser.add_argument("--out", metavar="FILE.json")
args = parser.parse_args()
os.environ.update(COMPILE_ENVIRONMENT)
if args.plugin is not None:
    sys.path.insert(0, str(args.plugin.absolute()))

from common import environment, write_result
from rich import box
from rich.console import Console
from rich.table import Table

from jeagle.compile_only import CannotCompile, Loop, absent_mesh, compile_loop
from jeagle.config import LlamaConfig
from jeagle.decode import Program
from jeagle.devices import DEVICES
from jeagle.floor import Job
from jeagle.footprint import FORMATS, Split
from jeagle.llama4_config import Llama4Config
from jeagle.plan import Plan, make_plan
from jeagle.sizes import head_for, size
from jeagle.tree import OFF, TreePlan, parse_tree

TREES: dict[str, TreePlan] = {"plain": OFF, "chain-3": parse_tree("chain-3")}
FEW_TOKENS = 1 << 20  # bytes: what candidates and hidden states of a round stay far below, and logits and weights above


def shortened(config: LlamaConfig, layers: int) -> LlamaConfig:
    """The first layers of a model."""
    layers = min(layers, config.num_layers)
    fewer: dict[str, Any] = {"num_layers": layers}
    if isinstance(config, Llama4Config):
        for name in ("moe_layers", "nope_layers"):
            fewer[name] = tuple(i for i in getattr(config, name) if i < layers)
    return dataclasses.replace(config, **fewer)


def compiled(model: str, tree: str) -> dict[str, Any]:
    target = shortened(size(model), args.layers)
    plan_of_tree = TREES[tree]
    head = head_for(target, "eagle3")[0] if plan_of_tree.num_nodes > 1 else None
    loop = compile_loop(
        target,
        head,
        Program(plan_of_tree, attention="pallas"),
        absent_mesh(args.gpu, 1, args.devices),
        dtype=args.dtype,
        capacity=args.context,
    )
    job = Job(
        name=model,
        target=target,
        head=head,
        device=DEVICES[args.gpu],
        split=Split(tensor=args.devices),
        format=FORMATS[args.dtype],
        context=args.context,
        tree=None if head is None else plan_of_tree,
    )
    row: dict[str, Any] = dict(model=model, layers=target.num_layers, tree=tree, devices=args.devices, gpu=args.gpu)
    row |= {f.name: getattr(loop, f.name) for f in dataclasses.fields(loop) if f.name != "collectives"}
    row["collectives"] = _counted(loop)
    return row | dict(faults=list(faults(loop, make_plan(job), target)))


def _counted(loop: Loop) -> list[dict[str, Any]]:
    kinds = sorted(set(loop.collectives), key=lambda c: (c.name, c.bytes))
    return [dict(name=c.name, bytes=c.bytes, count=loop.collectives.count(c)) for c in kinds]


def faults(loop: Loop, plan: Plan, target: LlamaConfig):
    """What must not be, in words."""
    for name in ("weights", "draft_weights", "cache", "draft_cache"):
        found, planned = getattr(loop, name), getattr(plan.memory, name)
        if found != planned:
            yield f"{name} {found} bytes on a device, the plan says {planned}"
    caches = loop.cache + loop.draft_cache
    if loop.arguments < loop.weights + loop.draft_weights + caches:
        yield f"{loop.arguments} bytes of arguments are fewer than weights and caches"
    if loop.aliased < caches:
        yield f"of {caches} bytes of caches {loop.aliased} are updated in place"
    # One row at a time XLA multiplies narrow matrices as vectors, and lays those of attention out anew before the loop:
    # a copy of them per launch, a hundredth of all weights. Beside a tree there is room for no copy of any.
    smallest = 2 * target.num_heads * target.head_dim * target.width // args.devices  # attention's output
    if loop.temp >= (loop.weights // 100 if plan.job.tree is None else smallest):
        yield f"{loop.temp} bytes of temporaries: room for copies of weights"
    reduced = [c for c in loop.collectives if c.name == "all-reduce"]
    moved = [c for c in loop.collectives if c.name not in ("all-reduce", "all-gather")]
    if moved:
        yield f"collectives of other kinds: {sorted({c.name for c in moved})}"
    if plan.job.tree is None and len(reduced) != 2 * target.num_layers + 1:  # and one for the embedding
        yield f"{len(reduced)} all-reduces for {target.num_layers} layers"
    largest = max((c.bytes for c in loop.collectives), default=0)
    if largest > FEW_TOKENS:
        yield f"a collective of {largest} bytes"


def main() -> int:
    about = environment()
    try:
        rows = [compiled(model, tree) for model in args.models for tree in TREES]
    except CannotCompile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(
        "program", "layers", "weights GB", "head GB", "cache GB", "temp MB", "collectives", "kernels", "s", "faults",
        box=box.SIMPLE,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row['model']}, {row['tree']}",
            str(row["layers"]),
            *(f"{row[key] / 1e9:.3f}" for key in ("weights", "draft_weights", "cache")),
            f"{row['temp'] / 1e6:.1f}",
            str(sum(c["count"] for c in row["collectives"])),
            str(row["kernels"]),
            f"{row['seconds']:.0f}",
            "; ".join(row["faults"]),
        )
    Console(width=160).print(table)
    compiled_for = f"{args.devices} x {args.gpu} (nothing was run)"
    result = dict(environment=about, compiled_for=compiled_for, dtype=args.dtype, context=args.context, programs=rows)
    if args.out:
        write_result(args.out, result)
    print(json.dumps(result))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
