"""Draft trees: what the verifier sees (``Tree``) and the static plans that grow one (``TreePlan``).

The tree is data. Chains, static trees from path lists, EAGLE-2 dynamic trees and what a text repeats of itself all end
as the same ``Tree``, and verification cannot tell them apart; only the number of nodes is part of the compiled program.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

__all__ = [
    "LONGEST",
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
    "with_lookup",
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

    @classmethod
    def chain(cls, token_BT: jax.Array, valid_BT: jax.Array) -> Tree:
        """Every node the child of the one before it."""
        B, T = token_BT.shape
        node_T = jnp.arange(T, dtype=jnp.int32)
        parent_BT, depth_BT = (jnp.broadcast_to(x, (B, T)) for x in (jnp.maximum(node_T - 1, 0), node_T))
        mask_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
        return cls(token_BT, parent_BT, depth_BT, mask_BTT, valid_BT)

    def padded(self, num_nodes: int) -> Tree:
        """With children of the root that are not valid, up to ``num_nodes``."""
        more = num_nodes - self.token_BT.shape[1]
        if not more:
            return self
        B, T = self.token_BT.shape
        token_BT, parent_BT, valid_BT = (
            jnp.pad(x, ((0, 0), (0, more))) for x in (self.token_BT, self.parent_BT, self.valid_BT)
        )
        depth_BT = jnp.pad(self.depth_BT, ((0, 0), (0, more)), constant_values=1)
        new_uT = jnp.eye(T + more, dtype=bool)[T:].at[:, 0].set(True)
        mask_BTT = jnp.pad(self.mask_BTT, ((0, 0), (0, 0), (0, more)))
        mask_BTT = jnp.concatenate([mask_BTT, jnp.broadcast_to(new_uT, (B, *new_uT.shape))], axis=1)
        return Tree(token_BT, parent_BT, depth_BT, mask_BTT, valid_BT)


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


def _check_lookup(lookup: int) -> None:
    if not isinstance(lookup, int) or isinstance(lookup, bool) or lookup < 0:
        raise ValueError(f"lookup must be a number of tokens, 0 or more, got {lookup!r}")


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

    lookup: where a row's text repeats itself, it gets a chain of so many tokens instead (``lookup.py``); 0 for none.

    Example: ((0,), (1,), (0, 0)) is a root with two children, the first of which has one child.
    """

    paths: tuple[tuple[int, ...], ...]
    lookup: int = 0

    def __post_init__(self) -> None:
        _check_lookup(self.lookup)
        for path in map(tuple, self.paths):
            if not path or any(not isinstance(r, int) or r < 0 for r in path):
                raise ValueError(f"tree path {path!r} must be a non-empty list of child ranks, each 0 or more")
        paths = tuple(sorted({tuple(p) for p in self.paths}, key=lambda p: (len(p), p)))
        for path in paths:
            if len(path) > 1 and path[:-1] not in paths:
                raise ValueError(f"tree path {list(path)} has no parent: add the path {list(path[:-1])}")
        object.__setattr__(self, "paths", paths)

    @classmethod
    def chain(cls, length: int) -> StaticTree:
        return cls(tuple((0,) * d for d in range(1, length + 1)))

    @property
    def num_nodes(self) -> int:
        return max(len(self.paths), self.lookup) + 1

    @property
    def max_depth(self) -> int:
        return max(self.lookup, len(self.levels))

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """What the head grows, level by level; of a lookup alone, nothing."""
        parents = {path[:-1] for path in self.paths}
        frontier: list[tuple[int, ...]] = [()]
        levels = []
        for depth in range(1, max(map(len, self.paths), default=0) + 1):
            nodes = [p for p in self.paths if len(p) == depth]
            branch = 1 + max(p[-1] for p in nodes)
            kept = tuple(frontier.index(p[:-1]) * branch + p[-1] for p in nodes)
            expanded = tuple(i for i, p in enumerate(nodes) if p in parents)
            levels.append(Level(branch, kept, expanded))
            frontier = [nodes[i] for i in expanded]
        return tuple(levels)


MOST_CANDIDATES = 1 << 20  # children of all levels that a dynamic tree chooses from


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2 (arXiv:2406.16858): expand the ``top_k`` best nodes per level, then keep the ``num_nodes`` - 1 best of
    all. ``lookup``: as for static trees."""

    depth: int
    top_k: int
    total: int
    lookup: int = 0

    def __post_init__(self) -> None:
        _check_lookup(self.lookup)
        if self.depth < 1 or self.top_k < 1 or self.total < 2:
            raise ValueError(f"a dynamic tree needs depth >= 1, top_k >= 1 and total >= 2 nodes, got {self}")
        if min(self.depth, self.total) * self.top_k**2 > MOST_CANDIDATES:
            raise ValueError(f"a dynamic tree may look at {MOST_CANDIDATES} candidates at most, got {self}")

    @property
    def num_nodes(self) -> int:
        return max(min(self.total, 1 + sum(len(level.kept) for level in self.levels)), self.lookup + 1)

    @property
    def max_depth(self) -> int:
        return max(self.lookup, len(self.levels))

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        sizes = [1] + [self.top_k] * (min(self.depth, self.total - 1) - 1)
        return tuple(Level(self.top_k, tuple(range(size * self.top_k)), self.top_k) for size in sizes)


TreePlan = StaticTree | DynamicTree

OFF = StaticTree(())  # plain decoding: a tree of the root alone


def with_lookup[P: StaticTree | DynamicTree](plan: P, length: int | None = None) -> P:
    """The plan with chains of ``length`` looked-up tokens; None: as many as its nodes can hold, LONGEST at most."""
    room = dataclasses.replace(plan, lookup=0).num_nodes - 1
    return dataclasses.replace(plan, lookup=min(room, LONGEST) if length is None else length)


MOST = 1024  # of what a tree's name counts: no verification pays for so many nodes
LONGEST = 8  # each token more is a position more in every extend of a head, and few are kept beyond

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
    # EAGLE-2's released defaults: 60 nodes, 10 expanded per level; its depth of 7 counts the levels after the first.
    "dynamic": DynamicTree(depth=8, top_k=10, total=60),
}


def parse_tree(tree: str | TreePlan | Sequence[Sequence[int]]) -> TreePlan:
    """A plan from a name ("off", "chain-3", "eagle-26", "dynamic", "dynamic-DEPTH-TOPK-TOTAL", "lookup-4"), paths (a
    list, or one written as JSON), or a plan. "+lookup" or "+lookup-K" after it: ``with_lookup``."""
    if isinstance(tree, TreePlan):
        return tree
    if not isinstance(tree, str):
        if not isinstance(tree, (list, tuple)) or not all(isinstance(path, (list, tuple)) for path in tree):
            raise ValueError(f"a tree is a name or a list of paths such as [[0], [1], [0, 0]], got {tree!r}")
        return StaticTree(tuple(tuple(path) for path in tree))
    if any(int(number) > MOST for number in re.findall(r"(?<=-)\d+", tree)):
        raise ValueError(f"tree {tree!r} is too large; its numbers may go up to {MOST}")
    if match := re.fullmatch(r"(?:(.+)\+)?lookup(?:-(\d+))?", tree):
        plan, length = parse_tree(match[1] or "off"), match[2]
        if match[1] is None and length is None:
            raise ValueError("'lookup' needs a number of tokens: 'lookup-4'")
        return with_lookup(plan, None if length is None else int(length))
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
        f"tree {tree!r} is unknown; use 'auto', 'chain-K', 'dynamic-DEPTH-TOPK-TOTAL', 'lookup-K', a list of paths, or "
        f"one of {sorted(NAMED_TREES)}, with '+lookup' or without"
    )


def tree_name(plan: TreePlan) -> str:
    """The shortest text that ``parse_tree`` reads as this plan."""
    if plan.lookup:
        grown = dataclasses.replace(plan, lookup=0)
        if grown == OFF:
            return f"lookup-{plan.lookup}"
        length = "" if plan == with_lookup(grown) else f"-{plan.lookup}"
        return f"{tree_name(grown)}+lookup{length}"
    for name, named in NAMED_TREES.items():
        if plan == named:
            return name
    if isinstance(plan, DynamicTree):
        return f"dynamic-{plan.depth}-{plan.top_k}-{plan.total}"
    if plan == StaticTree.chain(plan.max_depth):
        return f"chain-{plan.max_depth}"
    return json.dumps(plan.paths, separators=(",", ":"))
