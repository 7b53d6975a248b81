"""Leaf modules of every model here: RMSNorm, rotary embedding, and the block that targets and EAGLE heads share.

Weights are stored fused and shard-safe: ``qkv [D, K, G+2, H]`` keeps each kv head beside its queries, so a mesh may
split K; ``gate_up [D, 2, F]`` may be split on F. Norms, rotary angles and softmax are float32 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.config import BlockConfig

__all__ = ["Block", "LayerAttend", "Linear", "RMSNorm", "Rope", "by_rows", "rope_frequencies", "rotate"]

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q_BTKGH, k_BTKH, v_BTKH) -> out_BTKGH
LayerAttend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]  # the same for a layer of a model
Rope = tuple[jax.Array, jax.Array]  # cos_BTR, sin_BTR with R = H/2, float32


ROWS_APART = 4  # float32 rows that a CPU multiplies one by one ..
LARGE = 1 << 16  # .. with weights of at least so many numbers: programs take longer to compile, so it must be worth it


def by_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array, weights: jax.Array) -> jax.Array:
    """``product(x)``, x [..., n], for a product with ``weights`` that treats every row alike.

    On a CPU, 2 to ROWS_APART rows are multiplied one by one. XLA:CPU streams the weights through a matrix-vector
    product but repacks them for a matrix-matrix one, which costs more than reading them from the cache again for each
    row (scripts/bench_decode.py measures it: how much is won depends on the machine's caches).
    """
    rows = x.reshape(-1, x.shape[-1])
    if not 1 < len(rows) <= ROWS_APART or x.dtype != jnp.float32 or weights.size < LARGE:
        return product(x)

    def apart(x: jax.Array) -> jax.Array:
        each = [product(x.reshape(-1, x.shape[-1])[i : i + 1]) for i in range(len(rows))]
        return jnp.concatenate(each).reshape(*x.shape[:-1], *each[0].shape[1:])

    return jax.lax.platform_dependent(x, cpu=apart, default=product)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float, *, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # HF rounds to the storage dtype before scaling; doing the same keeps bf16 logits comparable.
        return normed.astype(x.dtype) * self.scale[...]


def rope_frequencies(config: BlockConfig) -> np.ndarray:
    """Rotary frequencies [H/2], float32, with ``rope_scaling`` applied.

    llama3 (HF ``_compute_llama3_parameters``): wavelengths under original/high stay, those over original/low are
    divided by ``factor``, and between them the two are blended by s = (original/wavelength - low) / (high - low).
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequency = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequency / scaling.factor + blend * frequency).astype(np.float32)


def rope_angles(config: BlockConfig, position_BT: jax.Array) -> Rope:
    """cos and sin, each [B, T, H/2] float32. Made once per forward and used by every layer."""
    angle_BTR = position_BT[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle_BTR), jnp.sin(angle_BTR)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate the two halves of the last axis (HF's half-split layout). x is [B, T, ..., H]."""
    cos, sin = (jnp.expand_dims(a, tuple(range(2, x.ndim - 1))) for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Linear(nnx.Module):
    """Contracts the trailing axes of x, shaped ``inputs``, with a kernel [*inputs, *outputs]; adds a bias
    [*outputs]."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (*inputs, *outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        # One contracted axis, made before the dot: given several, XLA:CPU copies the whole kernel on every call.
        width = math.prod(kernel.shape[: self.num_inputs])
        x = x.reshape(*x.shape[: x.ndim - self.num_inputs], width)
        kernel = kernel.reshape(width, *kernel.shape[self.num_inputs :])
        y = by_rows(lambda x: jnp.tensordot(x, kernel, axes=1), x, kernel)
        return y if self.bias is None else y + self.bias[...]


class Block(nnx.Module):
    """Pre-norm attention and gated MLP (Llama). ``input_width`` is 2D in EAGLE-3's first block, else D."""

    def __init__(
        self,
        config: BlockConfig,
        *,
        input_width: int | None = None,
        attn_norm: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        D, K, G, H, F = config.width, config.num_kv_heads, config.queries_per_kv, config.head_dim, config.mlp_width
        attn, mlp = (dict(bias=b, dtype=dtype, rngs=rngs) for b in (config.attention_bias, config.mlp_bias))
        self.attn_norm = RMSNorm(D, config.norm_eps, dtype=dtype) if attn_norm else None
        self.qkv = Linear((input_width or D,), (K, G + 2, H), **attn)
        self.out = Linear((K, G, H), (D,), **attn)
        self.mlp_norm = RMSNorm(D, config.norm_eps, dtype=dtype)
        self.gate_up = Linear((D,), (2, F), **mlp)
        self.down = Linear((F,), (D,), **mlp)
        self.queries_per_kv = G

    def __call__(
        self, x_BTD: jax.Array, rope: Rope, attend: Attend, attn_input: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the residual stream and this block's new (k, v), each [B, T, K, H], keys rotated.

        ``attn_input`` [B, T, input_width] replaces the normed residual stream as what attention reads (EAGLE-3).
        """
        if attn_input is None:
            attn_input = x_BTD if self.attn_norm is None else self.attn_norm(x_BTD)
        qkv_BTKJH = self.qkv(attn_input)
        G = self.queries_per_kv
        q_BTKGH = rotate(qkv_BTKJH[..., :G, :], rope)
        k_BTKH = rotate(qkv_BTKJH[..., G, :], rope)
        v_BTKH = qkv_BTKJH[..., G + 1, :]
        x_BTD = x_BTD + self.out(attend(q_BTKGH, k_BTKH, v_BTKH))
        gate_up_BTCF = self.gate_up(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + self.down(jax.nn.silu(gate_up_BTCF[:, :, 0]) * gate_up_BTCF[:, :, 1])
        return x_BTD, (k_BTKH, v_BTKH)
