"""Acceptance: the tokens the target chose at every node, walked down the tree. No loop, no draft probabilities.

A node is accepted iff it and all its ancestors are what the target chose at their parents. Siblings are distinct, so
this is multi-round speculative sampling with greedy drafting (arXiv:2508.08192; SpecInfer, arXiv:2305.09781), drawn in
one step: whatever the draft proposes, the emitted tokens are the target's own choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jeagle.tree import Tree
from pallas_kernels.noise import threefry

__all__ = ["accept", "check_profile", "constant_profile", "force"]


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


# Synthetic acceptance: for measuring shapes that nobody has trained a head for.


def force(
    tree: Tree, seed_B2: jax.Array, length_B: jax.Array, profile: tuple[float, ...], num_path: int
) -> tuple[jax.Array, jax.Array]:
    """What ``accept`` returns, whatever the target chose: first children down to a depth drawn from ``profile``.

    Depth d is kept with probability profile[d - 1] given that d - 1 was, depths beyond the profile with its last entry.
    Nodes that are not valid are never kept, so limits hold. Everything else of a round runs as it does: only speed can
    be learnt from the text.

    Example: root -> {1, 2}, 1 -> {3} and a draw of depth 2: path = [0, 1, 3], num_accepted = 2.
    """
    B, T = tree.token_BT.shape
    here_B, kept_B = jnp.zeros(B, jnp.int32), jnp.ones(B, bool)
    path, num_accepted_B = [here_B], jnp.zeros(B, jnp.int32)
    node_T = jnp.arange(T)
    for depth in range(1, num_path):
        # The noise of choices is keyed by (seed, position, token): with the top bit set no token is meant.
        counter_B = jnp.full(B, (1 << 31) + depth, jnp.uint32)
        bits_B = threefry(seed_B2[:, 0], seed_B2[:, 1], length_B, counter_B)
        lucky_B = bits_B.astype(jnp.float32) * 2.0**-32 < profile[min(depth, len(profile)) - 1]
        child_BT = (tree.parent_BT == here_B[:, None]) & (node_T > 0) & tree.valid_BT
        kept_B = kept_B & lucky_B & jnp.any(child_BT, axis=1)
        here_B = jnp.where(kept_B, jnp.argmax(child_BT, axis=1).astype(jnp.int32), here_B)
        path.append(jnp.where(kept_B, here_B, 0))
        num_accepted_B = num_accepted_B + kept_B
    return jnp.stack(path, axis=1), num_accepted_B


def check_profile(profile: Sequence[float]) -> tuple[float, ...]:
    """The profile as a program's key holds it. Raises ValueError with one sentence."""
    numbers = not isinstance(profile, str) and isinstance(profile, Sequence) and len(profile) > 0
    if not numbers or not all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in profile):
        raise ValueError(f"synthetic_acceptance must be a list of probabilities, one per draft depth, got {profile!r}")
    return tuple(float(p) for p in profile)


def constant_profile(tokens_per_call: float, depth: int = 3) -> tuple[float, ...]:
    """The same p at every depth, such that a chain of ``depth`` emits so many tokens per call: 1 + p + .. + p^depth.

    Example: 2.8 tokens per call of a chain of 3 is p = 0.765.
    """
    if not 1 <= tokens_per_call <= depth + 1:
        raise ValueError(f"a chain of {depth} emits 1 to {depth + 1} tokens per call, not {tokens_per_call}")
    low, high = 0.0, 1.0
    for _ in range(60):  # halving: every bit of a float
        p = (low + high) / 2
        low, high = (p, high) if sum(p**d for d in range(depth + 1)) < tokens_per_call else (low, p)
    return (high,) * depth
