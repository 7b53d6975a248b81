"""Routed experts: each token through the few experts its router chose, and only their weights read.

A token's result depends on no other token of the call: no capacity, nothing dropped. Which experts run is data, so
this is the one place of the model whose work is not known when it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jeagle.sharding import Axes, across, split
from jeagle.weights import Matrix, make_matrix, product, vector_dtype

__all__ = ["IMPLEMENTATIONS", "Experts", "resolve", "route", "run_experts"]

BLOCK = 64  # most rows of one GEMM: enough to be bound by arithmetic, few enough that padding blocks waste little

GATE_UP: Axes = ("experts", "width", None, "expert_mlp")
DOWN: Axes = ("experts", "expert_mlp", "width")


class Experts(nnx.Module):
    """The router and the routed experts of one block: gated MLPs, all of one width.

    implementation: of IMPLEMENTATIONS, or "auto"; may be set later.
    """

    def __init__(
        self,
        width: int,
        mlp_width: int,
        num_experts: int,
        per_token: int,
        *,
        implementation: str = "auto",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(0.02)
        D, F, E = width, mlp_width, num_experts
        self.router = nnx.Param(normal(rngs.params(), (D, E), vector_dtype(dtype)), axes=("width", None))
        make = partial(make_matrix, contracted=(1,), dtype=dtype, rngs=rngs)
        self.gate_up, self.gate_up_scale = make((E, D, 2, F), axes=GATE_UP)
        self.down, self.down_scale = make((E, F, D), axes=DOWN)
        self.per_token = per_token
        self.implementation = implementation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The sum of what each token's experts say of it, [B, T, D] in x's dtype."""
        whole_experts, widths = across("experts"), across("expert_mlp")

        def of_shard(x_BTD, router, gate_up_ED2F, down_EFD, *scales) -> jax.Array:
            x_nD = x_BTD.reshape(-1, x_BTD.shape[-1])
            score_nk, expert_nk = route(x_nD, router, self.per_token)
            n, k = expert_nk.shape
            # The score scales what an expert reads, not what it says (HF Llama4TextMoe).
            scaled_nkD = x_nD[:, None] * score_nk[..., None].astype(x_nD.dtype)
            expert_m = expert_nk.reshape(n * k) - whole_experts.index() * len(gate_up_ED2F)
            operands = (scaled_nkD.reshape(n * k, -1), expert_m, gate_up_ED2F, down_EFD, *scales)
            compute = IMPLEMENTATIONS[resolve(self.implementation, gate_up=gate_up_ED2F)]
            y_mD = compute(*operands, all_here=whole_experts.whole)
            y_BTD = y_mD.reshape(n, k, -1).sum(axis=1).reshape(x_BTD.shape)
            return widths.sum(whole_experts.sum(y_BTD))

        # Each device takes its rows through the experts, or the parts of experts, that it holds.
        weights = [self.router, self.gate_up, self.down]
        rows = ("rows", None, None)
        axes = [("width", None), GATE_UP, DOWN]
        if self.gate_up_scale is not None and self.down_scale is not None:
            weights += [self.gate_up_scale, self.down_scale]
            axes += [(GATE_UP[0], *GATE_UP[2:]), (DOWN[0], DOWN[2])]
        return split(of_shard, (rows, *axes), rows)(x_BTD, *(w[...] for w in weights))


def route(x_nD: jax.Array, router_DE: jax.Array, per_token: int) -> tuple[jax.Array, jax.Array]:
    """Each token's ``per_token`` best experts: the sigmoid of their logits, float32, and their numbers, int32."""
    logit_nE = jnp.dot(x_nD, router_DE, preferred_element_type=jnp.float32)
    best_nk, expert_nk = lax.top_k(logit_nE, per_token)
    return jax.nn.sigmoid(best_nk), expert_nk


def run_experts(
    x_mD: jax.Array,
    expert_m: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
    gate_up_E2F: jax.Array | None = None,
    down_ED: jax.Array | None = None,
    *,
    all_here: bool = True,
) -> jax.Array:
    """Row i through the gated MLP of expert ``expert_m[i]``, [m, D] in x's dtype: a grouped GEMM, one block at a time.

    gate_up_E2F, down_ED: the scales of FP8 weights.
    all_here: no expert lies outside 0..E-1. Rows of one that does get zeros: another device has it.

    Rows are taken in the order of their experts, in blocks of one expert each and at most BLOCK rows. So a few tokens
    read each *chosen* expert once, and a prompt multiplies at most E * BLOCK rows more than it has.
    ``jax.lax.ragged_dot`` does neither, on CPUs or on GPUs: XLA expands it to a product with all E experts (16 of 25 MB
    each, on two CPU cores: 4 tokens 26 ms here and 305 ms there, 256 tokens 0.22 s and 0.79 s).

    Example: experts [2, 0, 2] and blocks of 3 rows: two blocks, expert 0 with row 1 and expert 2 with rows 0 and 2.
    """
    m, E = len(x_mD), len(gate_up_ED2F)
    weights = Matrix(gate_up_ED2F, gate_up_E2F), Matrix(down_EFD, down_ED)
    rows = min(m, BLOCK)
    if not all_here:
        expert_m = jnp.where((expert_m >= 0) & (expert_m < E), expert_m, E)  # sorted last, counted nowhere
    order_m = jnp.argsort(expert_m)
    count_E = jnp.zeros(E, jnp.int32).at[expert_m].add(1, mode="drop")
    end_E = jnp.cumsum(count_E)
    last_block_E = jnp.cumsum((count_E + rows - 1) // rows)  # of each expert, exclusive

    def one_block(index: jax.Array, out_mD: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last_block_E, index, side="right")
        before_end = last_block_E[expert] - index  # blocks from this one to the expert's last
        # The first block is the short one, so that the expert's last row is the last of its last block.
        place_r = end_E[expert] - before_end * rows + jnp.arange(rows, dtype=jnp.int32)
        own_r = place_r >= end_E[expert] - count_E[expert]
        source_r = order_m[jnp.maximum(place_r, 0)]
        own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, keepdims=False), weights)
        y_rD = gated_mlp(x_mD[source_r], *own)
        return out_mD.at[jnp.where(own_r, source_r, m)].set(y_rD, mode="drop")

    if m == 1 and all_here:  # one block, of the one row
        return gated_mlp(x_mD, *jax.tree.map(lambda x: x[expert_m[0]], weights))
    return lax.fori_loop(0, last_block_E[-1], one_block, jnp.zeros_like(x_mD))


def gated_mlp(x_rD: jax.Array, gate_up_D2F: Matrix, down_FD: Matrix) -> jax.Array:
    D, _, F = gate_up_D2F.kernel.shape
    flat = gate_up_D2F.map(lambda kernel: kernel.reshape(D, 2 * F), lambda scale: scale.reshape(2 * F))
    gate_up_r2F = product(x_rD, flat).reshape(-1, 2, F)
    return product(jax.nn.silu(gate_up_r2F[:, 0]) * gate_up_r2F[:, 1], down_FD)


def _kernels(*operands: jax.Array, all_here: bool = True) -> jax.Array:
    """``run_experts`` as two launches. Imported at its first call, as a lowering may leave JAX."""
    del all_here  # they look for strangers in any case
    return import_module("pallas_kernels.grouped_mlp_pallas").grouped_mlp(*operands)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"xla": run_experts, "pallas": _kernels}


def resolve(name: str, platform: str | None = None, gate_up: jax.Array | jax.ShapeDtypeStruct | None = None) -> str:
    """The implementation that serves ``name`` on a platform (JAX's default one if None).

    "auto" is XLA on CPUs and TPUs, and on GPUs the kernels, unless they cannot read ``gate_up``: compiled for an H100,
    XLA's loop is driven by the host, twelve launches a block, and copies a block's weights before it multiplies by
    them. No GPU has timed either yet.
    """
    if name == "auto":
        if (platform or jax.default_backend()) != "gpu":
            return "xla"
        kernels = import_module("pallas_kernels.grouped_mlp_pallas")
        return "xla" if gate_up is not None and kernels.refusal(gate_up) else "pallas"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"experts implementation {name!r} is unknown; choose one of {['auto', *IMPLEMENTATIONS]}")
    return name
