"""The Llama target (2, 3.x, SmolLM2: every dense ``LlamaForCausalLM``).

One forward serves prompt chunks, plain decode steps and draft trees: T new positions that see the committed cache
without a mask and each other through ``suffix_mask``. It returns the new keys and values and never writes the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle import vocabulary
from jeagle.attention import attend
from jeagle.cache import KVCache, LayerPages, NewKV, Prefix
from jeagle.config import LlamaConfig
from jeagle.layers import Block, LayerAttend, RMSNorm, lm_head, rope_angles
from jeagle.weights import Matrix, make_matrix

__all__ = ["Forward", "FullRope", "Llama", "View"]


class Forward(NamedTuple):
    """What one call of the target computes."""

    hidden_BTD: jax.Array  # final, normed hidden states
    feature_BTX: jax.Array  # what the EAGLE head reads: tapped residual streams side by side, or hidden_BTD
    new_kv: list[NewKV]  # per layer (k_BTKH, v_BTKH) of the T positions, for cache.commit


class View(NamedTuple):
    """What the queries of one block see."""

    suffix_mask: jax.Array  # bool [B or 1, T, U]
    prefix: Prefix


class FullRope:
    """Where the blocks of a target or a head are and what they see, block by block: everywhere rotary embedding and the
    whole context. Llama 4 does it its own way (``llama4.IRope``)."""

    config: Any

    def places(self, position_BT: jax.Array) -> list[Any]:
        """Per block, what its ``place`` takes: made once per forward and shared."""
        return [rope_angles(self.config, position_BT)] * self.config.num_layers

    def views(self, full: View, position_BT: jax.Array, key_position_BU: jax.Array) -> list[View]:
        """Per block, what its queries see of ``full``. key_position_BU: the positions of the suffix's keys."""
        return [full] * self.config.num_layers

    def check_chunk(self, positions: int) -> None:
        """Raises ValueError where prompts cannot be filled in chunks of so many positions."""


class Llama(FullRope, nnx.Module):
    """``dtype``: of all weights, or ``weights.Fp8``."""

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.width
        make = partial(make_matrix, dtype=dtype, rngs=rngs)
        self.embed, self.embed_scale = make((V, D), contracted=(1,), axes=("vocab", "width"))
        self.blocks = nnx.List([self.make_block(i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype=dtype)
        lm_head: tuple[nnx.Param | None, nnx.Param | None] = (None, None)
        if not config.tie_embeddings:
            lm_head = make((D, V), contracted=(0,), axes=("width", "vocab"))
        self.lm_head, self.lm_head_scale = lm_head

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of states, caches and all that is computed: that of the weights, but for FP8 ones."""
        return self.norm.scale.dtype

    @property
    def table(self) -> Matrix:
        """The embedding [V, D]."""
        return Matrix.of(self.embed, self.embed_scale)

    # With ``FullRope``'s, what a family of targets may do its own way (llama4.py).

    def make_block(self, index: int, *, dtype: Any, rngs: nnx.Rngs) -> Block:
        return Block(self.config, dtype=dtype, rngs=rngs)

    def room_B(self, length_B: jax.Array) -> jax.Array | None:
        """How many positions from ``length`` on one forward may hold, int32; None where there is no limit."""
        return None

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
        views = self.views(View(suffix_mask, prefix), position_BT, position_BT)
        seen = [(view, cache.layer(i)) for i, view in enumerate(views)]

        def attend_cached(seen: tuple[View, LayerPages], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            view, pages = seen
            return attend(q, k, v, view.suffix_mask, pages, view.prefix, implementation=attention)

        return self.run(token_BT, position_BT, attend_cached, seen, taps=taps)

    def run(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        attend: LayerAttend,
        seen: Sequence[Any] | None = None,
        *,
        taps: tuple[int, ...] = (),
    ) -> Forward:
        """The forward over whatever ``attend(seen[layer], q, k, v)`` lets a layer see: a cache in decoding, packed
        documents in training. ``seen``: a pytree per layer, or None."""
        if seen is None:
            seen = [None] * len(self.blocks)

        # Blocks that are alike are traced and lowered once for all, which takes a third of the time for SmolLM2's
        # thirty; XLA inlines the calls.
        @partial(jax.jit, static_argnums=0)
        def run_block(definition: nnx.GraphDef, weights: nnx.State, x_BTD: jax.Array, place: Any, seen: Any):
            return nnx.merge(definition, weights)(x_BTD, place, partial(attend, seen))

        x_BTD = vocabulary.embed(self.table, token_BT, "vocab", self.compute_dtype)
        places = self.places(position_BT)
        tapped: dict[int, jax.Array] = {}
        new_kv: list[NewKV] = []
        for i, block in enumerate(self.blocks):
            if i in taps:
                tapped[i] = x_BTD
            x_BTD, kv = run_block(*nnx.split(block), x_BTD, places[i], seen[i])
            new_kv.append(kv)
        tapped[len(self.blocks)] = x_BTD
        hidden_BTD = self.norm(x_BTD)
        feature_BTX = jnp.concatenate([tapped[i] for i in taps], axis=-1) if taps else hidden_BTD
        return Forward(hidden_BTD, feature_BTX, new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """LM head over [..., D], float32 [..., V]."""
        if self.lm_head is None:
            return lm_head(hidden, self.table, self.config.vocab_size, tied=True)
        return lm_head(hidden, Matrix.of(self.lm_head, self.lm_head_scale), self.config.vocab_size)
