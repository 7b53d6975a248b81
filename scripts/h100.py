"""Compiling for an H100 without one: XLA and ptxas run on any machine that has JAX's CUDA plugin and CUDA's compiler.

``python_for_h100`` starts a Python in which ``compile_for_h100`` gives what a GPU would be given: how buffers alias,
the kernels of the program with their grids, whether loops became command buffers (CUDA graphs), and, through a folder
that stands in for CUDA's, what ptxas says of each kernel (registers, spills). No autotuning happens without a device,
so matrix products stand there with default tiles: nothing here says how fast anything is.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import use_abstract_mesh

from jeagle.compile_only import CannotCompile, absent_mesh
from jeagle.plan_command import COMPILE_ENVIRONMENT
from jeagle.sharding import replicated

__all__ = ["CannotCompile", "Compiled", "Kernel", "compile_for_h100", "python_for_h100"]


@dataclass(frozen=True)
class Kernel:
    """One launch. Of Mosaic's and jax-triton's kernels XLA knows neither name nor shape: "custom call", (), 0, 0."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    in_loop: bool
    in_command_buffer: bool


class Ptxas(NamedTuple):
    """What ptxas said of one kernel."""

    registers: int
    spilled_bytes: int  # stores and loads


@dataclass(frozen=True)
class Compiled:
    kernels: tuple[Kernel, ...]  # in the order of the schedule
    ptxas: dict[str, Ptxas]  # by name
    alias_bytes: int
    temp_bytes: int
    whole_loop_is_command_buffer: bool
    triton_shared_bytes: int  # the most that a kernel of jax-triton takes


def python_for_h100(
    arguments: list[str], directory: Path, flags: str = "", plugin: Path | None = None
) -> subprocess.CompletedProcess:
    """Run ``python *arguments`` where ``compile_for_h100`` works; ``directory`` is empty and takes what XLA writes.

    Its stdout goes to the log of ptxas' words.

    plugin: a folder that jax-cuda13-plugin and jax-cuda13-pjrt were installed to, where the environment has none.
    """
    found = [
        Path(p) for p in ("/usr/local/cuda/bin/ptxas", shutil.which("ptxas")) if p is not None and Path(p).exists()
    ]
    if not found:
        raise CannotCompile("ptxas was not found: install CUDA's compiler (nvcc), or name its folder in PATH")
    ptxas = found[0].resolve()
    (directory / "bin").mkdir()
    (directory / "nvvm").symlink_to(ptxas.parent.parent / "nvvm")
    script = directory / "bin" / "ptxas"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --version) exec "{ptxas}" "$@";; esac\n'
        f'exec "{ptxas}" -v "$@" 2>> "{directory}/ptxas.log"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        **COMPILE_ENVIRONMENT,
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what comes from a cache was not seen by ptxas
        "MOSAIC_GPU_DUMP_PTXAS": "1",  # Mosaic runs a ptxas of its own; its words come on stdout
        "JAX_TRITON_DUMP_DIR": str(directory / "triton"),
        "JEAGLE_H100": str(directory),
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={directory} --xla_dump_to={directory}/dump "
        f"--xla_dump_hlo_as_text {flags}",
    }
    if plugin is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(plugin), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (directory / "ptxas.log").open("ab") as log:
        return subprocess.run([sys.executable, *arguments], env=environment, stdout=log, check=False)


def compile_for_h100(jitted: Any, *args: Any, **static: Any) -> Compiled:
    """A jitted function compiled for one H100; args are arrays or anything with shapes and dtypes."""
    directory = Path(os.environ["JEAGLE_H100"])
    mesh = absent_mesh("h100", 1, 1)
    sharding = replicated(mesh)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    log = directory / "ptxas.log"
    before = log.stat().st_size
    with use_abstract_mesh(mesh.abstract_mesh):  # the Triton lowerings ask it which GPU they compile for
        compiled = jitted.trace(*jax.tree.map(abstract, args), **static).lower().compile()
    schedule = max((directory / "dump").glob("*thunk_sequence.txt"), key=lambda p: p.stat().st_mtime_ns)
    changed = schedule.with_name(schedule.stem + "_after_thunk_passes.txt")  # only where command buffers were made
    if changed.exists():
        schedule = changed
    memory = compiled.memory_analysis()
    kernels, whole = _read_schedule(schedule.read_text())
    triton_shared_bytes = _assemble_triton(directory)
    ctypes.CDLL(None).fflush(None)  # Mosaic's words
    ptxas = _read_ptxas(log.read_text()[before:])
    return Compiled(kernels, ptxas, memory.alias_size_in_bytes, memory.temp_size_in_bytes, whole, triton_shared_bytes)


def _assemble_triton(directory: Path) -> int:
    """Give ptxas what jax-triton dumped since the last call; the most shared memory that any of it takes.

    JAX's plugin assembles it too, but with a ptxas that it finds by itself, and whose words it keeps.
    """
    shared_bytes = [0]
    for ptx in directory.glob("triton/*/*.ptx"):
        command: list[str | Path] = [directory / "bin" / "ptxas", "-arch=sm_90a", ptx, "-o", os.devnull]
        subprocess.run(command, check=True)
        shared_bytes.append(int(ptx.with_suffix(".compile_info").read_text().split()[-1]))
        ptx.unlink()
    return max(shared_bytes)


def _read_ptxas(words: str) -> dict[str, Ptxas]:
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        words,
        re.DOTALL,
    )
    return {name: Ptxas(int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}


def _read_schedule(text: str) -> tuple[tuple[Kernel, ...], bool]:
    """The kernels of XLA's thunk sequence, and whether a while loop lies inside a command buffer.

    Lines are "  012: kCustomKernel [prev | next] name grid: [8, 1, 32] threads: [128, 1, 1] shared_memory: 39 bytes",
    nested by indentation under kWhile and kCommandBuffer.
    """
    kernels: list[Kernel] = []
    around: list[tuple[int, str]] = []
    whole = False
    for line in text.splitlines():
        match = re.match(r"( *)\d+: (k\w+)", line)
        if not match:
            continue
        depth, kind = len(match[1]), match[2]
        around = [(d, k) for d, k in around if d < depth]
        kinds = {k for _, k in around}
        if kind in ("kWhile", "kCommandBuffer"):
            whole |= kind == "kWhile" and "kCommandBuffer" in kinds
            around.append((depth, kind))
        place = "kWhile" in kinds, "kCommandBuffer" in kinds
        shape = re.search(r"\] *([\w.]+) grid: \[([\d, ]+)\] threads: \[(\d+).*shared_memory: (\d+)", line)
        if shape:
            grid = tuple(int(n) for n in shape[2].split(","))
            kernels.append(Kernel(shape[1], grid, int(shape[3]), int(shape[4]), *place))
        elif kind == "kCustomCall":
            kernels.append(Kernel("custom call", (), 0, 0, *place))
    return tuple(kernels), whole
