"""Tree attention as two Pallas kernels for Hopper GPUs (Mosaic GPU: TMA copies, wgmma). Interpreted on a CPU.

Algorithm: FlashAttention-2's online softmax (arXiv:2307.08691, Algorithm 1) with FlashAttention-3's use of Hopper
(arXiv:2407.08608): pages come by asynchronous copies, ``STAGES`` steps deep, weights stay in registers. The prefix is
split over programs (flash-decoding) and merged by log-sum-exp. One program holds 64 or 128 query rows of one request
and kv head, a warp group for each 64, and walks its share of the request's pages, ``KEYS`` positions a step. Split 0
also takes the suffix with its ancestor mask. With one split the first launch writes the answer (and XLA reorders the
log-sum-exp if anybody asks for it); otherwise a second one merges the parts.

Rows lie head by head, each head's T nodes in whole eights: then every eight rows are a strided box of q and of the
output, and a copy fills with zeros, or leaves out, what lies beyond T or beyond the last head. T or U above 8 and not a
multiple of 8 cost padded copies of q, k, v and the answer, which XLA may fuse into what makes and takes them.

Traffic per call: the visible cache once per 128 rows (2 * length * K * H * itemsize bytes per request; further row
blocks read it from the second-level cache), q, k, v and out once, and with S > 1 splits 8 * S * T * G * K * H bytes of
float32 parts, written and read. Floor: that over the memory bandwidth; on an H100 (3.35 TB/s) 8 kv heads of 128 in
bfloat16 at 8192 positions are 33.6 MB per request and layer, 10 us.

Plain XLA beside it: the mask, laid out by rows, once per forward pass (it is the same for all layers).
"""

from __future__ import annotations

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.plan import plan

__all__ = ["tree_attention"]

ROWS = 64  # query rows of one warp group: what wgmma takes
KEYS = 64  # cache positions per step
MOST_SPLITS = 64
STAGES = 3  # steps of keys and values in shared memory; with 64 rows two programs fit one multiprocessor
LANES = 128  # threads of a warp group
LOG2E = 1.4426950408889634
# No reduction here crosses warps; the room for those would leave one multiprocessor a single program.
PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


class Cut(NamedTuple):
    """Static shape of one launch."""

    T: int
    K: int
    G: int
    H: int
    U: int
    page_size: int
    head_rows: int  # of one query head: T in whole eights
    groups: int  # warp groups of one program
    splits: int  # programs that share one row block's prefix

    @property
    def blocks(self) -> int:
        """Programs that share the rows of one request and kv head."""
        return -(-self.G * self.head_rows // (self.groups * ROWS))

    @property
    def rows(self) -> int:
        return self.blocks * self.groups * ROWS

    @property
    def piece(self) -> int:
        """Cache positions per copy."""
        return min(KEYS, self.page_size)


def tree_attention(
    q_BTKGH: jax.Array,
    k_BUKH: jax.Array,
    v_BUKH: jax.Array,
    suffix_mask: jax.Array,
    pages_k: jax.Array,
    pages_v: jax.Array,
    page_table_BM: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTKGH, lse_BTKG). See ``tree_attention_xla.tree_attention``.

    Raises:
      NotImplementedError: anything but bfloat16, scales, a head width other than 64 and 128, pages that do not tile
        steps of 64 positions.
    """
    B, T, K, G, H = q_BTKGH.shape
    page_size = pages_k.shape[2]
    dtypes = {x.dtype for x in (q_BTKGH, k_BUKH, v_BUKH, pages_k, pages_v)}
    if dtypes != {jnp.dtype(jnp.bfloat16)} or scales is not None:
        raise NotImplementedError(f"attention 'mosaic': {sorted(map(str, dtypes))} is not bfloat16 without scales")
    if H not in (64, 128):
        raise NotImplementedError(f"attention 'mosaic': head width {H} is neither 64 nor 128")
    if page_size % KEYS and page_size not in (8, 16, 32):
        raise NotImplementedError(f"attention 'mosaic': page size {page_size} is not 8, 16, 32 or a multiple of {KEYS}")
    # Copies in tiles of eight rows take less than one tile, or whole ones.
    more_T, more_U = (-n % 8 if n > 8 else 0 for n in suffix_mask.shape[1:])
    q_BTKGH = jnp.pad(q_BTKGH, ((0, 0), (0, more_T), (0, 0), (0, 0), (0, 0)))
    k_BUKH, v_BUKH = (jnp.pad(x, ((0, 0), (0, more_U), (0, 0), (0, 0))) for x in (k_BUKH, v_BUKH))
    suffix_mask = jnp.pad(suffix_mask, ((0, 0), (0, more_T), (0, more_U)))
    head_rows, capacity = -(-T // 8) * 8, page_table_BM.shape[1] * page_size
    p = plan(B=B, T=head_rows, K=K, G=G, H=H, capacity=capacity, dtype=q_BTKGH.dtype)
    interpret = _on_cpu()
    # Interpreted warp groups are threads that wait for each other while they hold XLA's, one for each CPU or device.
    groups = 1 if interpret and jax.device_count() < 4 else max(1, p.rows // ROWS)
    # The merge takes LANES numbers at a time, and holds every split's sum: 256 of them spill.
    splits = 1 if q_BTKGH.size < LANES else min(p.splits, MOST_SPLITS)
    cut = Cut(T + more_T, K, G, H, k_BUKH.shape[1], page_size, head_rows, groups=groups, splits=splits)
    operands = (start_B, length_B, page_table_BM, q_BTKGH, k_BUKH, v_BUKH, suffix_mask, pages_k, pages_v)
    out_BTKGH, lse_BTKG = _launch(*operands, cut=cut, interpret=interpret)
    return out_BTKGH[:, :T], lse_BTKG[:, :T]


def _on_cpu() -> bool:
    """Asked while tracing: lax.platform_dependent takes no branches with effects, and the interpreter has some."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


def _launch(start_B, length_B, table_BM, q_BTKGH, k_BUKH, v_BUKH, mask, pages_k, pages_v, *, cut: Cut, interpret: bool):
    B, T, K, G, H = q_BTKGH.shape
    dtype = q_BTKGH.dtype
    part = dtype if cut.splits == 1 else jnp.dtype(jnp.float32)
    mode = plgpu.InterpretGPUParams() if interpret else None

    # Row by row as the kernel has them, for the kernel to load as it is.
    mask = jnp.pad(mask.astype(jnp.float32), ((0, 0), (0, cut.head_rows - T), (0, -cut.U % KEYS)))
    mask = jnp.pad(jnp.tile(mask, (1, G, 1)), ((0, 0), (0, cut.rows - G * cut.head_rows), (0, 0)))

    def tiles(*shape: int, dtype=dtype):
        """Shared memory as wgmma reads it and TMA writes it: tiles of 8 rows by 128 bytes, swizzled."""
        width = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))

    keys_or_values = tiles(STAGES, KEYS, H)
    copies = KEYS // cut.piece
    scratch = dict(
        q_smem=tiles(cut.groups, ROWS, H),
        # The answer takes the pages' place when the last of them is used.
        shared=plgpu.RefUnion(
            (keys_or_values, keys_or_values),
            (tiles(cut.groups, ROWS, H, dtype=part), plgpu.SMEM((cut.groups, ROWS), jnp.float32)),
        ),
        q_barriers=plgpu.Barrier(num_arrivals=ROWS // 8, num_barriers=cut.groups),
        k_barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        v_barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        free_barriers=plgpu.Barrier(num_arrivals=max(1, cut.groups - 1), num_barriers=STAGES),
        meeting=plgpu.Barrier(num_arrivals=cut.groups),
    )
    if interpret:  # the interpreter's wgmma takes no operands from registers
        scratch["weight_smem"] = tiles(cut.groups, ROWS, KEYS)
    out, lse = plgpu.kernel(
        partial(_attend_kernel, cut=cut),
        out_type=(
            jax.ShapeDtypeStruct((cut.splits, B, T, K, G * H), part),
            jax.ShapeDtypeStruct((cut.splits, B, K, cut.rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(B * K, cut.splits, cut.blocks),  # the last runs fastest: blocks of rows share pages in the cache
        grid_names=("row_and_head", "split", "block"),
        num_threads=cut.groups,
        thread_name="group",
        compiler_params=PARAMS,
        interpret=mode,
        kernel_name="tree_attention",
    )(start_B, length_B, table_BM, q_BTKGH.reshape(B, T, K, G * H), k_BUKH, v_BUKH, mask, pages_k, pages_v)
    if cut.splits == 1:
        lse_BKGT = lse[0, :, :, : G * cut.head_rows].reshape(B, K, G, cut.head_rows)[..., :T]
        return out.reshape(q_BTKGH.shape), jnp.moveaxis(lse_BKGT, -1, 1)
    out, lse = plgpu.kernel(
        partial(_merge_kernel, cut=cut),
        out_type=(
            jax.ShapeDtypeStruct((q_BTKGH.size,), dtype),
            jax.ShapeDtypeStruct((q_BTKGH.size // H,), jnp.float32),
        ),
        grid=(-(-q_BTKGH.size // LANES),),
        grid_names=("chunk",),
        compiler_params=PARAMS,
        interpret=mode,
        kernel_name="tree_attention_merge",
    )(out.reshape(cut.splits, -1), lse)
    return out.reshape(q_BTKGH.shape), lse.reshape(q_BTKGH.shape[:-1])


def _attend_kernel(
    *refs, q_smem, shared, q_barriers, k_barriers, v_barriers, free_barriers, meeting, weight_smem=None, cut: Cut
):
    """One (request, kv head), one block of rows, one split. Refs are whole arrays; warp group 0 also starts copies."""
    start_ref, length_ref, table_ref, q_ref, k_ref, v_ref, mask_ref, pages_k_ref, pages_v_ref, out_ref, lse_ref = refs
    WGMMA = plgpu.Layout.WGMMA
    H, page_size, piece = cut.H, cut.page_size, cut.piece
    row, kv = lax.axis_index("row_and_head") // cut.K, lax.axis_index("row_and_head") % cut.K
    split, group = lax.axis_index("split"), lax.axis_index("group")
    first_row = (lax.axis_index("block") * cut.groups + group) * ROWS
    (k_smem, v_smem), (out_smem, lse_smem) = shared
    q_smem, out_smem, lse_smem = q_smem.at[group], out_smem.at[group], lse_smem.at[group]

    start, length = start_ref[row], jnp.minimum(length_ref[row], table_ref.shape[1] * page_size)
    first, last = start // KEYS, (length + KEYS - 1) // KEYS
    share = (jnp.maximum(last - first, 0) + cut.splits - 1) // cut.splits
    low = first + split * share
    high = jnp.minimum(low + share, last)
    suffix_steps = jnp.where(split == 0, -(-cut.U // KEYS), 0)

    def eights():
        """(rows here, their nodes, their head's columns): boxes that may reach beyond T or G."""
        for i in range(0, ROWS, 8):
            r = first_row + i
            yield pl.ds(i, 8), pl.ds(r % cut.head_rows, 8), pl.ds(r // cut.head_rows * H, H)

    def copy_step(slot, source):
        """Starts the copies of one step's keys and values; ``source(i)`` names the refs of the i-th piece."""
        for i in range(KEYS // piece):
            k, v = source(i)
            here = slot, pl.ds(i * piece, piece)
            plgpu.copy_gmem_to_smem(k, k_smem.at[here], k_barriers.at[slot])
            plgpu.copy_gmem_to_smem(v, v_smem.at[here], v_barriers.at[slot])

    def copy_pages(step, slot):
        def source(i):
            # The last step's pages may run out: any page of the request will do, what it holds is not seen.
            position = jnp.clip(step * KEYS + i * piece, start // piece * piece, (length - 1) // piece * piece)
            at = kv, table_ref[row, position // page_size], pl.ds(position % page_size, piece)
            return pages_k_ref.at[at], pages_v_ref.at[at]

        copy_step(slot, source)

    def copy_suffix(step, slot):
        def source(i):
            at = row, pl.ds(step * KEYS + i * piece, piece), kv  # beyond U: zeros
            return k_ref.at[at], v_ref.at[at]

        copy_step(slot, source)

    def meet():
        if cut.groups > 1:
            plgpu.barrier_arrive(meeting)
            plgpu.barrier_wait(meeting)

    def refill(copy, step, slot, *, when, used):
        """Group 0 starts a step's copies; into a slot ``used`` before, once the other groups are done with it."""

        @pl.when(when & (group == 0))
        def _():
            if cut.groups > 1:
                pl.when(used)(lambda: plgpu.barrier_wait(free_barriers.at[slot]))
            copy(step, slot)

    def absorb(carry, slot, seen, *, again, clean=None):
        """One step of keys into the running (highest score, sum of weights, weighted values).

        again: whether the slot will be refilled.
        """
        highest, total, acc = carry

        def dot(a, b):
            def accumulate(ref):
                plgpu.wgmma(ref, a, b)
                return ref[...]

            return pl.run_scoped(accumulate, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))

        plgpu.barrier_wait(k_barriers.at[slot])
        # Scores in powers of two: exp2 is one instruction. Keys not seen may be NaN.
        score = dot(q_smem, k_smem.at[slot].transpose((1, 0))) * (H**-0.5 * LOG2E)
        score = jnp.where(seen, score, -jnp.inf)
        new = jnp.maximum(highest, jnp.max(score, axis=1))
        base = jnp.where(new == -jnp.inf, 0.0, new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
        weight = jnp.exp2(score - lax.broadcast_in_dim(base, score.shape, [0]))
        decay = jnp.exp2(highest - base)
        total = total * decay + jnp.sum(weight, axis=1)
        weight = weight.astype(q_smem.dtype)
        if weight_smem is not None:
            weight_smem.at[group][...] = weight
            plgpu.commit_smem()
            weight = weight_smem.at[group]
        plgpu.barrier_wait(v_barriers.at[slot])
        if clean is not None:
            clean()
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + dot(weight, v_smem.at[slot])
        if cut.groups > 1:
            pl.when(again & (group > 0))(lambda: plgpu.barrier_arrive(free_barriers.at[slot]))
        return new, total, acc

    def suffix(step, carry):
        slot = STAGES - 1  # the prefix's first steps are on their way to the others
        refill(copy_suffix, step, slot, when=True, used=step > 0)
        at = row if mask_ref.shape[0] > 1 else 0, pl.ds(first_row, ROWS), pl.ds(step * KEYS, KEYS)
        seen = plgpu.load(mask_ref.at[at], layout=WGMMA, optimized=False) > 0
        return absorb(carry, slot, seen, again=(step + 1 < suffix_steps) | (low + slot < high))

    def prefix(step, carry):
        slot, ahead = (step - low) % STAGES, step + STAGES - 1
        refill(copy_pages, ahead, (ahead - low) % STAGES, when=ahead < high, used=(step > low) | (split == 0))

        def seen(shape, axis):
            position = step * KEYS + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)
            return (position >= start) & (position < length)

        def clean():
            """Zeros for the values not seen: they may be NaN, and 0 * NaN is NaN."""

            @pl.when((step * KEYS < start) | (step * KEYS + KEYS > length))
            def _():
                @pl.when(group == 0)
                def _():
                    value = v_smem.at[slot]
                    value[...] = jnp.where(seen((KEYS, H), 0), value[...], jnp.zeros((), value.dtype))
                    plgpu.commit_smem()

                meet()

        return absorb(carry, slot, seen((ROWS, KEYS), 1), again=step + STAGES < high, clean=clean)

    for here, t, h in eights():
        plgpu.copy_gmem_to_smem(q_ref.at[row, t, kv, h], q_smem.at[here], q_barriers.at[group])
    for i in range(STAGES - 1):
        pl.when((low + i < high) & (group == 0))(partial(copy_pages, low + i, i))
    carry = (
        plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), WGMMA.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), WGMMA),
    )
    plgpu.barrier_wait(q_barriers.at[group])
    carry = lax.fori_loop(0, suffix_steps, suffix, carry)
    highest, total, acc = lax.fori_loop(low, high, prefix, carry)

    meet()
    scale = 1.0 / jnp.where(total == 0, 1.0, total)
    out_smem[...] = (acc * lax.broadcast_in_dim(scale, acc.shape, [0])).astype(out_smem.dtype)
    lse_smem[...] = highest / LOG2E + jnp.log(total)  # -inf where nothing was seen
    plgpu.commit_smem()
    for here, t, h in eights():
        plgpu.copy_smem_to_gmem(out_smem.at[here], out_ref.at[split, row, t, kv, h])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[split, row, kv, pl.ds(first_row, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _merge_kernel(part_ref, part_lse_ref, out_ref, lse_ref, *, cut: Cut):
    """128 numbers of the answer, one query head's or two's: the splits' answers weighed by their sums."""
    # The last chunk may begin in the one before it, which writes the same.
    first = jnp.minimum(lax.axis_index("chunk") * LANES, out_ref.shape[0] - LANES)
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=plgpu.Layout.WG_STRIDED((LANES,), vec_size=1))

    def shares(n):
        """Each split's share in the n-th head's answer."""
        g, kv, t, row = n % cut.G, n // cut.G % cut.K, n // (cut.G * cut.K) % cut.T, n // (cut.G * cut.K * cut.T)
        lse_S = [part_lse_ref[s, row, kv, g * cut.head_rows + t] for s in range(cut.splits)]
        highest = reduce(jnp.maximum, lse_S)
        base = jnp.where(highest == -jnp.inf, 0.0, highest)
        weight_S = [jnp.exp(lse - base) for lse in lse_S]
        total = reduce(jnp.add, weight_S)
        lse_ref[n] = base + jnp.log(total)
        scale = 1.0 / jnp.where(total == 0, 1.0, total)
        return [weight * scale for weight in weight_S]

    heads = [shares(first // cut.H + i) for i in range(LANES // cut.H)]
    out = jnp.zeros((), jnp.float32)
    for s in range(cut.splits):
        share = heads[0][s] if cut.H == LANES else jnp.where(lane < cut.H, heads[0][s], heads[1][s])
        out = out + share * part_ref[s, pl.ds(first, LANES)]
    out_ref[pl.ds(first, LANES)] = out.astype(out_ref.dtype)
