"""Compiled programs, kept by the shapes they were made for.

Executables are made ahead of time, so that every long compilation is seen, counted and timed.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import jax

from jeagle.decode import Program

__all__ = ["CompiledProgram", "Programs"]

# Kept on a CPU, the last used ones: each of SmolLM2's holds 80 MB and maps 300 pieces of memory, a process on Linux may
# have 65,530, and XLA crashes where it gets none. One that comes back is read from the cache of compiled programs.
MOST_PROGRAMS = 48


@dataclass(frozen=True)
class CompiledProgram:
    """One bucket: what it was compiled for and what that cost."""

    name: str  # "prefill", "decode", "settle" or "insert"
    batch: int  # rows
    capacity: int  # cache positions per row
    positions: int  # chunk length, nodes of the tree, P of what is settled, or cache positions of what is inserted
    program: Program | None  # None for the others, which depend on none of it
    seconds: float
    executable: jax.stages.Compiled = field(repr=False)


class Programs:
    """Those of one model: all of them take ``params`` and, first of their other arguments, caches or a state."""

    def __init__(self, params: Any, page_size: int):
        self._params, self._page_size = params, page_size
        self._programs: dict[tuple, CompiledProgram] = {}
        self._used: dict[tuple, int] = {}  # when, on this clock
        self._clock = itertools.count()
        self._lock = threading.Lock()

    @property
    def listed(self) -> list[CompiledProgram]:
        """In the order in which they were made."""
        return list(self._programs.values())

    def __call__(self, name: str, jitted, args: tuple, *, positions: int, **static) -> jax.stages.Compiled:
        """The executable of ``jitted(params, *args, **static)`` for such shapes. Compiling ahead of time, once per key,
        is what makes buckets countable. positions: as in ``CompiledProgram``."""
        leaves, structure = jax.tree.flatten(args)
        key = (name, *static.values(), structure, tuple(x.shape for x in leaves))
        with self._lock:  # one compilation at a time: XLA would share the cores between two
            if key not in self._programs:
                began = time.perf_counter()
                executable = jitted.lower(self._params, *args, **static).compile()
                jitted.clear_cache()  # else JAX keeps it for good, dropped here or not
                B, M = args[0].page_table_BM.shape
                capacity, seconds = M * self._page_size, time.perf_counter() - began
                self._programs[key] = CompiledProgram(
                    name, B, capacity, positions, static.get("program"), seconds, executable
                )
            self._used[key] = next(self._clock)
            if jax.default_backend() == "cpu" and len(self._programs) > MOST_PROGRAMS:
                oldest = min(self._used, key=self._used.__getitem__)
                del self._programs[oldest], self._used[oldest]
            return self._programs[key].executable
