"""How the suite times: repetitions inside one compiled program, the best of several runs of it, nothing subtracted."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gpu_parts.rows import Skip

__all__ = ["best_seconds", "copy_bandwidth", "filled", "num_kernels", "require_memory"]


def best_seconds(run: Callable[[], Any], *, repeats: int = 5, budget: float = 3.0) -> float:
    """The best of several timed runs, after one that is not timed; at least one, and fewer once ``budget`` seconds are
    spent."""
    jax.block_until_ready(run())
    best, spent = math.inf, 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - began
        best, spent = min(best, seconds), spent + seconds
        if spent > budget:
            break
    return best


def copy_bandwidth(*, tiny: bool) -> dict[str, Any]:
    """Bytes read and written per second by passes of ``x = x / 2 + 1`` over 2 GB: what a kernel can hope for."""
    size, passes = (1 << 16, 2) if tiny else (1 << 29, 20)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, passes, lambda _, x: x * 0.5 + 1.0, x)

    x = jnp.ones(size, jnp.float32)
    return dict(bytes_per_second=2 * x.nbytes * passes / best_seconds(lambda: run(x)))


def require_memory(nbytes: int) -> None:
    """Raises Skip where the device's free memory does not hold so many bytes and a tenth more."""
    found = jax.devices()[0].memory_stats() or {}
    free = found.get("bytes_limit", 4 << 30) - found.get("bytes_in_use", 0)
    if nbytes * 1.1 > free:
        raise Skip(f"needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


@partial(jax.jit, static_argnums=(0, 1))
def filled(shape: tuple[int, ...], dtype: Any, seed: int = 0, size: float = 1.0) -> jax.Array:
    """Hashed numbers in [-size, size). Elementwise: the temporaries of a random generator would not fit beside the
    largest arrays, and zeros can be faster than data."""
    bits = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        bits = (bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        bits ^= bits >> 15
    return (jax.lax.bitcast_convert_type(bits, jnp.int32) * (size * 2.0**-31)).astype(dtype)


# Instructions of an optimised program that start nothing on the device.
SILENT = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("while", "call", "conditional", "copy-done", "async-done"),
}


def num_kernels(compiled: jax.stages.Compiled) -> int:
    """Instructions that run on the device in one pass of the program's outer loop; what an inner loop holds counts
    once. On a GPU nearly each is one kernel or one copy.

    Example: a loop whose body is a fusion and an inner loop of two fusions (one of them its condition) counts 3.
    """
    bodies: dict[str, list[tuple[str, str]]] = {}
    entry = ""
    for line in (compiled.as_text() or "").splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif instruction := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*?[\])}] ([a-z][\w\-]*)\(", line):
            bodies[name].append((instruction[1], line))

    def count(name: str) -> int:
        total = 0
        for opcode, line in bodies.get(name, []):
            if opcode in ("while", "call", "conditional"):
                called = re.findall(r"(?:body|condition|to_apply|\w+_computation)=%?([\w.\-]+)", line)
                total += sum(count(each) for each in called)
            total += opcode not in SILENT
        return total

    loops = [
        m[1] for opcode, line in bodies[entry] if opcode == "while" and (m := re.search(r"body=%?([\w.\-]+)", line))
    ]
    return max((count(body) for body in loops), default=0)
