"""``attend``: the one attention function, and the registry of what can compute it.

A named implementation never falls back silently; "auto" picks by platform. An implementation that cannot serve a shape
raises NotImplementedError naming the shape.

cuDNN is not among them. It would serve prompt chunks alone, and reads no pages: the suffix through it, the prefix and
the merge would be three launches for the kernels' one or two. scripts/gpu_suite.py times it beside them on such chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import jax

from jeagle.cache import LayerPages, Prefix
from jeagle.fp8 import rounded
from jeagle.sharding import split

__all__ = ["IMPLEMENTATIONS", "attend", "resolve"]

Implementation = Callable[..., tuple[jax.Array, jax.Array]]


def _from(module: str) -> Implementation:
    """Imported at its first call: Mosaic alone is a third of a second, and a lowering may leave JAX."""

    def compute(*args, **kwargs):
        return import_module(f"pallas_kernels.{module}").tree_attention(*args, **kwargs)

    return compute


# name -> f(q_BTKGH, k_BUKH, v_BUKH, suffix_mask, pages_k, pages_v, page_table_BM, start_B, length_B, scales)
#           -> (out_BTKGH, lse_BTKG); tree_attention_xla.py says what each is.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": _from("tree_attention_xla"),
    "pallas": _from("tree_attention_pallas"),
    "mosaic": _from("tree_attention_mosaic"),
    "triton": _from("tree_attention_triton"),
}


def resolve(name: str, platform: str | None = None, pages: jax.Array | jax.ShapeDtypeStruct | None = None) -> str:
    """The implementation that serves ``name`` on a platform (JAX's default one if None).

    "auto" is XLA on CPUs and TPUs, and on GPUs the kernel that every common shape can use, or XLA where that kernel
    cannot read ``pages``. On an H100 (scripts/results/h100) it is the fastest at one new position a row, with cuDNN,
    which reads no pages; "mosaic" is faster from 32 nodes on, by 6% over 1,024 positions and 37% for 64 nodes over
    32,768.
    """
    if name == "auto":
        if (platform or jax.default_backend()) != "gpu":
            return "xla"
        kernel = import_module("pallas_kernels.tree_attention_pallas")
        return "xla" if pages is not None and kernel.refusal(pages) else "pallas"
    if name not in tuple(IMPLEMENTATIONS):
        raise ValueError(f"attention implementation {name!r} is unknown; choose one of {['auto', *IMPLEMENTATIONS]}")
    return name


def attend(
    q_BTKGH: jax.Array,
    k_BUKH: jax.Array,
    v_BUKH: jax.Array,
    suffix_mask: jax.Array,
    layer: LayerPages,
    prefix: Prefix,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of T new positions over a committed prefix (no mask) and a suffix of U >= T new positions (mask).

    Args:
      q_BTKGH: queries, rotated, not yet scaled. k_BUKH, v_BUKH: the suffix's keys and values.
      suffix_mask: bool [B or 1, T, U].
      layer: this layer's pages. Where they are FP8, the suffix is rounded to what they will hold of it, so what is read
        of a key does not depend on whether it has been committed. prefix: which cached positions each row sees.

    Returns [B, T, K, G, H] in q's dtype: softmax over prefix and suffix together, merged by log-sum-exp in float32
    (arXiv:2508.08192, tree attention). A query that sees nothing gets zeros.
    """
    resolve(implementation)  # an unknown name is said at once
    if layer.scales is not None:
        k_BUKH, v_BUKH = rounded(k_BUKH), rounded(v_BUKH)

    def of_shard(q, k, v, mask, prefix: Prefix, keys, values, scales) -> jax.Array:
        compute = IMPLEMENTATIONS[resolve(implementation, pages=keys)]
        return compute(q, k, v, mask, keys, values, prefix.page_table_BM, prefix.start_B, prefix.length_B, scales)[0]

    # Heads and rows know nothing of each other: each device attends with its own.
    new, pages = ("rows", None, layer.kv_axis, None), (layer.kv_axis, "pages", None, None)
    mask = (None if suffix_mask.shape[0] == 1 else "rows", None, None)
    scales = None if layer.scales is None else (pages[:3],) * 2
    inputs = ((*new, None), new, new, mask, prefix.axes(), pages, pages, scales)
    attended = split(of_shard, inputs, (*new, None))
    return attended(q_BTKGH, k_BUKH, v_BUKH, suffix_mask, prefix, layer.keys, layer.values, layer.scales)
