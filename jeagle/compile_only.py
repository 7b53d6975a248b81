"""The decode loop, compiled for GPUs that are not there: what a mesh of them would be given to hold and to run.

XLA, its partitioner and ptxas need no GPU, only JAX's CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt, 142 MB) and
CUDA's compiler. The program is that of ``LLM.generate``, over shapes in place of weights. Nothing is autotuned without
a device, so nothing here says how fast it is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, use_abstract_mesh

from jeagle import sharding
from jeagle.checkpoint import abstract
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder, state_axes
from jeagle.moe import Experts, resolve
from jeagle.placement import filled, placements, repeat_kv_heads
from jeagle.sampling import RowSampling, SamplingParams, seed_keys
from jeagle.sharding import Layout, Rules, make_mesh

__all__ = ["CannotCompile", "Collective", "Loop", "absent_mesh", "compile_loop"]

# A GpuTargetConfigProto, after XLA's own specification of the H100 SXM. Without driver_version XLA makes no command
# buffers of loops.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
TARGETS = {
    "h100": HOPPER.format(name="NVIDIA H100 80GB HBM3", bandwidth=3352320000000, memory=84929347584),
    "h200": HOPPER.format(name="NVIDIA H200", bandwidth=4800000000000, memory=150754820096),
}


class CannotCompile(RuntimeError):
    """This machine lacks what compiling for a GPU needs; one sentence says what."""


@dataclass(frozen=True)
class Collective:
    name: str  # all-reduce, all-gather, ..
    bytes: int  # of its result, on one device


@dataclass(frozen=True)
class Loop:
    """One compiled decode loop; bytes are those of one device."""

    weights: int
    draft_weights: int
    cache: int
    draft_cache: int
    arguments: int  # all of these, and the state beside the caches
    aliased: int  # of the arguments: updated in place
    temp: int
    collectives: tuple[Collective, ...]  # of one round
    kernels: int  # launches of one round, collectives not counted
    seconds: float  # to trace, lower and compile


@cache
def _devices(gpu: str, count: int) -> list[Any]:
    if gpu not in TARGETS:
        raise CannotCompile(f"cannot compile for {gpu!r} without one; choose one of {', '.join(TARGETS)}")
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=TARGETS[gpu], topology=f"1x1x{count}")
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise CannotCompile(f"no CUDA plugin (pip install jax-cuda13-plugin jax-cuda13-pjrt): {reason}") from None
    return list(topology.devices)


def absent_mesh(gpu: str, data: int, tensor: int) -> Mesh:
    """A mesh [data, tensor] of GPUs that can be compiled for and nothing else. Raises CannotCompile."""
    return make_mesh(data, tensor, _devices(gpu, data * tensor))


def compile_loop(
    target: LlamaConfig,
    head: EagleConfig | None,
    program: Program,
    mesh: Mesh,
    *,
    rules: Rules = Rules(),
    dtype: Any = jnp.bfloat16,
    kv_cache_dtype: Any = None,
    batch: int = 1,
    capacity: int = 8192,
) -> Loop:
    """Compile the loop of a target, perhaps with a head, for ``batch`` rows of ``capacity`` cache positions each.

    dtype: of the target's weights, "fp8" among them; the head has the dtype the target computes in.
    """
    began = time.perf_counter()
    layout = Layout(mesh, rules)
    model = _shapes(target, dtype, layout)
    modules = model, None if head is None else _shapes(head, model.compute_dtype, layout)
    decoder = Decoder(*modules, kv_cache_dtype=kv_cache_dtype, layout=layout, platform="gpu")
    # The state is shaped as on one device, and then laid out: nothing can be put on devices that are not there.
    alone = Decoder(*modules, kv_cache_dtype=kv_cache_dtype)
    zeros = np.zeros(batch, np.int32)
    sampling = RowSampling.stack([SamplingParams()] * batch, seed_keys(0, batch))
    first = Batch([np.zeros(2, np.int32)] * batch, sampling, np.full((batch, 4), -1, np.int32), zeros + 1)
    state = jax.eval_shape(
        lambda: alone.first_state(alone.empty_caches(batch, program, capacity), first, program, capacity)
    )
    shardings = jax.tree.map(layout.sharding, state_axes(state), is_leaf=sharding.is_axes)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.sharding(()))
    with use_abstract_mesh(mesh.abstract_mesh):  # the Triton lowerings ask it which GPU they compile for
        traced = decoder.jitted_launch.trace(decoder.params, placed, number, number, program=program)
        compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    body = _loop_body(compiled.as_text())
    return Loop(
        weights=_bytes(decoder.params[0]),
        draft_weights=_bytes(decoder.params[1]),
        cache=_bytes(placed.cache),
        draft_cache=0 if placed.draft is None else _bytes(placed.draft.cache),
        arguments=memory.argument_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        collectives=tuple(_collectives(body)),
        kernels=len(re.findall(r" (?:fusion|custom-call|sort|copy|copy-start)\(", body)),
        seconds=round(time.perf_counter() - began, 1),
    )


def _shapes(config: Any, dtype: Any, layout: Layout) -> Any:
    """A model laid out, with shapes in place of weights, and with the kernels that GPUs take."""
    stored, module = abstract(config, dtype), abstract(repeat_kv_heads(config, layout), dtype)
    shapes = {
        path: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding)
        for path, p in placements(stored, module, layout).items()
    }
    laid_out = filled(module, shapes)
    for _, part in nnx.iter_graph(laid_out):
        if isinstance(part, Experts):
            kernel = part.gate_up.get_value()
            here = jax.ShapeDtypeStruct(kernel.sharding.shard_shape(kernel.shape), kernel.dtype)
            part.implementation = resolve(part.implementation, "gpu", here)
    return laid_out


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(tree))


CALLED = "to_apply|body|condition|calls|true_computation|false_computation"


def _loop_body(text: str) -> str:
    """The computation that the outermost ``while`` runs, and those that it calls: all branches of a conditional, of
    which a round takes one."""
    computations = {m[1]: m[0] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?^\}", text, re.M | re.S)}
    entry = next(c for c in computations.values() if c.startswith("ENTRY"))
    found = re.search(r" while\(.*?body=%?([\w.\-]+)", entry)
    if found is None:
        raise ValueError("the program holds no loop")
    seen: dict[str, str] = {}
    waiting = [found[1]]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen[name] = computations[name]
        # Of a fusion the inside is one kernel; of calls, conditionals and inner loops it is more of the same.
        for line in seen[name].splitlines():
            if " fusion(" not in line:
                waiting += re.findall(rf"(?:{CALLED})=%?([\w.\-]+)", line)
                for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                    waiting += re.findall(r"[\w.\-]+", branches)
    return "\n".join(seen.values())


def _collectives(body: str) -> Iterator[Collective]:
    for result, name in re.findall(
        r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", body
    ):
        shapes = re.findall(r"([a-z]+\d+\w*)\[([\d,]*)\]", result)
        sizes = [_bits(kind) * int(np.prod([int(n) for n in dims.split(",") if n])) // 8 for kind, dims in shapes]
        yield Collective(name, max(sizes))


def _bits(kind: str) -> int:
    return int(re.findall(r"\d+", kind)[0])
