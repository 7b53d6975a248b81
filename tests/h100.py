"""Compiling for an H100 without one: XLA and ptxas run on any machine once the CUDA plugin of the same version is there.

``make test-h100-compile`` provides it. ``compile_for_h100`` gives what a GPU would be given (aliasing, buffers, kernels
with their grids); a folder that stands in for CUDA's writes down what ptxas says of each kernel (registers, spills).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

# A GpuTargetConfigProto, after XLA's own specification of the H100 SXM. Without driver_version XLA makes no command
# buffers of loops.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Kernel:
    """What ptxas said of one kernel."""

    name: str
    registers: int
    spilled_bytes: int  # stores and loads


def stand_in_cuda(directory: Path) -> None:
    """A CUDA folder whose ptxas also writes its findings to ``directory/ptxas.log``. Set XLA_FLAGS to use it:
    ``--xla_gpu_cuda_data_dir=directory``, before JAX starts."""
    found = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    # A wrapper script in PATH may stand for the real one.
    ptxas = next(p for p in (Path("/usr/local/cuda/bin/ptxas"), Path(found).resolve()) if p.exists())
    (directory / "bin").mkdir(parents=True)
    (directory / "nvvm").symlink_to(ptxas.parent.parent / "nvvm")
    script = directory / "bin" / "ptxas"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --version) exec {ptxas} "$@";; esac\nexec {ptxas} -v "$@" 2>> {directory}/ptxas.log\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def kernels(log: Path) -> list[Kernel]:
    """The kernels compiled so far, oldest first."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log.read_text() if log.exists() else "",
        re.DOTALL,
    )
    return [Kernel(name, int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found]


@cache
def _mesh() -> Mesh:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return Mesh(np.array(topology.devices), ("device",))


def compile_for_h100(jitted: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
    """A jitted function compiled for one H100; args are arrays or anything with shapes and dtypes."""
    sharding = NamedSharding(_mesh(), PartitionSpec())

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with use_abstract_mesh(_mesh().abstract_mesh):  # the Triton lowerings ask it which GPU they compile for
        return jitted.trace(*jax.tree.map(abstract, args), **static).lower().compile()


def available() -> str | None:
    """None, or why nothing can be compiled for an H100 here."""
    if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1":
        return "run by make test-h100-compile"
    try:
        import jax_cuda13_plugin  # noqa: F401
    except ImportError:
        return "jax-cuda13-plugin is not installed"
    if not shutil.which("ptxas") and not Path("/usr/local/cuda/bin/ptxas").exists():
        return "no ptxas: CUDA's compiler is not installed"
    return None
