"""Leaf modules of every model here: RMSNorm, rotary embedding, and the block that targets and EAGLE heads share.

Weights are stored fused and shard-safe: ``qkv [D, K, G+2, H]`` keeps each kv head beside its queries, so a mesh may
split K; ``gate_up [D, 2, F]`` may be split on F. Norms, rotary angles and softmax are float32 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.config import BlockConfig
from jeagle.few_rows import multiply_rows
from jeagle.sharding import Axes, across, constrain, split
from jeagle.weights import Matrix, make_matrix, product, vector_dtype

__all__ = [
    "STREAM",
    "Block",
    "LayerAttend",
    "Linear",
    "RMSNorm",
    "Rope",
    "lm_head",
    "rope_angles",
    "rope_frequencies",
    "rotate",
]

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q_BTKGH, k_BTKH, v_BTKH) -> out_BTKGH
LayerAttend = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]  # told first what is one layer's alone
Rope = tuple[jax.Array, jax.Array]  # cos_BTR, sin_BTR with R = H/2, float32


# Of the residual stream and all that is as wide. Said where it is made: else XLA's partitioner may split it like the
# weights that read it, and turn each all-reduce into a reduce-scatter and an all-gather, with norms between them.
STREAM: Axes = ("rows", None, "width")


def lm_head(hidden: jax.Array, weights: Matrix, size: int, *, tied: bool = False) -> jax.Array:
    """Logits float32 [..., V] of hidden [..., D]. weights: [D, V], or an embedding [V, D] that is ``tied``. Ids from
    ``size`` on are padding that made V divisible: -inf."""
    contract = partial(jnp.einsum, "...D,VD->...V" if tied else "...D,DV->...V")
    logits = multiply_rows(
        hidden, weights.kernel, lambda x: product(x, weights, contract, jnp.float32), inputs_first=not tied
    )
    if logits.shape[-1] == size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < size, logits, -jnp.inf)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones((width,), vector_dtype(dtype)), axes=("width",))
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
    turns = scaling.original_max_position / wavelength  # in a context of the original length
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns >= low).astype(np.float32)
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
    [*outputs]. ``axes`` names the kernel's axes."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: Axes,
        bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.kernel, self.kernel_scale = make_matrix(
            (*inputs, *outputs), contracted=tuple(range(len(inputs))), axes=axes, dtype=dtype, rngs=rngs
        )
        zeros = jnp.zeros(outputs, vector_dtype(dtype))
        self.bias = nnx.Param(zeros, axes=axes[len(inputs) :]) if bias else None
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        matrix, axes = Matrix.of(self.kernel, self.kernel_scale), self.kernel.get_metadata()["axes"]
        inputs, outputs = axes[: self.num_inputs], axes[self.num_inputs :]
        parts = next((part for part in map(across, filter(None, inputs)) if not part.whole), None)
        if matrix.scale is None or parts is None:
            y = self.multiply(x, matrix)
        else:
            # Scaled and rounded before shards are added up, as a bfloat16 model rounds: XLA would add float32 sums, of
            # twice the bytes, and could not join what a block adds up with what its experts add up.
            rows: Axes = ("rows", *(None,) * (x.ndim - self.num_inputs - 1))
            shard = split(
                lambda x, *matrix: parts.sum(self.multiply(x, Matrix(*matrix))),
                ((*rows, *inputs), axes, outputs),
                (*rows, *outputs),
            )
            y = shard(x, *matrix)
        return y if self.bias is None else y + self.bias[...]

    def multiply(self, x: jax.Array, matrix: Matrix) -> jax.Array:
        """Without the bias."""
        shape = matrix.kernel.shape
        # One contracted axis, made before the dot: given several, XLA:CPU copies the whole kernel on every call.
        width = math.prod(shape[: self.num_inputs])
        x = x.reshape(*x.shape[: x.ndim - self.num_inputs], width)
        matrix = matrix._replace(kernel=matrix.kernel.reshape(width, *shape[self.num_inputs :]))
        return multiply_rows(x, matrix.kernel, lambda x: product(x, matrix, partial(jnp.tensordot, axes=1)))


class Block(nnx.Module):
    """Pre-norm attention and gated MLP (Llama). ``input_width`` is 2D in EAGLE-3's first block, else D."""

    def __init__(
        self,
        config: BlockConfig,
        *,
        input_width: int | None = None,
        attn_norm: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        D, K, G, H, F = config.width, config.num_kv_heads, config.queries_per_kv, config.head_dim, config.mlp_width
        attn, mlp = (dict(bias=b, dtype=dtype, rngs=rngs) for b in (config.attention_bias, config.mlp_bias))
        self.attn_norm = RMSNorm(D, config.norm_eps, dtype=dtype) if attn_norm else None
        kv_heads, mlp_axis = config.kv_axis, config.axis_prefix + "mlp"
        self.qkv = Linear((input_width or D,), (K, G + 2, H), axes=("width", kv_heads, "queries", None), **attn)
        self.out = Linear((K, G, H), (D,), axes=(kv_heads, "queries", None, "width"), **attn)
        self.mlp_norm = RMSNorm(D, config.norm_eps, dtype=dtype)
        self.gate_up = Linear((D,), (2, F), axes=("width", None, mlp_axis), **mlp)
        self.down = Linear((F,), (D,), axes=(mlp_axis, "width"), **mlp)
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
        q_BTKGH, k_BTKH = self.place(qkv_BTKJH[..., :G, :], qkv_BTKJH[..., G, :], rope)
        v_BTKH = qkv_BTKJH[..., G + 1, :]
        x_BTD = constrain(x_BTD + self.out(attend(q_BTKGH, k_BTKH, v_BTKH)), STREAM)
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), STREAM), (k_BTKH, v_BTKH)

    def place(self, q_BTKGH: jax.Array, k_BTKH: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
        """Queries and keys that know their positions."""
        return rotate(q_BTKGH, rope), rotate(k_BTKH, rope)

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        gate_up_BTCF = self.gate_up(x_BTD)
        return self.down(jax.nn.silu(gate_up_BTCF[:, :, 0]) * gate_up_BTCF[:, :, 1])
