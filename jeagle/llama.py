"""The Llama target (2, 3.x, SmolLM2: every dense ``LlamaForCausalLM``).

One forward serves prompt chunks, plain decode steps and draft trees: T new positions that see the committed cache
without a mask and each other through ``suffix_mask``. It returns the new keys and values and never writes the cache.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.attention import attend
from jeagle.cache import KVCache, NewKV, Prefix
from jeagle.config import LlamaConfig
from jeagle.layers import Block, LayerAttend, RMSNorm, by_rows, rope_angles

__all__ = ["Forward", "Llama"]


class Forward(NamedTuple):
    """What one call of the target computes."""

    hidden_BTD: jax.Array  # final, normed hidden states
    feature_BTX: jax.Array  # what the EAGLE head reads: tapped residual streams side by side, or hidden_BTD
    new_kv: list[NewKV]  # per layer (k_BTKH, v_BTKH) of the T positions, for cache.commit


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        self.embed = nnx.Param(normal(rngs.params(), (config.vocab_size, config.width), dtype))
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else nnx.Param(normal(rngs.params(), (config.width, config.vocab_size), dtype))
        )

    def __call__(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        suffix_mask: jax.Array,
        cache: KVCache,
        prefix: Prefix,
        *,
        taps: tuple[int, ...] = (),
        attention: str = "auto",
    ) -> Forward:
        """Run T new positions.

        Args:
          token_BT: ids, int32. position_BT: absolute positions, int32.
          suffix_mask: bool [B or 1, T, T], True where query t may see new position u (itself included).
          cache, prefix: the committed keys and values and the part of them each row sees; only read.
          taps: blocks whose *input* residual stream is a feature for the EAGLE head; L taps the last block's output.
          attention: implementation name, see ``jeagle.attention``.
        """

        def attend_cached(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(q, k, v, suffix_mask, cache.layer(layer), prefix, implementation=attention)

        return self.run(token_BT, position_BT, attend_cached, taps=taps)

    def run(
        self, token_BT: jax.Array, position_BT: jax.Array, attend: LayerAttend, *, taps: tuple[int, ...] = ()
    ) -> Forward:
        """The forward over whatever ``attend`` lets each layer see: a cache in decoding, packed documents in
        training."""
        x_BTD = self.embed[...][token_BT]
        rope = rope_angles(self.config, position_BT)
        tapped: dict[int, jax.Array] = {}
        new_kv: list[NewKV] = []
        for i, block in enumerate(self.blocks):
            if i in taps:
                tapped[i] = x_BTD
            x_BTD, kv = block(x_BTD, rope, partial(attend, i))
            new_kv.append(kv)
        tapped[len(self.blocks)] = x_BTD
        hidden_BTD = self.norm(x_BTD)
        feature_BTX = jnp.concatenate([tapped[i] for i in taps], axis=-1) if taps else hidden_BTD
        return Forward(hidden_BTD, feature_BTX, new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """LM head over [..., D], float32 [..., V]."""
        if self.lm_head is None:
            weights, subscripts = self.embed[...], "...D,VD->...V"
        else:
            weights, subscripts = self.lm_head[...], "...D,DV->...V"
        product = partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
        return by_rows(lambda x: product(x, weights), hidden, weights)
