"""Draft trees: what the verifier sees (``Tree``) and the static plans that grow one (``TreePlan``).

The tree is data. Chains, static trees from path lists and EAGLE-2 dynamic trees all end as the same ``Tree``, and
verification cannot tell them apart; only the number of nodes is part of the compiled program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

__all__ = [
    "NAMED_TREES",
    "OFF",
    "DynamicTree",
    "Level",
    "StaticTree",
    "Tree",
    "TreePlan",
    "ancestor_mask",
    "parse_tree",
    "tree_name",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """T = num_nodes nodes per row; node 0 is the root, the last emitted token. Parents precede children."""

    token_BT: jax.Array  # int32, target ids
    parent_BT: jax.Array  # int32, node index; the root is its own parent
    depth_BT: jax.Array  # int32, 0 for the root
    mask_BTT: jax.Array  # bool, [b, t, u]: u is t or an ancestor of t
    valid_BT: jax.Array  # bool: may be accepted; False where the head had nothing finite to say or the request ends

    @classmethod
    def root_only(cls, root_B: jax.Array) -> Tree:
        zeros = jnp.zeros_like(root_B)[:, None]
        yes = jnp.ones_like(zeros, dtype=bool)
        return cls(root_B[:, None], zeros, zeros, yes[:, None], yes)


def ancestor_mask(parent_BT: jax.Array, max_depth: int) -> jax.Array:
    """bool [B, T, T], True where u is t or one of its ancestors.

    Example: parent [0, 0, 0, 1] -> rows [1000], [1100], [1010], [1101].
    """
    B, T = parent_BT.shape
    own = jnp.broadcast_to(jnp.eye(T, dtype=bool), (B, T, T))
    mask = own
    for _ in range(max_depth):
        mask = own | jnp.take_along_axis(mask, parent_BT[:, :, None], axis=1)
    return mask


@dataclass(frozen=True)
class Level:
    """How one level of candidates comes out of the frontier's children.

    The frontier's F nodes propose ``branch`` children each, numbered slot * branch + rank. ``kept`` of them become
    candidates, in this order. Of those, ``frontier`` are expanded next: fixed indices, or the best so many by score.
    """

    branch: int
    kept: tuple[int, ...]
    frontier: tuple[int, ...] | int

    @property
    def frontier_size(self) -> int:
        return self.frontier if isinstance(self.frontier, int) else len(self.frontier)


@dataclass(frozen=True)
class StaticTree:
    """A tree of fixed shape: one path of child ranks per node, as in EAGLE's and Medusa's lists; the root is implicit.

    Example: ((0,), (1,), (0, 0)) is a root with two children, the first of which has one child.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        paths = tuple(sorted({tuple(p) for p in self.paths}, key=lambda p: (len(p), p)))
        for path in paths:
            if not path or any(not isinstance(r, int) or r < 0 for r in path):
                raise ValueError(f"tree path {path!r} must be a non-empty list of child ranks, each 0 or more")
            if len(path) > 1 and path[:-1] not in paths:
                raise ValueError(f"tree path {list(path)} has no parent: add the path {list(path[:-1])}")
        object.__setattr__(self, "paths", paths)

    @classmethod
    def chain(cls, length: int) -> StaticTree:
        return cls(tuple((0,) * d for d in range(1, length + 1)))

    @property
    def num_nodes(self) -> int:
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        return max((len(p) for p in self.paths), default=0)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        parents = {path[:-1] for path in self.paths}
        frontier: list[tuple[int, ...]] = [()]
        levels = []
        for depth in range(1, self.max_depth + 1):
            nodes = [p for p in self.paths if len(p) == depth]
            branch = 1 + max(p[-1] for p in nodes)
            kept = tuple(frontier.index(p[:-1]) * branch + p[-1] for p in nodes)
            expanded = tuple(i for i, p in enumerate(nodes) if p in parents)
            levels.append(Level(branch, kept, expanded))
            frontier = [nodes[i] for i in expanded]
        return tuple(levels)


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2 (arXiv:2406.16858): expand the ``top_k`` best nodes per level, then keep the ``num_nodes`` - 1 best of
    all."""

    depth: int
    top_k: int
    total: int

    def __post_init__(self) -> None:
        if self.depth < 1 or self.top_k < 1 or self.total < 2:
            raise ValueError(f"a dynamic tree needs depth >= 1, top_k >= 1 and total >= 2 nodes, got {self}")

    @property
    def num_nodes(self) -> int:
        return min(self.total, 1 + sum(len(level.kept) for level in self.levels))

    @property
    def max_depth(self) -> int:
        return min(self.depth, self.total - 1)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        sizes = [1] + [self.top_k] * (self.max_depth - 1)
        return tuple(Level(self.top_k, tuple(range(size * self.top_k)), self.top_k) for size in sizes)


TreePlan = StaticTree | DynamicTree

OFF = StaticTree(())  # plain decoding: a tree of the root alone

NAMED_TREES: dict[str, TreePlan] = {
    "off": OFF,
    # EAGLE-1's static tree (SafeAILab/EAGLE choices.py, mc_sim_7b_63): 25 draft nodes and the root.
    "eagle-26": StaticTree(
        tuple(
            tuple(map(int, path))
            for path in "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 "
            "0000 0001 0002 00000 00001".split()
        )
    ),
    # Small and bushy, for machines where verifying is compute-bound.
    "bush-8": StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))),
    # EAGLE-2's released defaults: 60 nodes of up to 7 levels, 10 expanded per level.
    "dynamic": DynamicTree(depth=7, top_k=10, total=60),
}


def parse_tree(tree: str | TreePlan | Sequence[Sequence[int]]) -> TreePlan:
    """A plan from a name ("off", "chain-3", "eagle-26", "dynamic", "dynamic-DEPTH-TOPK-TOTAL"), paths (a list, or one
    written as JSON), or a plan."""
    if isinstance(tree, TreePlan):
        return tree
    if not isinstance(tree, str):
        if not isinstance(tree, (list, tuple)) or not all(isinstance(path, (list, tuple)) for path in tree):
            raise ValueError(f"a tree is a name or a list of paths such as [[0], [1], [0, 0]], got {tree!r}")
        return StaticTree(tuple(tuple(path) for path in tree))
    if tree in NAMED_TREES:
        return NAMED_TREES[tree]
    if tree.startswith("["):
        try:
            return parse_tree(json.loads(tree))
        except json.JSONDecodeError as error:
            raise ValueError(f"tree {tree!r} is not a list of paths: {error}") from None
    if match := re.fullmatch(r"chain-(\d+)", tree):
        return StaticTree.chain(int(match[1]))
    if match := re.fullmatch(r"dynamic-(\d+)-(\d+)-(\d+)", tree):
        return DynamicTree(*(int(n) for n in match.groups()))
    raise ValueError(
        f"tree {tree!r} is unknown; use 'auto', 'chain-K', 'dynamic-DEPTH-TOPK-TOTAL', a list of paths, or one of "
        f"{sorted(NAMED_TREES)}"
    )


def tree_name(plan: TreePlan) -> str:
    """The shortest text that ``parse_tree`` reads as this plan."""
    for name, named in NAMED_TREES.items():
        if plan == named:
            return name
    if isinstance(plan, DynamicTree):
        return f"dynamic-{plan.depth}-{plan.top_k}-{plan.total}"
    if plan == StaticTree.chain(plan.max_depth):
        return f"chain-{plan.max_depth}"
    return json.dumps(plan.paths, separators=(",", ":"))
