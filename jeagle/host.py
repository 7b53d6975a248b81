"""The machine this process runs on, in words: seconds measured on one kind of it are not those of another."""

from __future__ import annotations

import os
import platform
import warnings
from functools import cache
from pathlib import Path

import jax

from jeagle.devices import MEMORY_SHARE

__all__ = ["described", "has_avx512", "keep_compiled_programs", "like_here", "processor", "take_memory"]


@cache
def _flags() -> frozenset[str]:
    """Of the processor, where Linux tells."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def has_avx512() -> bool:
    return "avx512f" in _flags()


def processor() -> str:
    """The architecture and its widest vectors, which products of few rows follow (``few_rows.py``)."""
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in _flags()), None)
    return platform.machine() + (f" with {widest}" if widest else "")


def described() -> str:
    """JAX's first device and its host. Example: "cpu (x86_64 with AVX-512, 2 cores)"."""
    return f"{jax.devices()[0].device_kind} ({processor()}, {os.cpu_count()} cores)"


def like_here(description: str) -> bool:
    """Whether what was fastest on a machine, as ``described`` there, may be taken to be so here: on the same kind of
    device, and where that is a CPU, with the same vectors."""

    def parts(text: str) -> tuple[str, str]:
        device, _, host = text.rpartition(" (")
        return device, host.partition(",")[0] if device == "cpu" else ""

    return parts(description) == parts(described())


def take_memory() -> None:
    """Start JAX, where that has not been done, with MEMORY_SHARE of each GPU's memory in place of its own 75%, unless
    the environment says how much. The environment stays as it is: child processes have their own GPUs."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX takes one of them alone
    if any(name in os.environ for name in names):
        return
    os.environ[names[0]] = str(MEMORY_SHARE)
    try:
        jax.devices()
    finally:
        del os.environ[names[0]]


def keep_compiled_programs(directory: Path) -> None:
    """Let a second process start fast. A cache directory the user has set stays, and so does their least time."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # What another process is just writing may be read by half: it is compiled instead.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
        if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:  # JAX's default
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
