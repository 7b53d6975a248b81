"""The EAGLE head: EAGLE-1/2, HASS and Meta's multi-layer dense head (``concat``), EAGLE-3 and 3.1 (``attention``).

Position i of the head pairs the target's feature at i with the token at i+1 and predicts the token at i+2: the
"first-token shift" of arXiv:2401.15077. Whoever calls does the pairing; this module sees aligned arrays.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle import vocabulary
from jeagle.attention import attend
from jeagle.cache import KVCache, NewKV, Prefix
from jeagle.config import EagleConfig
from jeagle.layers import STREAM, Block, LayerAttend, Linear, RMSNorm, lm_head
from jeagle.llama import FullRope, Llama, View
from jeagle.sharding import constrain
from jeagle.weights import Matrix, make_matrix

__all__ = ["EagleHead", "HeadForward", "TokenMap", "check_pair"]


class TokenMap(nnx.Variable):
    """Integer tables that belong to a checkpoint but are no weights: never cast, never trained."""


class HeadForward(NamedTuple):
    feature_BTD: jax.Array  # what the next drafting step takes as its feature
    hidden_BTD: jax.Array  # what the LM head reads
    new_kv: list[NewKV]  # per layer (k_BTKH, v_BTKH) of the T positions


class EagleHead(FullRope, nnx.Module):
    def __init__(self, config: EagleConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        D, eps = config.width, config.norm_eps
        concat = config.fusion == "concat"
        make = partial(make_matrix, dtype=dtype, rngs=rngs)

        def norm(width: int, wanted: bool) -> RMSNorm | None:
            return RMSNorm(width, eps, dtype=dtype) if wanted else None

        embed: tuple[nnx.Param | None, nnx.Param | None] = (None, None)
        if config.own_embedding:
            embed = make((config.vocab_size, D), contracted=(1,), axes=("draft_vocab", "width"))
        self.embed, self.embed_scale = embed
        fc_width = 2 * D if concat else config.feature_width
        self.fc = Linear(
            (fc_width,), (D,), axes=("draft_features", "width"), bias=config.fc_bias, dtype=dtype, rngs=rngs
        )
        each, joint = config.tap_norm == "each", config.tap_norm == "joint"
        self.tap_norms = (
            nnx.List([RMSNorm(config.target_width, eps, dtype=dtype) for _ in config.taps]) if each else None
        )
        self.tap_norm = norm(config.feature_width, joint)
        self.embed_norm = norm(D, not concat or config.input_norms)
        self.hidden_norm = norm(D, not concat or config.input_norms)
        self.blocks = nnx.List(
            [
                self.make_block(
                    i,
                    input_width=2 * D if i == 0 and not concat else D,
                    attn_norm=i > 0 or (concat and config.first_block_norm),
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(config.num_layers)
            ]
        )
        self.norm = norm(D, config.final_norm)
        lm_head: tuple[nnx.Param | None, nnx.Param | None] = (None, None)
        if config.own_lm_head:
            lm_head = make((D, config.draft_vocab_size), contracted=(0,), axes=("width", "draft_vocab"))
        self.lm_head, self.lm_head_scale = lm_head
        # Absolute target ids [W] (checkpoints store offsets; the converter adds them up).
        self.draft_to_target = (
            TokenMap(jnp.arange(config.draft_vocab_size, dtype=jnp.int32), axes=("draft_vocab",))
            if config.reduced_vocabulary
            else None
        )

    # With ``FullRope``'s, what a family of heads may do its own way (llama4.py).

    def make_block(self, index: int, *, input_width: int, attn_norm: bool, dtype: Any, rngs: nnx.Rngs) -> Block:
        return Block(self.config, input_width=input_width, attn_norm=attn_norm, dtype=dtype, rngs=rngs)

    def fuse(self, feature_BTX: jax.Array) -> jax.Array:
        """What the target hands over [B, T, X] to the head's feature [B, T, D]. EAGLE-1 takes it as it is."""
        if self.config.fusion == "concat":
            return feature_BTX
        if self.tap_norms is not None:
            taps = jnp.split(feature_BTX, len(self.tap_norms), axis=-1)
            feature_BTX = jnp.concatenate([n(t) for n, t in zip(self.tap_norms, taps, strict=True)], axis=-1)
        if self.tap_norm is not None:
            feature_BTX = self.tap_norm(feature_BTX)
        return self.fc(constrain(feature_BTX, STREAM))

    def __call__(
        self,
        token_BT: jax.Array,
        feature_BTD: jax.Array,
        position_BT: jax.Array,
        suffix_mask: jax.Array,
        cache: KVCache,
        prefix: Prefix,
        *,
        target: Llama,
        earlier: list[NewKV] | None = None,
        earlier_position_BU: jax.Array | None = None,
        attention: str = "auto",
    ) -> HeadForward:
        """Run T positions of the head.

        Args:
          token_BT: target ids of the tokens *after* each feature. feature_BTD: ``fuse``d or the head's own output.
          suffix_mask: bool [B or 1, T, U+T] over the U positions of ``earlier`` and then the T of this call.
          earlier: keys and values of uncommitted positions that came before (pending rows, upper tree levels), and
            earlier_position_BU which positions those are.
          target: lends its embedding where the head has none.
        """

        def attend_cached(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if earlier is not None:
                k, v = (jnp.concatenate(pair, axis=1) for pair in zip(earlier[layer], (k, v), strict=True))
            mask, seen = views[layer]
            return attend(q, k, v, mask, cache.layer(layer), seen, implementation=attention)

        key_position_BU = position_BT
        if earlier_position_BU is not None:
            key_position_BU = jnp.concatenate([earlier_position_BU, position_BT], axis=1)
        views = self.views(View(suffix_mask, prefix), position_BT, key_position_BU)
        return self.run(token_BT, feature_BTD, position_BT, attend_cached, target=target)

    def run(
        self,
        token_BT: jax.Array,
        feature_BTD: jax.Array,
        position_BT: jax.Array,
        attend: LayerAttend,
        *,
        target: Llama,
    ) -> HeadForward:
        """The forward over whatever ``attend(layer, q, k, v)`` lets a layer see: a cache in decoding, packed documents
        in training."""
        config = self.config
        table, axis = target.table, "vocab"
        if self.embed is not None:
            table, axis = Matrix.of(self.embed, self.embed_scale), "draft_vocab"
        e_BTD = vocabulary.embed(table, token_BT, axis, target.compute_dtype)
        attn_input = None
        if config.fusion == "concat":
            f_BTD = feature_BTD
            if self.embed_norm is not None and self.hidden_norm is not None:
                e_BTD, f_BTD = self.embed_norm(e_BTD), self.hidden_norm(f_BTD)
            x_BTD = self.fc(constrain(jnp.concatenate([e_BTD, f_BTD.astype(e_BTD.dtype)], axis=-1), STREAM))
        else:
            assert self.embed_norm is not None and self.hidden_norm is not None
            normed_BTD = self.hidden_norm(feature_BTD)
            x_BTD = normed_BTD if config.norm_before_residual else feature_BTD
            attn_input = jnp.concatenate([self.embed_norm(e_BTD), normed_BTD], axis=-1)

        places = self.places(position_BT)
        new_kv: list[NewKV] = []
        for i, block in enumerate(self.blocks):
            x_BTD, kv = block(x_BTD, places[i], partial(attend, i), attn_input)
            attn_input = None
            new_kv.append(kv)
        hidden_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        return HeadForward(hidden_BTD if config.norm_output else x_BTD, hidden_BTD, new_kv)

    def logits(self, hidden: jax.Array, target: Llama) -> jax.Array:
        """LM head over [..., D], float32 [..., W] in the draft vocabulary."""
        if self.lm_head is None:
            return target.logits(hidden)
        return lm_head(hidden, Matrix.of(self.lm_head, self.lm_head_scale), self.config.draft_vocab_size)

    @property
    def vocab_axis(self) -> str:
        """The logical axis of ``logits``' last axis."""
        return "vocab" if self.lm_head is None else "draft_vocab"


def check_pair(target: Llama, head: EagleHead) -> None:
    """Raises ValueError when the head was not made for this target."""
    t, h = target.config, head.config
    if h.target_width != t.width:
        raise ValueError(f"the draft head was made for a target of width {h.target_width}; this one has {t.width}")
    if h.vocab_size != t.vocab_size:
        raise ValueError(f"the draft head's vocabulary is {h.vocab_size}; the target's is {t.vocab_size}")
    if any(tap > t.num_layers for tap in h.taps) or h.target_layers not in (None, t.num_layers):
        raise ValueError(f"the draft head taps blocks {h.taps} of {h.target_layers}; the target has {t.num_layers}")
