"""Tree attention as two Triton kernels, called through jax-triton: the extra ``triton``, imported when first used.

Algorithm: that of tree_attention_pallas.py, and its plan of programs: packed rows of T nodes x G query heads, an online
softmax (FlashAttention-2, arXiv:2307.08691, Algorithm 1) over a share of one request's pages, the suffix with its mask
in split 0, and a merge by log-sum-exp where there are several splits. What differs is who compiles: Triton itself, so
its own choice of wgmma, asynchronous copies and layouts, and no lowering that JAX may drop.

Traffic per call: the visible cache once per block of rows, 2 * length * K * H * itemsize bytes per request (a byte an
element, and 8 * length * K of scales, in 8-bit pages), q, k, v and out once, and 8 * S * T * G * K * H bytes per
request of float32 parts with S > 1 splits. Floor: that over the memory bandwidth, 10 us per request and layer for 8 kv
heads of 128 in bfloat16 at 8192 positions on an H100 (3.35 TB/s).
"""

from __future__ import annotations

from inspect import signature
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.plan import plan, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("attention 'triton' needs Triton and jax-triton: pip install 'jeagle[triton]'") from None

__all__ = ["Launch", "launches", "tree_attention"]

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


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
      NotImplementedError: no GPU, or a head width that is not a power of two of at least 16.
      ImportError: jax-triton is not installed.
    """
    arrays: Any = (start_B, length_B, page_table_BM, q_BTKGH, k_BUKH, v_BUKH, suffix_mask, pages_k, pages_v, scales)
    todo = launches(*arrays)
    abstract = jax.sharding.get_abstract_mesh().abstract_device  # of a GPU that is compiled for and not here
    if (abstract.platform if abstract else jax.default_backend()) not in ("gpu", "cuda"):
        raise NotImplementedError("attention 'triton' needs a GPU; 'pallas' and 'xla' run anywhere")
    try:
        from jax_triton import triton_call
    except ImportError as error:
        raise ImportError(f"attention 'triton' needs jax-triton: pip install 'jeagle[triton]' ({error})") from None
    out_type = "out_type" if "out_type" in signature(triton_call).parameters else "out_shape"  # before jax-triton 0.4

    arrays = (*arrays[:-1], *(scales or (start_B, start_B)))  # Triton has no absent pointers: these are not read
    for each in todo:
        arrays = triton_call(
            *arrays,
            kernel=each.kernel,
            grid=each.grid,
            num_warps=each.warps,
            num_stages=each.stages,
            **{out_type: each.out},
            **each.constants,
        )
    return tuple(arrays)


class Launch(NamedTuple):
    """One kernel: takes the arrays that the launch before it made, then those it makes, then ``constants``."""

    kernel: Any
    grid: tuple[int, ...]
    out: list[jax.ShapeDtypeStruct]
    constants: dict[str, int]
    warps: int
    stages: int


def launches(start_B, length_B, page_table_BM, q_BTKGH, k_BUKH, v_BUKH, suffix_mask, pages_k, pages_v, scales):
    """The one or two launches of a call on arrays of these shapes, in order."""
    B, T, K, G, H = q_BTKGH.shape
    if not 16 <= H <= 256 or power_of_two(H) != H:
        raise NotImplementedError(f"attention 'triton': head width {H} is not a power of two from 16 to 256")
    _, num_pages, page_size, _ = pages_k.shape
    U, M = k_BUKH.shape[1], page_table_BM.shape[1]
    p = plan(B=B, T=T, K=K, G=G, H=H, capacity=M * page_size, dtype=q_BTKGH.dtype)
    if q_BTKGH.dtype == jnp.float32:
        # Exact float32 products take no tensor cores, and at 32 keys a step more registers than 8 warps have.
        p = p._replace(keys=16)
    lead = (p.splits,) if p.splits > 1 else ()
    whole = [jax.ShapeDtypeStruct((B, T, K, G, H), q_BTKGH.dtype), jax.ShapeDtypeStruct((B, T, K, G), jnp.float32)]
    parts = [jax.ShapeDtypeStruct((*lead, *x.shape), jnp.float32) for x in whole]
    constants = dict(
        B=B, T=T, K=K, G=G, H=H, U=U, M=M, num_pages=num_pages, page_size=page_size, mask_rows=suffix_mask.shape[0],
        scaled=int(scales is not None), rows=p.rows, keys=p.keys, width=min(p.keys, max(16, power_of_two(U))),
        splits=p.splits,
    )  # fmt: skip
    grid = (B * K, -(-T * G // p.rows), p.splits)
    attend = Launch(tree_attention_attend, grid, parts if lead else whole, constants, p.warps, p.stages)
    if not lead:
        return [attend]
    num_queries = prod(whole[1].shape)
    constants = dict(num_queries=num_queries, H=H, splits=p.splits)
    return [attend, Launch(tree_attention_merge, (num_queries,), whole, constants, 4, 1)]


@triton.jit
def tree_attention_attend(
    start_ptr, length_ptr, table_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, pages_k_ptr, pages_v_ptr, scale_k_ptr, scale_v_ptr,
    out_ptr, lse_ptr,
    B: tl.constexpr, T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, U: tl.constexpr,
    M: tl.constexpr, num_pages: tl.constexpr, page_size: tl.constexpr, mask_rows: tl.constexpr, scaled: tl.constexpr,
    rows: tl.constexpr, keys: tl.constexpr, width: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """One (request, kv head), one block of rows, one split. Arrays lie densely, in the order of their names."""
    row, kv = tl.program_id(0) // K, tl.program_id(0) % K
    split = tl.program_id(2)
    packed_R = tl.program_id(1) * rows + tl.arange(0, rows)
    node_R, head_R = packed_R // G, packed_R % G
    real_R = packed_R < T * G
    query_R = ((row * T + node_R) * K + kv) * G + head_R
    h_1H = tl.arange(0, H)[None, :]
    q = tl.load(q_ptr + query_R[:, None].to(tl.int64) * H + h_1H, mask=real_R[:, None], other=0.0)

    highest = tl.full((rows,), NOTHING, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, H), tl.float32)

    if split == 0:
        mask_row = row if mask_rows > 1 else 0
        see_R1 = mask_ptr + (mask_row * T + node_R[:, None]) * U
        blocks = 1
        if width < U:  # up to where these nodes see: half of a prompt's chunk is not read
            blocks = 0
            for i in range((U + width - 1) // width):
                seen = load_mask(see_R1, real_R, i * width + tl.arange(0, width), U)
                blocks = tl.where(tl.max(seen.to(tl.int32)) > 0, i + 1, blocks)
        for i in range(blocks):
            u_S = i * width + tl.arange(0, width)
            at = ((row * U + u_S[:, None]) * K + kv).to(tl.int64) * H + h_1H
            k = tl.load(k_ptr + at, mask=u_S[:, None] < U, other=0.0)
            v = tl.load(v_ptr + at, mask=u_S[:, None] < U, other=0.0)
            seen = load_mask(see_R1, real_R, u_S, U)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * (H**-0.5 * LOG2E)
            highest, total, acc, weight = absorb(highest, total, acc, tl.where(seen, score, NOTHING))
            acc += tl.dot(weight.to(v.dtype), v, input_precision="ieee")

    start, length = tl.load(start_ptr + row), tl.minimum(tl.load(length_ptr + row), M * page_size)
    first, last = start // keys, (length + keys - 1) // keys
    share = (tl.maximum(last - first, 0) + splits - 1) // splits
    low = first + split * share
    for i in range(low, tl.minimum(low + share, last)):
        position_S = i * keys + tl.arange(0, keys)
        seen_S = (position_S >= start) & (position_S < length)
        page_S = tl.load(table_ptr + row * M + position_S // page_size, mask=seen_S, other=0)
        # Pages are counted in 32 bits, what lies in them in 64.
        slot_S = (kv * num_pages + page_S).to(tl.int64) * page_size + position_S % page_size
        k = load_seen(pages_k_ptr, slot_S[:, None] * H + h_1H, seen_S[:, None]).to(q.dtype)
        v = load_seen(pages_v_ptr, slot_S[:, None] * H + h_1H, seen_S[:, None]).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (H**-0.5 * LOG2E)
        if scaled:
            score *= tl.load(scale_k_ptr + slot_S, mask=seen_S, other=0.0)[None, :]
        highest, total, acc, weight = absorb(highest, total, acc, tl.where(seen_S[None, :], score, NOTHING))
        if scaled:
            weight *= tl.load(scale_v_ptr + slot_S, mask=seen_S, other=0.0)[None, :]
        acc += tl.dot(weight.to(v.dtype), v, input_precision="ieee")

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (highest + tl.log2(total)) / LOG2E  # -inf where nothing was seen
    at_R = query_R.to(tl.int64)
    if splits > 1:
        at_R += split.to(tl.int64) * (B * T * K * G)
    tl.store(out_ptr + at_R[:, None] * H + h_1H, out.to(out_ptr.dtype.element_ty), mask=real_R[:, None])
    tl.store(lse_ptr + at_R, lse, mask=real_R)


@triton.jit
def absorb(highest, total, acc, score):
    """One more block of scores, in powers of two (exp2 is one instruction): the new state, and the block's weights."""
    new = tl.maximum(highest, tl.max(score, axis=1))
    base = tl.where(new == NOTHING, 0.0, new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
    weight = tl.exp2(score - base[:, None])
    decay = tl.exp2(highest - base)
    return new, total * decay + tl.sum(weight, axis=1), acc * decay[:, None], weight


@triton.jit
def load_mask(see_R1, real_R, u_S, U: tl.constexpr):
    """Which of these suffix positions each row sees."""
    return tl.load(see_R1 + u_S[None, :], mask=real_R[:, None] & (u_S[None, :] < U), other=0) != 0


@triton.jit
def load_seen(pages_ptr, at, seen):
    """What is not seen is not read: it may be NaN, and 0 * NaN is NaN. Of 8-bit floats the bytes are read."""
    if pages_ptr.dtype.element_ty.primitive_bitwidth == 8:
        bytes_ptr = pages_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        return tl.load(bytes_ptr + at, mask=seen, other=0).to(tl.float8e4nv, bitcast=True)
    else:
        return tl.load(pages_ptr + at, mask=seen, other=0.0)


@triton.jit
def tree_attention_merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, num_queries: tl.constexpr, H: tl.constexpr, splits: tl.constexpr
):
    """One query of one head: the splits' answers weighed by their sums."""
    query = tl.program_id(0).to(tl.int64)
    query_S = tl.arange(0, splits).to(tl.int64) * num_queries + query
    h_H = tl.arange(0, H)
    lse_S = tl.load(part_lse_ptr + query_S)
    highest = tl.max(lse_S, axis=0)
    base = tl.where(highest == NOTHING, 0.0, highest)
    weight_S = tl.exp(lse_S - base)
    total = tl.sum(weight_S, axis=0)
    part_SH = tl.load(part_ptr + query_S[:, None] * H + h_H[None, :])
    out_H = tl.sum(weight_S[:, None] * part_SH, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + query * H + h_H, out_H.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + query, base + tl.log(total))
