"""What Llama 4 adds to the Llama target, and to Meta's head for it: routed experts beside a shared one, and iRoPE.

iRoPE: most blocks rotate queries and keys and attend within chunks of the context (position p sees its own chunk of
``attention_chunk`` positions); the others, every fourth, take no positions at all and attend to everything, their
queries sharpened as the context grows. All of it depends on positions alone, never on a node's place in a tree.

A forward whose T positions cross a border between chunks would need two prefixes per row. It never does: a draft tree
is cut at the border (``room_B``; the rule of arXiv:2508.08192) and prompt chunks divide attention chunks
(``check_chunk``). One that *begins* at a border may cross others: of the prefix it sees nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.eagle import EagleHead
from jeagle.layers import Block, Rope, rope_angles, rotate
from jeagle.llama import Llama, View
from jeagle.llama4_config import IRopeConfig, Llama4Config, TemperatureTuning
from jeagle.moe import Experts

__all__ = ["Llama4", "Llama4Block", "Llama4EagleHead", "chunk_view", "query_scale"]


class Llama4Block(Block):
    """A Llama block with or without rotary embedding, whose MLP is the shared expert where there are routed ones."""

    def __init__(
        self,
        config: IRopeConfig,
        index: int,
        *,
        experts: Experts | None = None,
        attn_norm: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, attn_norm=attn_norm, dtype=dtype, rngs=rngs)
        self.norm_eps = config.norm_eps if config.qk_norm and index not in config.nope_layers else None
        self.experts = experts

    def place(
        self, q_BTKGH: jax.Array, k_BTKH: jax.Array, where: Rope | jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """``where``: rotary angles, or without rotary embedding the scale of the queries [B, T], None for 1."""
        if isinstance(where, tuple):
            q_BTKGH, k_BTKH = rotate(q_BTKGH, where), rotate(k_BTKH, where)
            if self.norm_eps is not None:
                q_BTKGH, k_BTKH = (_l2_normed(x, self.norm_eps) for x in (q_BTKGH, k_BTKH))
        elif where is not None:
            q_BTKGH = (q_BTKGH * where[:, :, None, None, None]).astype(q_BTKGH.dtype)
        return q_BTKGH, k_BTKH

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        shared_BTD = super().mlp(x_BTD)
        return shared_BTD if self.experts is None else shared_BTD + self.experts(x_BTD)


class IRope:
    """What a target and a head of Llama 4 share: where blocks are and what they see (Llama's: ``FullRope``)."""

    config: Any

    def places(self, position_BT: jax.Array) -> list[Any]:
        rope = rope_angles(self.config, position_BT)
        scale = query_scale(self.config.temperature_tuning, position_BT)
        return [scale if i in self.config.nope_layers else rope for i in range(self.config.num_layers)]

    def views(self, full: View, position_BT: jax.Array, key_position_BU: jax.Array) -> list[View]:
        chunk = chunk_view(full, position_BT, key_position_BU, self.config.attention_chunk)
        return [full if i in self.config.nope_layers else chunk for i in range(self.config.num_layers)]

    def check_chunk(self, positions: int) -> None:
        chunk = self.config.attention_chunk
        if chunk is not None and chunk % positions and positions % chunk:
            raise ValueError(
                f"prompt chunks of {positions} positions cross the borders of attention_chunk {chunk}; choose a "
                "prefill_chunk that divides it"
            )


class Llama4EagleHead(IRope, EagleHead):
    """Meta's dense head with Llama 4's attention."""

    def make_block(self, index: int, *, input_width: int, attn_norm: bool, dtype: Any, rngs: nnx.Rngs) -> Block:
        return Llama4Block(self.config, index, attn_norm=attn_norm, dtype=dtype, rngs=rngs)


class Llama4(IRope, Llama):
    """The text model of Scout and Maverick."""

    config: Llama4Config

    def make_block(self, index: int, *, dtype: Any, rngs: nnx.Rngs) -> Block:
        config, experts, mlp_width = self.config, None, self.config.mlp_width
        if index in config.moe_layers:
            mlp_width = config.expert_mlp_width
            experts = Experts(
                config.width, mlp_width, config.num_experts, config.experts_per_token, dtype=dtype, rngs=rngs
            )
        config = dataclasses.replace(config, mlp_width=mlp_width)
        return Llama4Block(config, index, experts=experts, dtype=dtype, rngs=rngs)

    def room_B(self, length_B: jax.Array) -> jax.Array | None:
        """Positions from ``length`` to the end of its chunk, int32."""
        chunk = self.config.attention_chunk
        return None if chunk is None else chunk - length_B % chunk


def query_scale(tuning: TemperatureTuning | None, position_BT: jax.Array) -> jax.Array | None:
    """What queries without rotary embedding are scaled by [B, T], float32 (HF ``Llama4TextAttention``)."""
    if tuning is None:
        return None
    steps_BT = jnp.floor((position_BT.astype(jnp.float32) + 1.0) / tuning.floor_scale)
    return jnp.log1p(steps_BT) * tuning.attn_scale + 1.0


def chunk_view(full: View, position_BT: jax.Array, key_position_BU: jax.Array, chunk: int | None) -> View:
    """``full`` within chunks of ``chunk`` positions: the first query's chunk of the prefix, each query's of the suffix.

    Example: chunks of 4, a prefix of 6 and new positions 6, 7, 8: 6 and 7 see cached 4 and 5 and what the mask gives
    them; 8 sees itself alone of the suffix, but wrongly 4 and 5 of the prefix, so it must not be used.
    """
    if chunk is None:
        return full
    same_BTU = position_BT[:, :, None] // chunk == key_position_BU[:, None, :] // chunk
    start_B = jnp.maximum(full.prefix.start_B, position_BT[:, 0] // chunk * chunk)
    return View(full.suffix_mask & same_BTU, dataclasses.replace(full.prefix, start_B=start_B))


def _l2_normed(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in float32: RMSNorm without weights, so the order of a head's numbers is free."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)
