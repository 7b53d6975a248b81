"""How a tree-attention call is cut into programs: block shapes, and into how many splits the prefix goes.

A call packs the G query heads of one kv head and the T tree nodes into rows, so a block of keys is read once for all of
them (the more rows, the more arithmetic per byte of cache, for free until about 200 on an H100). Programs are
(request, kv head) x blocks of rows x splits of the prefix ("flash-decoding": at batch 1 a model has 8 kv heads and the
GPU 132 multiprocessors).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["FP8_CAPABILITY", "HOPPER", "Plan", "compute_capability", "little_shared", "plan", "power_of_two"]

FP8_CAPABILITY = 8.9  # from which on Pallas' lowering casts 8-bit floats
HOPPER = 9.0  # its compute capability: what is compiled where no GPU is
NUM_MULTIPROCESSORS = 132  # H100 SXM and H200
WAVES = 2  # programs per multiprocessor to aim at: one's loads hide behind the other's arithmetic


class Plan(NamedTuple):
    """Static shape of one launch. All but ``warps`` and ``stages`` are powers of two, as Triton's arrays must be."""

    rows: int  # packed query rows of one program
    keys: int  # cache positions per step of its loop
    splits: int  # programs that share one row block's prefix
    warps: int
    stages: int  # loads in flight


def compute_capability() -> float:
    """Of JAX's first device; HOPPER where that is no NVIDIA GPU."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", HOPPER))
    except ValueError:  # AMD's have names
        return HOPPER


def little_shared() -> bool:
    """Whether a program may have but 99 KiB of shared memory, as on GPUs for desktops and their like (8.6, 8.9, 12.x);
    an A100 has 163 KiB, an H100 and a B200 have 227."""
    capability = compute_capability()
    return 8.0 < capability < HOPPER or capability >= 12


def plan(*, B: int, T: int, K: int, G: int, H: int, capacity: int, dtype: jnp.dtype) -> Plan:
    """The plan for q [B, T, K, G, H] over a cache of at most ``capacity`` positions per request.

    The rule: rows up to 64 in one block (beyond, 128, which two warp groups share); steps of 64 keys; then as many
    splits as fill the multiprocessors ``WAVES`` times, but none shorter than two steps at full capacity. Lengths are
    not known here: a split's share is cut from each request's own length when it runs, so short requests are spread
    as evenly as long ones. Where there is little shared memory, half of the rows and one load less in flight.
    """
    rows = max(16, power_of_two(T * G))
    wide = jnp.dtype(dtype).itemsize > 2  # float32 runs without tensor cores and holds twice the bytes
    less = little_shared()
    rows = min(rows, 32 if wide else 64 if less else 128)
    keys = min(32 if wide else 64, max(16, power_of_two(capacity)))
    programs = B * K * -(-T * G // rows)
    room = max(1, WAVES * NUM_MULTIPROCESSORS // programs)
    longest = max(1, capacity // (2 * keys))
    splits = min(power_of_two(room + 1) // 2, power_of_two(longest + 1) // 2)
    # Without tensor cores 32 rows of float32 need the registers of 8 warps: 4 spill 1,848 bytes at heads of 128.
    many = rows >= (32 if wide else 128)
    return Plan(rows, keys, max(1, splits), warps=8 if many else 4, stages=2 if wide or less or H > 128 else 3)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()
