"""Acceptance: the tokens the target chose at every node, walked down the tree. No loop, no draft probabilities.

A node is accepted iff it and all its ancestors are what the target chose at their parents. Siblings are distinct, so
this is multi-round speculative sampling with greedy drafting (arXiv:2508.08192; SpecInfer, arXiv:2305.09781), drawn in
one
step: whatever the draft proposes, the emitted tokens are the target's own choices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jeagle.tree import Tree

__all__ = ["accept"]


def accept(tree: Tree, chosen_BT: jax.Array, num_path: int) -> tuple[jax.Array, jax.Array]:
    """Returns (path_BP, num_accepted_B): node indices root first, and how many draft tokens were kept.

    path[:, :num_accepted + 1] is the accepted path; the tokens emitted are chosen[path[:, :num_accepted + 1]], the last
    of them the bonus token. Entries beyond are node 0.

    Example: root -> {1: "the", 2: "a"}, 1 -> {3: "cat"}; the target chooses "the" at 0, "cat" at 1 and "sat" at 3:
    path = [0, 1, 3], num_accepted = 2, emitted = the cat sat.
    """
    root = tree.depth_BT == 0
    parent_choice_BT = jnp.take_along_axis(chosen_BT, tree.parent_BT, axis=1)
    match_BT = root | ((tree.token_BT == parent_choice_BT) & tree.valid_BT)
    accepted_BT = jnp.all(match_BT[:, None, :] | ~tree.mask_BTT, axis=-1)
    depth_BT = jnp.where(accepted_BT, tree.depth_BT, -1)
    deepest_B = jnp.argmax(depth_BT, axis=1)
    num_accepted_B = jnp.max(depth_BT, axis=1)
    # The ancestors of the deepest accepted node, by depth: a chain even if a head proposes one token twice.
    chain_BT = jnp.take_along_axis(tree.mask_BTT, deepest_B[:, None, None], axis=1)[:, 0]
    at_depth_BPT = chain_BT[:, None, :] & (tree.depth_BT[:, None, :] == jnp.arange(num_path)[None, :, None])
    return jnp.argmax(at_depth_BPT, axis=-1).astype(jnp.int32), num_accepted_B.astype(jnp.int32)
