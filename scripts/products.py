"""The matrix products of a training step, counted twice: from the shapes alone, and in the step's jaxpr."""

from __future__ import annotations

import math
from typing import NamedTuple

from jax.extend.core import Jaxpr, jaxprs_in_params

from jeagle.config import BlockConfig, EagleConfig, LlamaConfig
from jeagle.training.recipe import Recipe

__all__ = ["Products", "count_products", "products_by_hand"]


class Products(NamedTuple):
    """FLOPs of matrix products."""

    weights: int  # a weight is an operand, or the gradient of one the result
    attention: int  # between activations


def count_products(jaxpr: Jaxpr) -> Products:
    """All dot_generals, as often as they run.

    Those with batch axes are attention's, which keep rows and heads apart; weights are the same for all rows.
    """
    weights = attention = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
            flops = 2 * math.prod(out) * math.prod(left[i] for i in contracted)
            weights, attention = (weights, attention + flops) if batch else (weights + flops, attention)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            found = count_products(inner)
            if any(found) and eqn.primitive.name in ("while", "cond"):
                raise ValueError(f"how often the products in a {eqn.primitive.name} run is not known")
            weights, attention = weights + times * found.weights, attention + times * found.attention
    return Products(weights, attention)


def products_by_hand(target: LlamaConfig, head: EagleConfig, recipe: Recipe) -> dict[str, int]:
    """FLOPs of a step's matrix products from the shapes alone, by name; attention's names end in "attention"."""
    objective, run, T = recipe.objective, recipe.run, recipe.data.pack_length
    K, B = objective.depth, run.updates * run.accumulate * run.rows
    D, W = head.width, head.draft_vocab_size

    def per_position(config: BlockConfig) -> int:
        """Multiplications with the weights of a block."""
        attention = config.width * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
        return attention + 3 * config.width * config.mlp_width

    def attention(config: BlockConfig, keys: int) -> int:
        """Per layer, scores and weighted sum of T positions that see ``keys`` positions each."""
        return B * 2 * 2 * T * keys * config.num_heads * config.head_dim

    blocks = head.num_layers * per_position(head)
    if head.fusion == "attention":  # the first block reads twice the width; fc runs once, over the taps
        blocks += D * head.head_dim * (head.num_heads + 2 * head.num_kv_heads)
        fc = [head.feature_width * D]
        fc_input = [head.tap_norm != "none"]  # whether the gradient of its input is wanted
    else:
        fc = [2 * D * D] * K
        fc_input = [head.input_norms or head.own_embedding, *[True] * (K - 1)]
    fc_backward = sum(f * (1 + wanted) for f, wanted in zip(fc, fc_input, strict=True))
    fc_forward = sum(fc) * (1 + (objective.remat and head.fusion != "attention"))  # at every step, or before the first
    lm_head = sum(2 * B * (T - k - 1) * D * W for k in range(K))
    again = objective.top_k is None  # the target's probabilities of the draft vocabulary, made in every update
    unrolled = head.num_layers * sum(attention(head, T + k) for k in range(K))
    everywhere = run.echo * 2 * B * T
    return {
        "target blocks": 2 * B * T * target.num_layers * per_position(target),
        "target LM head": 2 * B * T * target.width * target.vocab_size,
        "target LM head, again": everywhere * again * target.width * W,
        "target attention": target.num_layers * attention(target, T),
        "head blocks, forward": everywhere * ((1 + objective.remat) * K * blocks + fc_forward),
        "head blocks, backward": everywhere * (2 * K * blocks + fc_backward),
        "head LM head, forward": run.echo * (1 + objective.remat) * lm_head,
        "head LM head, backward": run.echo * (1 + head.own_lm_head) * lm_head,
        "head attention": run.echo * (3 + objective.remat) * unrolled,
    }
