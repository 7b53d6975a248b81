"""Tree attention in plain XLA: the reference every kernel is tested against, and what CPUs run.

Two passes merged by log-sum-exp (arXiv:2508.08192; the prefix/suffix split of xformers' ``tree_attention``): the prefix
pass walks the paged cache in blocks with an online softmax (FlashAttention-2, Algorithm 1, arXiv:2307.08691) and needs
no mask but each row's length; the suffix pass is one small masked softmax over the new positions.

Traffic per call: the visible part of the cache once (plus the gathered copy of one block, which stays in a CPU's
cache), never the whole capacity: the number of blocks walked follows the longest row. On a CPU many rows are taken in
groups, each as far as its own longest row, so that a group's block stays in the cache too.

A CPU has a second way. XLA:CPU can only multiply with whole arrays, so every block is copied; but where all pages lie
in the rows' own order (``Decoder`` lays them so), the array itself is [K, B, S, H], and to multiply with all of it
takes a third of the time. That is done where at least half of the blocks would be walked. SmolLM2's 30 layers on two
AVX-512 cores, float32, one new position, ms (scripts/results/bench_attention_cpu_smollm2.json):

    rows, seen/positions   8, 246/256   8, 502/512   32, 246/256   32, 502/512   1, 4,086/4,096
    in blocks                     8.0         11.9          43.8          49.7             14.4
    whole                         3.2          4.3           6.8          13.9              5.6
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["tree_attention"]

BLOCK = 256  # cache positions per step of the prefix pass
GROUP = 8  # rows at a time, on a CPU
MOST_WHOLE = 32  # new positions a row: with more, products weigh more than copies

Partial = tuple[jax.Array, jax.Array]  # normalised out_KBTGH and log-sum-exp_KBTG, float32


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
    """Softmax attention over cache positions [start, length) and the masked suffix.

    Args:
      q_BTKGH: queries, rotated, not yet scaled. k_BUKH, v_BUKH: the suffix's keys and values.
      suffix_mask: bool [B or 1, T, U].
      pages_k, pages_v: [K, num_pages, page_size, H]. Slots outside [start, length) may hold anything, NaN included.
      scales: of 8-bit pages: float32 [K, num_pages, page_size] for keys and for values; a cached vector is what the
        page holds times its scale. 8-bit pages are float8_e4m3fn, or its bytes in uint8, which XLA:CPU can gather
        without converting all pages to float16 first.

    Returns (out_BTKGH in q's dtype, natural log-sum-exp of the scaled scores, lse_BTKG float32). A query that sees
    nothing gets zeros and -inf.
    """
    rows = (q_BTKGH, k_BUKH, v_BUKH, suffix_mask, page_table_BM, start_B, length_B)
    in_blocks = partial(_attend, partial(_walk, pages_k=pages_k, pages_v=pages_v, scales=scales))
    on_cpu = partial(_in_groups, in_blocks)
    num_pages, page_size = pages_k.shape[1:3]
    # Pages of other dtypes are made float32 before they are multiplied, which is a copy again.
    if pages_k.dtype == jnp.float32 and page_table_BM.size == num_pages and q_BTKGH.shape[1] <= MOST_WHOLE:
        whole = partial(_attend, partial(_whole, pages_k=pages_k, pages_v=pages_v))
        on_cpu = partial(_whole_or, in_blocks=on_cpu, whole=whole, page_size=page_size)
    return lax.platform_dependent(*rows, cpu=on_cpu, default=in_blocks)


def _in_groups(attend, q_BTKGH, k_BUKH, v_BUKH, suffix_mask, *of_rows) -> tuple[jax.Array, jax.Array]:
    """``attend``, GROUP rows after the other."""
    B = len(q_BTKGH)
    if B <= GROUP or B % GROUP:
        return attend(q_BTKGH, k_BUKH, v_BUKH, suffix_mask, *of_rows)
    one_mask = suffix_mask.shape[0] == 1

    def of_group(group: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, *rest = group
        return attend(q, k, v, *((suffix_mask, *rest) if one_mask else rest))

    grouped = (q_BTKGH, k_BUKH, v_BUKH, *(() if one_mask else (suffix_mask,)), *of_rows)
    of_groups = lax.map(of_group, tuple(x.reshape(-1, GROUP, *x.shape[1:]) for x in grouped))
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), of_groups)


def _whole_or(*rows: jax.Array, in_blocks, whole, page_size: int) -> tuple[jax.Array, jax.Array]:
    """``whole`` where all pages lie in order and half of the blocks at least would be walked, else ``in_blocks``.

    ``whole`` cannot leave out values that nobody sees, and 0 * NaN is NaN: slots that hold such are left to
    ``in_blocks``.
    """
    *_, page_table_BM, start_B, length_B = rows
    in_order = jnp.arange(page_table_BM.size, dtype=jnp.int32).reshape(page_table_BM.shape)
    _, block, num_blocks = _blocks(page_table_BM, page_size)
    first, last = _walked(start_B, length_B, block)
    pays = jnp.all(page_table_BM == in_order) & (2 * (last - first) >= num_blocks)

    def none(q_BTKGH, *_) -> tuple[jax.Array, jax.Array]:
        return jnp.full_like(q_BTKGH, jnp.nan), jnp.full(q_BTKGH.shape[:-1], jnp.nan, jnp.float32)

    found = lax.cond(pays, whole, none, *rows)
    failed = jnp.any(jnp.isnan(found[0]))
    return lax.cond(failed, lambda found, *rows: in_blocks(*rows), lambda found, *rows: found, found, *rows)


def _attend(
    prefix_pass, q_BTKGH, k_BUKH, v_BUKH, suffix_mask, page_table_BM, start_B, length_B
) -> tuple[jax.Array, jax.Array]:
    # Ties the gathers below to this layer's queries: nothing else orders them, and XLA would run every layer's at once,
    # which costs a second cache.
    q_BTKGH, page_table_BM = lax.optimization_barrier((q_BTKGH, page_table_BM))
    q_KBTGH = jnp.moveaxis(q_BTKGH, 2, 0) * jnp.asarray(q_BTKGH.shape[-1] ** -0.5, q_BTKGH.dtype)
    k_KBUH, v_KBUH = jnp.moveaxis(k_BUKH, 2, 0), jnp.moveaxis(v_BUKH, 2, 0)
    suffix = _softmax(q_KBTGH, k_KBUH, v_KBUH, suffix_mask[None, :, :, None, :])
    prefix = prefix_pass(q_KBTGH, page_table_BM, start_B, length_B)
    out_KBTGH, lse_KBTG = _merge(prefix, suffix)
    return jnp.moveaxis(out_KBTGH, 0, 2).astype(q_BTKGH.dtype), jnp.moveaxis(lse_KBTG, 0, 2)


def _whole(q_KBTGH, page_table_BM, start_B, length_B, *, pages_k, pages_v) -> Partial:
    """The prefix pass over pages that lie in order, in one step and without a copy."""
    K, H = len(pages_k), pages_k.shape[-1]
    k_KBSH, v_KBSH = (pages.reshape(K, len(page_table_BM), -1, H) for pages in (pages_k, pages_v))
    seen_BS = _seen(jnp.arange(k_KBSH.shape[2], dtype=jnp.int32), start_B, length_B)
    return _softmax(q_KBTGH, k_KBSH, v_KBSH, seen_BS[None, :, None, None, :])


def _seen(position_S, start_B, length_B) -> jax.Array:
    return (position_S >= start_B[:, None]) & (position_S < length_B[:, None])


def _blocks(page_table_BM, page_size: int) -> tuple[int, int, int]:
    """Pages per block, positions per block, and how many blocks there are."""
    M = page_table_BM.shape[1]
    pages = min(M, max(1, BLOCK // page_size))
    return pages, pages * page_size, -(-M // pages)


def _walked(start_B, length_B, block: int) -> tuple[jax.Array, jax.Array]:
    """The first block that any row sees, and the one after the last."""
    return jnp.min(start_B) // block, (jnp.max(length_B) + block - 1) // block


def _walk(q_KBTGH, page_table_BM, start_B, length_B, *, pages_k, pages_v, scales) -> Partial:
    """The prefix pass, block by block."""
    M = page_table_BM.shape[1]
    pages_per_block, block, num_blocks = _blocks(page_table_BM, pages_k.shape[2])
    page_table_BM = jnp.pad(page_table_BM, ((0, 0), (0, num_blocks * pages_per_block - M)))

    def one_block(index: jax.Array | int) -> Partial:
        pages_BJ = lax.dynamic_slice_in_dim(page_table_BM, index * pages_per_block, pages_per_block, axis=1)
        position_S = index * block + jnp.arange(block, dtype=jnp.int32)
        seen_BS = _seen(position_S, start_B, length_B)

        def gather(pages):  # [K, num_pages, page_size, *] -> [K, B, block, *]
            K, num_pages, _, *rest = pages.shape
            # Rows of a flat [K * num_pages, page_size * H]: XLA:CPU copies whole pages, where a gather along axis 1
            # would also transpose them.
            row_KBJ = jnp.arange(K)[:, None, None] * num_pages + pages_BJ
            rows = jnp.take(pages.reshape(K * num_pages, -1), row_KBJ, axis=0, mode="clip")
            if pages.dtype == jnp.uint8:
                rows = lax.bitcast_convert_type(rows, jnp.float8_e4m3fn)
            return rows.reshape(K, -1, block, *rest)

        k_KBSH, v_KBSH = gather(pages_k), gather(pages_v)
        if scales is not None:
            k_KBSH, v_KBSH = (
                (x.astype(jnp.float32) * gather(scale)[..., None]).astype(q_KBTGH.dtype)
                for x, scale in zip((k_KBSH, v_KBSH), scales, strict=True)
            )
        v_KBSH = jnp.where(seen_BS[None, :, :, None], v_KBSH, 0)  # 0 * NaN would be NaN
        return _softmax(q_KBTGH, k_KBSH, v_KBSH, seen_BS[None, :, None, None, :])

    if num_blocks == 1:
        return one_block(0)
    first, last = _walked(start_B, length_B, block)
    empty = (jnp.zeros(q_KBTGH.shape, jnp.float32), jnp.full(q_KBTGH.shape[:-1], -jnp.inf, jnp.float32))
    return lax.fori_loop(first, last, lambda i, carry: _merge(carry, one_block(i)), empty)


def _softmax(q_KBTGH, k_KBSH, v_KBSH, seen) -> Partial:
    """Softmax attention over one set of keys; ``seen`` broadcasts against [K, B, T, G, S]."""
    wide = dict(preferred_element_type=jnp.float32)
    if q_KBTGH.shape[1] * q_KBTGH.shape[2] == 1:
        # One new position: XLA:CPU repacks the second factor, so keys come first: two thirds of the time if many.
        score_KBTGS = jnp.moveaxis(jnp.einsum("KBSH,KBTGH->KBSTG", k_KBSH, q_KBTGH, **wide), 2, -1)
    else:
        score_KBTGS = jnp.einsum("KBTGH,KBSH->KBTGS", q_KBTGH, k_KBSH, **wide)
    score_KBTGS = jnp.where(seen, score_KBTGS, -jnp.inf)
    highest = jnp.max(score_KBTGS, axis=-1, keepdims=True)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)  # a query that sees nothing: exp(-inf - 0) = 0, not NaN
    weight_KBTGS = jnp.exp(score_KBTGS - highest)
    total = jnp.sum(weight_KBTGS, axis=-1, keepdims=True)
    out_KBTGH = jnp.einsum("KBTGS,KBSH->KBTGH", weight_KBTGS.astype(v_KBSH.dtype), v_KBSH, **wide)
    return out_KBTGH / jnp.where(total == 0, 1.0, total), (highest + jnp.log(total))[..., 0]


def _merge(a: Partial, b: Partial) -> Partial:
    """Combine attention over two disjoint key sets from their outputs and log-sum-exps."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    highest = jnp.maximum(lse_a, lse_b)
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)
    weight_a, weight_b = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    total = weight_a + weight_b
    share = 1.0 / jnp.where(total == 0, 1.0, total)
    out = out_a * (weight_a * share)[..., None] + out_b * (weight_b * share)[..., None]
    return out, shift + jnp.log(total)
