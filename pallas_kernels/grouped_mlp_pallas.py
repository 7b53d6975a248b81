"""Routed experts as two Pallas kernels, lowered through Triton: a grouped GEMM per launch. Interpreted on a CPU.

Rows of one expert are taken ``rows`` at a time: a block. A program is one block and one tile of output columns; it
gathers its rows of x by itself and walks the contracted axis, ``depth`` positions a step. The first launch computes
silu(x @ gate) * (x @ up), the second multiplies that by ``down``. Where one row gives too few programs (experts split
over devices), they share the contracted axis of the first launch, and the second adds their float32 parts as it reads
them.

Weights per call: each block reads its expert once, as every column belongs to one tile, and a block that stays empty
reads nothing. Up to 16 tokens no expert has two blocks, and beyond only one that gets over 16 rows and over twice its
even share; so few tokens read the chosen experts' bytes, whatever E is. Blocks of one expert are neighbours in the
grid, so that they run side by side and should share its weights in the second-level cache. Floor for few
tokens: those bytes over the memory bandwidth; on an H100 (3.35 TB/s) an expert of Llama 4 (3 x 5120 x 8192, bfloat16)
is 252 MB, 75 us, or 9.4 us where eight devices split it. x and the hidden rows are read once per tile of columns, from
the second-level cache.

JAX deprecated Pallas' Triton lowering in 0.11; see tree_attention_pallas.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.plan import FP8_CAPABILITY, NUM_MULTIPROCESSORS, compute_capability, little_shared, power_of_two

__all__ = ["grouped_mlp"]


class Tiles(NamedTuple):
    """Static shape of one launch. All but ``warps`` and ``stages`` are powers of two, as Triton's arrays must be."""

    rows: int  # of one expert, in one program
    columns: int  # of the result; of gate and of up in the first launch
    depth: int  # positions of the contracted axis per step
    splits: int  # programs that share the contracted axis
    warps: int
    stages: int  # loads in flight


def grouped_mlp(
    x_mD: jax.Array,
    expert_m: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
    gate_up_E2F: jax.Array | None = None,
    down_ED: jax.Array | None = None,
    *,
    interpret: bool | None = None,
) -> jax.Array:
    """Row i through the gated MLP of expert ``expert_m[i]``, [m, D] in x's dtype. See ``jeagle.moe.run_experts``.

    x_mD, gate_up_ED2F (the gate first), down_EFD: bfloat16 or float32; sums are float32, the hidden rows x's dtype.
    gate_up_E2F, down_ED: float32 scales of weights that are float8_e4m3fn; None for others.
    expert_m: int32. A row whose expert is none of the E gets zeros and reads no weights.
    interpret: None interprets on CPUs alone.

    Raises:
      NotImplementedError: what ``refusal`` says.
    """
    (m, D), (E, _, _, F) = x_mD.shape, gate_up_ED2F.shape
    if refused := refusal(gate_up_ED2F):
        raise NotImplementedError(f"experts 'pallas': {refused}")
    first, second = tiles(m=m, E=E, D=D, F=F, dtype=x_mD.dtype)
    row_bR = blocks(expert_m, E, first.rows)
    launch = partial(_launch, first=first, second=second)
    operands = (row_bR, expert_m, x_mD, gate_up_ED2F, down_EFD, gate_up_E2F, down_ED)
    if interpret is not None:
        return launch(*operands, interpret=interpret)
    return lax.platform_dependent(
        *operands, cpu=partial(launch, interpret=True), default=partial(launch, interpret=False)
    )


def refusal(gate_up_ED2F: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why the kernels cannot read such experts; empty where they can."""
    _, D, _, F = gate_up_ED2F.shape
    if D % 16 or F % 16:
        return f"widths {D} and {F} are not both multiples of 16"
    if gate_up_ED2F.dtype.itemsize == 1 and compute_capability() < FP8_CAPABILITY:
        return f"8-bit weights take a GPU of compute capability {FP8_CAPABILITY}, this one has {compute_capability()}"
    both = math.prod(gate_up_ED2F.shape)
    if gate_up_ED2F.dtype.itemsize == 1 and any(2**31 < size <= 2**32 for size in (both, both // 2)):  # of down
        return f"8-bit weights {gate_up_ED2F.shape} lie between 2 and 8 GiB, and offsets have 32 bits up to 4"
    return ""


def tiles(*, m: int, E: int, D: int, F: int, dtype: jnp.dtype) -> tuple[Tiles, Tiles]:
    """The tiles of the two launches for m rows.

    The rule: as many rows as twice an expert's even share. Columns of 128 bytes, a cache line of weights, or of 64
    where that leaves multiprocessors idle; then, for a single row, splits of the first launch, which experts split over
    devices make narrow (parts of more rows, padded to 16, would take all shared memory of the second). Steps so deep
    that the loads in flight, on all multiprocessors together, exceed what bandwidth times latency asks of an H100
    (about 3 MB). Where there is little shared memory, half of the rows and fewer loads in flight.
    """
    wide = jnp.dtype(dtype).itemsize > 2  # float32 runs without tensor cores and holds twice the bytes
    less = little_shared()
    rows = min(max(16, power_of_two(-(-2 * m // E))), 32 if wide else 64 if less else 128)
    most_blocks = num_blocks(m, E, rows)

    def launch(contracted: int, width: int, can_split: bool) -> Tiles:
        columns = 32 if wide else 64
        if most_blocks * (width // columns) < NUM_MULTIPROCESSORS:
            columns //= 2
        columns = divisor(width, columns)
        depth = divisor(contracted, 32 if wide else 128 if rows == 16 else 64)
        room = max(1, NUM_MULTIPROCESSORS // (width // columns)) if can_split else 1
        splits = divisor(contracted // depth, power_of_two(room + 1) // 2)
        stages = 2 if wide or less else 3 if rows > 32 else 4
        return Tiles(rows, columns, depth, splits, warps=8 if rows == 128 else 4, stages=stages)

    return launch(D, F, m == 1), launch(F, D, False)


def divisor(n: int, most: int) -> int:
    """The largest power of two that divides n, at most ``most``, itself one."""
    return min(most, n & -n)


def num_blocks(m: int, E: int, rows: int) -> int:
    """The most blocks that m rows can need: one for each expert (and for none of them), the others full."""
    used = min(m, E + 1)
    return used + (m - used) // rows


def blocks(expert_m: jax.Array, E: int, rows: int) -> jax.Array:
    """Each block's rows, int32 [num_blocks(m, E, rows), rows], m where there is none: by expert, then by row.

    By comparing all rows with each other. XLA makes three launches of it for few tokens and six for a prompt's chunk,
    whose comparisons are microseconds; a sort, counts, their sums and look-ups are eight (compiled for an H100).

    Example: experts [2, 0, 2, 2] and blocks of 2 rows: [[1, 4], [0, 2], [3, 4], [4, 4]].
    """
    m = len(expert_m)
    expert_m = jnp.where((expert_m >= 0) & (expert_m < E), expert_m, E)
    index_m = jnp.arange(m, dtype=jnp.int32)
    same_mm = expert_m[:, None] == expert_m[None, :]
    rank_m = jnp.sum(same_mm & (index_m[None, :] < index_m[:, None]), axis=1, dtype=jnp.int32)  # within its expert
    leads_m = rank_m % rows == 0
    before_m = jnp.sum(leads_m[None, :] & (expert_m[None, :] < expert_m[:, None]), axis=1, dtype=jnp.int32)
    place_m = (before_m + rank_m // rows) * rows + rank_m % rows
    place_bR = jnp.arange(num_blocks(m, E, rows) * rows, dtype=jnp.int32).reshape(-1, rows)
    return jnp.min(jnp.where(place_m == place_bR[..., None], index_m, m), axis=-1)


def _launch(
    row_bR: jax.Array,
    expert_m: jax.Array,
    x_mD: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
    gate_up_E2F: jax.Array | None,
    down_ED: jax.Array | None,
    *,
    first: Tiles,
    second: Tiles,
    interpret: bool,
) -> jax.Array:
    (m, D), F = x_mD.shape, down_EFD.shape[1]
    parts = jax.ShapeDtypeStruct((first.splits, 2, m, F), jnp.float32)
    h = pl.pallas_call(
        partial(_gate_up_kernel, tiles=first),
        grid=(len(row_bR), F // first.columns, first.splits),
        out_shape=jax.ShapeDtypeStruct((m, F), x_mD.dtype) if first.splits == 1 else parts,
        compiler_params=pltriton.CompilerParams(num_warps=first.warps, num_stages=first.stages),
        interpret=interpret,
        name="grouped_mlp_gate_up",
    )(row_bR, expert_m, x_mD, gate_up_ED2F, *(() if gate_up_E2F is None else (gate_up_E2F,)))
    return pl.pallas_call(
        partial(_down_kernel, tiles=second),
        grid=(len(row_bR), D // second.columns),
        out_shape=jax.ShapeDtypeStruct((m, D), x_mD.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=second.warps, num_stages=second.stages),
        interpret=interpret,
        name="grouped_mlp_down",
    )(row_bR, expert_m, h, down_EFD, *(() if down_ED is None else (down_ED,)))


def _gate_up_kernel(row_ref, expert_ref, x_ref, gate_up_ref, *others, tiles: Tiles):
    """One block, one tile of hidden columns, one share of D. Refs are whole arrays; others: scales, if any, and h."""
    *scale_refs, h_ref = others
    E, D, _, _ = gate_up_ref.shape
    row_R1, own_R1, expert, steps = _block(row_ref, expert_ref, E, D // tiles.depth // tiles.splits)
    f_1C = (pl.program_id(1) * tiles.columns + jnp.arange(tiles.columns))[None, :]
    split = pl.program_id(2)
    low = split * (D // tiles.depth // tiles.splits)

    def step(i, sums):
        d_K = i * tiles.depth + jnp.arange(tiles.depth)
        x = pltriton.load(x_ref.at[row_R1, d_K[None, :]], mask=own_R1, other=0)
        weights = [pltriton.load(gate_up_ref.at[expert, d_K[:, None], half, f_1C]) for half in range(2)]
        return tuple(total + _dot(x, w.astype(x.dtype)) for total, w in zip(sums, weights))

    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    gate, up = lax.fori_loop(low, low + steps, step, (zeros, zeros))
    for scale_ref in scale_refs:
        gate, up = (x * pltriton.load(scale_ref.at[expert, half, f_1C]) for half, x in enumerate((gate, up)))
    if tiles.splits == 1:
        pltriton.store(h_ref.at[row_R1, f_1C], _gated(gate, up).astype(h_ref.dtype), mask=own_R1)
        return
    for half, part in enumerate((gate, up)):
        pltriton.store(h_ref.at[split, half, row_R1, f_1C], part, mask=own_R1)


def _down_kernel(row_ref, expert_ref, h_ref, down_ref, *others, tiles: Tiles):
    """One block, one tile of the result's columns. h_ref: hidden rows [m, F], or parts [splits, 2, 1, F]. others: as
    above."""
    *scale_refs, y_ref = others
    E, F, _ = down_ref.shape
    row_R1, own_R1, expert, steps = _block(row_ref, expert_ref, E, F // tiles.depth)
    d_1C = (pl.program_id(1) * tiles.columns + jnp.arange(tiles.columns))[None, :]

    def hidden(f_1K):
        if len(h_ref.shape) == 2:
            return pltriton.load(h_ref.at[row_R1, f_1K], mask=own_R1, other=0)
        parts = range(h_ref.shape[0])
        gate, up = (sum(pltriton.load(h_ref.at[part, half, 0, f_1K]) for part in parts) for half in range(2))
        return jnp.where(own_R1, _gated(gate, up).astype(y_ref.dtype), jnp.zeros((), y_ref.dtype))

    def step(i, total):
        f_K = i * tiles.depth + jnp.arange(tiles.depth)
        weights = pltriton.load(down_ref.at[expert, f_K[:, None], d_1C])
        return total + _dot(hidden(f_K[None, :]), weights.astype(y_ref.dtype))

    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    y = lax.fori_loop(jnp.int32(0), steps, step, zeros)
    for scale_ref in scale_refs:
        y = jnp.where(steps > 0, y * pltriton.load(scale_ref.at[expert, d_1C]), 0.0)  # whatever the scale of expert 0
    pltriton.store(y_ref.at[row_R1, d_1C], y.astype(y_ref.dtype), mask=own_R1)


def _block(row_ref, expert_ref, E: int, steps: int):
    """(its rows [R, 1], which of them are, its expert, its steps: 0 where there are no rows, or no expert)."""
    block = pl.program_id(0)
    m = expert_ref.shape[0]
    row_R1, leader = row_ref[block, :][:, None], row_ref[block, 0]
    expert = expert_ref[jnp.minimum(leader, m - 1)]
    works = (leader < m) & (expert >= 0) & (expert < E)
    # int32 by name: between two Python numbers the lowering chooses as between booleans.
    return row_R1, row_R1 < m, jnp.where(works, expert, 0), jnp.where(works, jnp.int32(steps), 0)


def _gated(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def _dot(a, b):
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
