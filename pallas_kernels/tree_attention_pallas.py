"""Tree attention as two Pallas kernels, lowered through Triton. Interpreted on a CPU.

Algorithm: FlashAttention-2's online softmax (arXiv:2307.08691, Algorithm 1) over one request and kv head, the prefix
split over programs (flash-decoding) and merged by log-sum-exp. One program holds ``rows`` packed query rows (T nodes x
G query heads), walks its share of the request's pages, ``keys`` positions a step, looking each position's page up by
itself. Split 0 also takes the suffix with its ancestor mask, so the tree costs no launch of its own. With one split
the first launch writes the answer; otherwise a second one merges the parts.

Traffic per call: the visible cache once per block of rows (2 * length * K * H * itemsize bytes per request; further row
blocks read it from the second-level cache), q, k, v and out once, and with S > 1 splits 8 * S * T * G * K * H bytes of
float32 parts, written and read. Floor: that over the memory bandwidth; on an H100 (3.35 TB/s) 8 kv heads of 128 in
bfloat16 at 8192 positions are 33.6 MB per request and layer, 10 us.

JAX deprecated Pallas' Triton lowering in 0.11; this file is all that depends on it.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.plan import FP8_CAPABILITY, Plan, compute_capability, little_shared, plan, power_of_two

__all__ = ["tree_attention"]

LOG2E = 1.4426950408889634


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
      NotImplementedError: what ``refusal`` says: among others 8-bit pages of 2 to 4 GiB, as the lowering counts their
        bytes in signed 32 bits.
    """
    B, T, K, G, H = q_BTKGH.shape
    if refused := refusal(pages_k):
        raise NotImplementedError(f"attention 'pallas': {refused}; 'xla' has no such limits")
    capacity = page_table_BM.shape[1] * pages_k.shape[2]
    p = plan(B=B, T=T, K=K, G=G, H=H, capacity=capacity, dtype=q_BTKGH.dtype)
    operands = (start_B, length_B, page_table_BM, q_BTKGH, k_BUKH, v_BUKH, suffix_mask, pages_k, pages_v)
    return lax.platform_dependent(
        *operands,
        *(scales or ()),
        cpu=partial(_launch, plan=p, interpret=True),
        default=partial(_launch, plan=p, interpret=False),
    )


def refusal(pages: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why the kernel cannot read pages [.., H]; empty where it can."""
    H = pages.shape[-1]
    most = 128 if little_shared() else 256  # what fits in shared memory
    if not 16 <= H <= most or power_of_two(H) != H:
        return f"head width {H} is not a power of two from 16 to {most}"
    if pages.dtype.itemsize == 1 and compute_capability() < FP8_CAPABILITY:
        return f"8-bit pages take a GPU of compute capability {FP8_CAPABILITY}, this one has {compute_capability()}"
    if pages.dtype.itemsize == 1 and 2**31 < math.prod(pages.shape) <= 2**32:
        return f"8-bit pages {pages.shape} lie between 2 and 4 GiB"
    return ""


def _launch(*operands: jax.Array, plan: Plan, interpret: bool) -> tuple[jax.Array, jax.Array]:
    q_BTKGH = operands[3]
    B, T, K, G, _ = q_BTKGH.shape
    row_blocks = -(-T * G // plan.rows)
    whole = jax.ShapeDtypeStruct(q_BTKGH.shape, q_BTKGH.dtype), jax.ShapeDtypeStruct((B, T, K, G), jnp.float32)
    parts = tuple(jax.ShapeDtypeStruct((plan.splits, *x.shape), jnp.float32) for x in whole)
    out, lse = pl.pallas_call(
        partial(_attend_kernel, plan=plan),
        grid=(B * K, row_blocks, plan.splits),
        out_shape=whole if plan.splits == 1 else parts,
        compiler_params=pltriton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="tree_attention",
    )(*operands)
    if plan.splits == 1:
        return out, lse
    return pl.pallas_call(
        _merge_kernel,
        grid=(B * T, K * G),
        out_shape=whole,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="tree_attention_merge",
    )(out, lse)


def _attend_kernel(
    start_ref, length_ref, table_ref, q_ref, k_ref, v_ref, mask_ref, pages_k_ref, pages_v_ref, *rest, plan: Plan
):
    """One (request, kv head), one block of rows, one split. Refs are whole arrays."""
    *scale_refs, out_ref, lse_ref = rest
    _, T, K, G, H = q_ref.shape
    U, M, page_size = k_ref.shape[1], table_ref.shape[1], pages_k_ref.shape[2]
    row, kv = pl.program_id(0) // K, pl.program_id(0) % K
    split = pl.program_id(2)
    packed_R = pl.program_id(1) * plan.rows + jnp.arange(plan.rows)
    node_R, head_R = packed_R // G, packed_R % G
    node_R1, head_R1, real_R1 = node_R[:, None], head_R[:, None], (packed_R < T * G)[:, None]
    h_1H = jnp.arange(H)[None, :]  # written out: the interpreter takes no slices beside index arrays

    q = pltriton.load(q_ref.at[row, node_R1, kv, head_R1, h_1H], mask=real_R1, other=0)
    scale = H**-0.5 * LOG2E  # scores in powers of two: exp2 is one instruction

    def absorb(carry, k, v, seen, k_scale_S=None, v_scale_S=None):
        """One more block of keys into the running (highest score, sum of weights, weighted values)."""
        highest, total, acc = carry
        score = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        if k_scale_S is not None:
            score = score * k_scale_S[None, :]
        score = jnp.where(seen, score, -jnp.inf)
        new = jnp.maximum(highest, jnp.max(score, axis=1))
        base = jnp.where(new == -jnp.inf, 0.0, new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
        weight = jnp.exp2(score - base[:, None])
        decay = jnp.exp2(highest - base)
        total = total * decay + jnp.sum(weight, axis=1)
        if v_scale_S is not None:
            weight = weight * v_scale_S[None, :]
        gain = lax.dot_general(weight.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return new, total, acc * decay[:, None] + gain

    width = min(plan.keys, max(16, power_of_two(U)))
    mask_row = row if mask_ref.shape[0] > 1 else 0

    def seen_of_suffix(i):
        u_1S = (i * width + jnp.arange(width))[None, :]
        return pltriton.load(mask_ref.at[mask_row, node_R1, u_1S], mask=real_R1 & (u_1S < U), other=False)

    def suffix(i, carry):
        u_S1 = (i * width + jnp.arange(width))[:, None]
        k = pltriton.load(k_ref.at[row, u_S1, kv, h_1H], mask=u_S1 < U, other=0)
        v = pltriton.load(v_ref.at[row, u_S1, kv, h_1H], mask=u_S1 < U, other=0)
        return absorb(carry, k, v, seen_of_suffix(i))

    def prefix(i, carry):
        position_S = i * plan.keys + jnp.arange(plan.keys)
        seen_S = (position_S >= start) & (position_S < length)
        page_S = pltriton.load(table_ref.at[row, position_S // page_size], mask=seen_S, other=0)
        slot_S = position_S % page_size
        at = kv, page_S[:, None], slot_S[:, None], h_1H
        k, v = (_load_seen(pages, at, seen_S[:, None], q.dtype) for pages in (pages_k_ref, pages_v_ref))
        if not scale_refs:
            return absorb(carry, k, v, seen_S[None, :])
        k_scale_S, v_scale_S = (pltriton.load(x.at[kv, page_S, slot_S], mask=seen_S, other=0) for x in scale_refs)
        return absorb(carry, k, v, seen_S[None, :], k_scale_S, v_scale_S)

    start, length = start_ref[row], jnp.minimum(length_ref[row], M * page_size)
    first, last = start // plan.keys, (length + plan.keys - 1) // plan.keys
    share = (jnp.maximum(last - first, 0) + plan.splits - 1) // plan.splits
    low = first + split * share
    high = jnp.minimum(low + share, last)

    carry = (
        jnp.full((plan.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((plan.rows,), jnp.float32),
        jnp.zeros((plan.rows, H), jnp.float32),
    )
    suffix_blocks = jnp.int32(-(-U // width))
    if width < U:  # up to where these nodes see: half of a prompt's chunk is not read

        def last_seen(i, blocks):
            return jnp.where(jnp.max(seen_of_suffix(i).astype(jnp.int32)) > 0, i + 1, blocks)

        suffix_blocks = lax.fori_loop(0, suffix_blocks, last_seen, jnp.int32(0))
    carry = lax.fori_loop(0, jnp.where(split == 0, suffix_blocks, 0), suffix, carry)
    highest, total, acc = lax.fori_loop(low, high, prefix, carry)

    out = (acc / jnp.where(total == 0, 1.0, total)[:, None]).astype(out_ref.dtype)
    lse = (highest + jnp.log2(total)) / LOG2E  # -inf where nothing was seen
    lead = (split,) if plan.splits > 1 else ()
    pltriton.store(out_ref.at[*lead, row, node_R1, kv, head_R1, h_1H], out, mask=real_R1)
    pltriton.store(lse_ref.at[*lead, row, node_R, kv, head_R], lse, mask=packed_R < T * G)


def _load_seen(pages_ref, at, seen_S1, dtype):
    """Keys or values in ``dtype``. What is not seen is not read: it may be NaN, and 0 * NaN is NaN."""
    if pages_ref.dtype.itemsize > 1:
        return pltriton.load(pages_ref.at[at], mask=seen_S1, other=0).astype(dtype)
    pages = pltriton.load(pages_ref.at[at], mask=seen_S1)  # Triton has no 8-bit float constants to fill in
    pages = lax.bitcast_convert_type(pages, jnp.float8_e4m3fn)  # of bytes, as caches keep them, or of what it is
    return jnp.where(seen_S1, pages.astype(dtype), jnp.zeros((), dtype))


def _merge_kernel(part_ref, part_lse_ref, out_ref, lse_ref):
    """One query of one head: the splits' answers weighed by their sums."""
    T, G = part_ref.shape[2], part_ref.shape[4]
    row, node = pl.program_id(0) // T, pl.program_id(0) % T
    kv, head = pl.program_id(1) // G, pl.program_id(1) % G
    lse_S = part_lse_ref[:, row, node, kv, head]
    highest = jnp.max(lse_S)
    base = jnp.where(highest == -jnp.inf, 0.0, highest)
    weight_S = jnp.exp(lse_S - base)
    total = jnp.sum(weight_S)
    out_H = jnp.sum(weight_S[:, None] * part_ref[:, row, node, kv, head, :], axis=0)
    out_ref[row, node, kv, head, :] = (out_H / jnp.where(total == 0, 1.0, total)).astype(out_ref.dtype)
    lse_ref[row, node, kv, head] = base + jnp.log(total)
