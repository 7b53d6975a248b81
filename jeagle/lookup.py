"""Prompt lookup: drafts that a text makes of itself.

Text repeats itself: quotations of the prompt, names, code, and greedy answers of small models that go in circles. Where
the last tokens have stood side by side before, what followed them then is drafted again (Saxena's prompt lookup
decoding; suffix decoding, arXiv:2411.04975). It takes no weights and no forward, so where all rows have found something
the head need not draft either (``decode.round_step``). Verification asks the target as it does for any tree: the text
stays the target's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jeagle.sharding import rows_first, split
from jeagle.tree import Tree, TreePlan

__all__ = ["look_up", "propose"]

# Tokens that must have stood together before. With fewer the head's guess is the better one, above all in sampled text,
# where it knows the noise; chosen by eval_acceptance.py on scripts/data/smollm2-questions.jsonl. Where there is no
# head, one token will do, as the nodes are verified anyway.
LEAST_ALONE, LEAST, LEAST_SAMPLED = 1, 3, 5
MOST = 8  # and how many are compared, to prefer the place whose past is most alike


def propose(
    text_BS: jax.Array,
    length_B: jax.Array,
    remaining_B: jax.Array,
    asked_B: jax.Array,
    temperature_B: jax.Array,
    *,
    plan: TreePlan,
) -> tuple[Tree, jax.Array]:
    """A chain of ``plan.lookup`` tokens after the root, which stands at position ``length`` of each text.

    remaining_B: as for ``draft.propose``. asked_B: the rows that want one. Returns the tree and bool [B], which of them
    have repeated themselves; in other rows no node but the root is valid.
    """
    token_BK, alike_B = look_up(text_BS, length_B, plan.lookup)
    least_B = jnp.where(temperature_B > 0, LEAST_SAMPLED, LEAST) if plan.levels else LEAST_ALONE
    found_B = asked_B & (alike_B >= least_B)
    root_B1 = jnp.take_along_axis(text_BS, length_B[:, None], axis=1)
    depth_T = jnp.arange(plan.lookup + 1)
    valid_BT = (depth_T == 0) | (found_B[:, None] & (depth_T < remaining_B[:, None]))
    tree = Tree.chain(jnp.concatenate([root_B1, token_BK], axis=1), valid_BT)
    return tree.padded(plan.num_nodes), found_B


def look_up(text_BS: jax.Array, last_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """What followed the last tokens of each text when these were seen before: int32 [B, length], and how many they are,
    at most MOST; where 0, the guess means nothing.

    text_BS: int32, of which [0, last] is written. The place is taken whose past is like the text's for most tokens, of
    several the latest. A guess that would run over the text's end goes on with itself.

    Example: of "a b c d a b", with two tokens, "c d"; of "a b a b", with three, "a b a".
    """
    inputs = rows_first(text_BS), rows_first(last_B)
    return split(partial(_look_up, length=length), inputs, inputs)(text_BS, last_B)


def _look_up(text_BS: jax.Array, last_B: jax.Array, *, length: int) -> tuple[jax.Array, jax.Array]:
    """Of the rows of one device."""
    S = text_BS.shape[1]
    place_S = jnp.arange(S, dtype=jnp.int32)
    going_BS = (place_S >= 1) & (place_S <= last_B[:, None])
    alike_BS = jnp.zeros(text_BS.shape, jnp.int32)  # of the tokens before s how many are those at the text's end
    for back in range(min(MOST, S - 1)):
        own_B1 = jnp.take_along_axis(text_BS, jnp.maximum(last_B - back, 0)[:, None], axis=1)
        before_BS = jnp.pad(text_BS, ((0, 0), (back + 1, 0)))[:, :S]  # at s, the text at s - 1 - back
        going_BS &= (before_BS == own_B1) & (place_S > back)
        alike_BS += going_BS
    start_B = jnp.argmax(alike_BS * S + place_S, axis=1).astype(jnp.int32)  # of equals the latest
    period_B1 = jnp.maximum(last_B + 1 - start_B, 1)[:, None]
    place_BK = start_B[:, None] + jnp.arange(length, dtype=jnp.int32) % period_B1
    return jnp.take_along_axis(text_BS, place_BK, axis=1, mode="clip"), jnp.max(alike_BS, axis=1)
