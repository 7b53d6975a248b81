"""What would an H100 be given to run? Answered on a machine that has none.

    make test-h100-compile                                       fetches the CUDA plugin, then runs this and checks it
    python scripts/compile_h100.py --layers 32 --capacity 131072 --attention --experts --out FILE.json    Llama 3 8B

Compiles every attention kernel and the experts' kernels at decoding shapes, and the whole decode loop of a model of
Llama 3 8B's shape (bfloat16, batch 1, 32,768 positions, an EAGLE-3 head with 32,000 draft tokens): plain, with a
dynamic tree of 64 nodes, with that tree over FP8 caches (of 65,536 positions), and with a chain of 3 that is looked up
in the text where it repeats itself. For each: kernels and their registers, spills and shared memory; for the loop also
the kernels per layer and round, what is aliased and what is temporary (less than one layer's pages: nothing copies
pages), and whether the rounds are command buffers (CUDA graphs).
XLA makes no command buffer of fewer than five commands, and the loop itself is two: with WHILE enabled and that limit
left alone, nothing at all becomes one; LOOP_FLAGS lowers it.

The last line is one JSON object. Exit code 1 where something spills, copies or falls out of the command buffers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, write_result
from h100 import CannotCompile, Compiled, compile_for_h100, python_for_h100
from measuring import make_batch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jeagle.attention import IMPLEMENTATIONS
from jeagle.checkpoint import abstract
from jeagle.config import EagleConfig
from jeagle.decode import Program
from jeagle.decoder import Decoder, precision_of
from jeagle.fp8 import FP8
from jeagle.llama4_config import Llama4Config
from jeagle.sampling import resolve_sampler
from jeagle.sizes import size
from jeagle.tree import OFF, DynamicTree, StaticTree, TreePlan, with_lookup
from pallas_kernels.grouped_mlp_pallas import grouped_mlp

LOOP_FLAGS = "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_graph_min_graph_size=1"
CAPACITY = 32768  # one layer's keys are then 64 MiB: no other buffer of a decode program comes near
SHARED_MEMORY = 232448  # bytes a block may have on an H100
KERNELS = sorted(set(IMPLEMENTATIONS) - {"xla"})
EXPERTS = ["llama-4-scout", "llama-4-maverick"]
GPUS = 8  # over which each expert is split
TREE = DynamicTree(depth=5, top_k=8, total=64)
LOOPS: dict[str, tuple[TreePlan, bool]] = {  # and whether over FP8 caches
    "plain": (OFF, False),
    "tree of 64": (TREE, False),
    "tree of 64, FP8 caches": (TREE, True),
    "chain of 3, lookup": (with_lookup(StaticTree.chain(3)), False),
}

GRAPHS = {"plain", "chain of 3, lookup"}


def attention_kernels(name: str) -> list[dict[str, Any]]:
    """One implementation at decoding shapes of Llama 3 8B (8 kv heads of 128, 4 query heads each) and SmolLM2."""
    rows = []
    for B, T, K, G, H, page_size, kept, dtype in [
        (1, 1, 8, 4, 128, 64, "bfloat16", "bfloat16"),
        (1, 16, 8, 4, 128, 64, "bfloat16", "bfloat16"),
        (1, 64, 8, 4, 128, 64, "bfloat16", "bfloat16"),
        (1, 64, 8, 4, 128, 64, "float8_e4m3fn", "bfloat16"),
        (1, 64, 8, 4, 128, 64, "float32", "float32"),
        (8, 32, 8, 4, 128, 16, "bfloat16", "bfloat16"),
        (64, 4, 8, 4, 128, 256, "bfloat16", "bfloat16"),
        (1, 8, 3, 3, 64, 64, "bfloat16", "bfloat16"),
    ]:
        M, eight_bit = 8192 // page_size, kept == "float8_e4m3fn"
        pages = jax.ShapeDtypeStruct((K, B * M, page_size, H), kept)
        new = jax.ShapeDtypeStruct((B, T, K, H), dtype)
        per_row = jax.ShapeDtypeStruct((B,), jnp.int32)
        arguments = (
            jax.ShapeDtypeStruct((B, T, K, G, H), dtype),
            *(new, new, jax.ShapeDtypeStruct((1, T, T), jnp.bool_)),
            *(pages, pages, jax.ShapeDtypeStruct((B, M), jnp.int32), per_row, per_row),
            (jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32),) * 2 if eight_bit else None,
        )
        row = dict(what=name, B=B, T=T, K=K, G=G, H=H, page_size=page_size, pages=str(pages.dtype))
        try:
            with jax.default_matmul_precision(precision_of(jnp.dtype(dtype), "gpu") or "default"):
                compiled = compile_for_h100(jax.jit(IMPLEMENTATIONS[name]), *arguments)
        except (NotImplementedError, ImportError) as error:
            rows.append(row | dict(refused=str(error)))
            continue
        rows.append(row | dict(launches=len(compiled.kernels)) | _heaviest(compiled))
    return rows


def expert_kernels(name: str) -> list[dict[str, Any]]:
    """One layer's routed experts as one of GPUS holds them, at one token, a chain's and a tree's."""
    config = size(name)
    assert isinstance(config, Llama4Config)
    E, D, F = config.num_experts, config.width, config.expert_mlp_width // GPUS
    rows = []
    for m in (1, 4, 64):
        shapes = (m, D), (E, D, 2, F), (E, F, D)
        x, gate_up, down = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        compiled = compile_for_h100(jax.jit(grouped_mlp), x, jax.ShapeDtypeStruct((m,), jnp.int32), gate_up, down)
        ours = [k for k in compiled.kernels if k.name.startswith("grouped_mlp")]
        rows.append(
            dict(what=f"experts, {name}", m=m, E=E, D=D, F=F, launches=len(ours))
            | dict(launches_of_blocks=len(compiled.kernels) - len(ours))
            | dict(programs=[int(np.prod(k.grid)) for k in ours])
            | _heaviest(compiled, "grouped_mlp")
        )
    return rows


def decode_loop(name: str, attention: str, layers: int, capacity: int) -> dict[str, Any]:
    """The whole compiled loop, as ``LLM.generate`` launches it. name: of LOOPS."""
    plan, fp8 = LOOPS[name]
    capacity *= 2 if fp8 else 1  # as many bytes
    config = dataclasses.replace(size("llama-3.1-8b"), num_layers=layers)

    head = EagleConfig.for_target(config, "eagle3", draft_vocab_size=32000)
    models = abstract(config, jnp.bfloat16), abstract(head, jnp.bfloat16)
    decoder = Decoder(*models, kv_cache_dtype=FP8 if fp8 else None, platform="gpu")
    program = Program(plan=plan, attention=attention, sampler=resolve_sampler("auto", platform="gpu"))
    batch = make_batch(1, [1] * 40, 8)
    state = jax.eval_shape(
        lambda: decoder.first_state(decoder.empty_caches(1, program, capacity), batch, program, capacity)
    )
    began = time.perf_counter()
    limits = jnp.int32(0), jnp.int32(1)
    compiled = compile_for_h100(decoder.jitted_launch, decoder.params, state, *limits, program=program)
    rounds = [k for k in compiled.kernels if k.in_loop]
    reads = [i for i, k in enumerate(rounds) if k.name.startswith("tree_attention") and "merge" not in k.name]
    page_bytes = config.num_kv_heads * capacity * config.head_dim * (1 if fp8 else 2)
    scale_bytes = config.num_kv_heads * capacity * 4 if fp8 else 0
    return dict(
        what=f"loop, {name}",
        attention=attention,
        layers=layers,
        nodes=program.plan.num_nodes,
        capacity=capacity,
        compile_seconds=round(time.perf_counter() - began, 1),
        launches=len(rounds),
        launches_per_layer=reads[-1] - reads[-2] if len(reads) > 1 else None,
        outside_command_buffers=sum(not k.in_command_buffer for k in rounds),
        whole_loop_is_command_buffer=compiled.whole_loop_is_command_buffer,
        alias_bytes=compiled.alias_bytes,
        temp_bytes=compiled.temp_bytes,
        cache_bytes=2 * layers * (page_bytes + scale_bytes),
        page_bytes=page_bytes,
        **_heaviest(compiled),
    )


def _heaviest(compiled: Compiled, kernels: str = "tree_attention") -> dict[str, Any]:
    """Registers of the kernels so named, the largest grid among them; spills and shared memory of all."""
    ours = [said for name, said in compiled.ptxas.items() if kernels in name]
    grids = [k.grid for k in compiled.kernels if kernels in k.name]
    return dict(
        registers=max((said.registers for said in ours), default=0),
        spilled_bytes=max((said.spilled_bytes for said in compiled.ptxas.values()), default=0),
        shared_bytes=max([compiled.triton_shared_bytes, *(k.shared_bytes for k in compiled.kernels)]),
        grid=max(grids, key=np.prod, default=()),
    )


def faults(row: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    found = []
    if row.get("spilled_bytes"):
        found.append(f"{row['spilled_bytes']} bytes spilled")
    if row.get("shared_bytes", 0) > SHARED_MEMORY:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    if "cache_bytes" in row:
        if row["alias_bytes"] < row["cache_bytes"]:
            found.append("the cache is not updated in place")
        if row["temp_bytes"] >= row["page_bytes"]:
            found.append("room for a copy of one layer's pages")
        if row["outside_command_buffers"] > 1:  # the condition's kernel runs beside the loop's body
            found.append(f"{row['outside_command_buffers']} kernels outside command buffers")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="of the model in the loop")
    parser.add_argument(
        "--capacity",
        type=int,
        default=CAPACITY,
        help="cache positions; activations of all layers must take less than a layer's",
    )
    parser.add_argument("--attention", nargs="*", default=KERNELS, choices=sorted(IMPLEMENTATIONS))
    parser.add_argument("--experts", nargs="*", default=EXPERTS, choices=EXPERTS)
    parser.add_argument("--loops", nargs="*", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--plugin", type=Path, help="folder that jax-cuda13-plugin and -pjrt were installed to")
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # the child process: where its rows go
    args = parser.parse_args()
    if args.rows is not None:
        return _child(args)

    # JAX reads flags and plugins once, when it starts: every set of flags is a process of its own.
    rows: list[dict[str, Any]] = []
    about = environment()
    for flags in ("", LOOP_FLAGS):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "rows.json"
            (Path(temporary) / "xla").mkdir()
            command = [__file__, "--rows", str(out), "--layers", str(args.layers), "--capacity", str(args.capacity)]
            # The second run asks only what the flags change: of the plain loop, and of the branch that lookups are.
            command += ["--loops", *(name for name in args.loops if not flags or name in GRAPHS)]
            command += ["--attention", *(args.attention if not flags else [])]
            command += ["--experts", *(args.experts if not flags else [])]
            try:
                code = python_for_h100(command, Path(temporary) / "xla", flags, args.plugin).returncode
            except CannotCompile as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            if code:
                return code
            rows += [row | dict(flags=flags) for row in json.loads(out.read_text())]
    _show(rows)
    result = dict(environment=about, compiled_for="NVIDIA H100 80GB HBM3 (nothing was run)", programs=rows)
    if args.out:
        write_result(args.out, result)
    print(json.dumps(result))
    return int(any(faults(row) for row in rows))


def _child(args: argparse.Namespace) -> int:
    rows = []
    try:
        for name in args.attention:
            rows += attention_kernels(name)
        for name in args.experts:
            rows += expert_kernels(name)
        rows += [decode_loop(name, "pallas", args.layers, args.capacity) for name in args.loops]
    except CannotCompile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.rows.write_text(json.dumps(rows))
    return 0


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "program", "launches", "per layer", "registers", "spilled", "shared", "temp MB", "faults", box=box.SIMPLE
    )
    for row in rows:
        shape = "graph of the loop" if row["flags"] else ""
        if "B" in row:
            shape = f"B={row['B']} T={row['T']} {row['pages']}"
        elif "E" in row:
            shape = f"m={row['m']} E={row['E']} F={row['F']}"
        table.add_row(
            f"{row['what']} {shape}",
            *(str(row.get(key, "")) for key in ("launches", "launches_per_layer", "registers", "spilled_bytes")),
            str(row.get("shared_bytes", "")),
            f"{row['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in row else "",
            escape(row.get("refused", "")) or "; ".join(faults(row)),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
