"""The static trees that are worth their nodes, from how often the target takes a child of each depth and rank.

Sequoia (arXiv:2402.12374) finds them by dynamic programming over subtrees. Here a node's worth is the product of the
rates along its path. No rate exceeds 1, so no node is worth more than its parent: the n best nodes of all are a tree,
the best one of n, and taking them one by one finds what the programme finds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from jeagle.tree import OFF, StaticTree

__all__ = ["best_tree", "best_trees", "comb"]


def best_tree(rate_DC: np.ndarray, num_nodes: int, max_depth: int) -> StaticTree:
    """The tree with the most expected tokens of at most ``num_nodes`` nodes, the root among them, and ``max_depth``.

    rate_DC: probability of each child of rank c at depth d + 1 to be accepted once its parent is. Nodes that are never
    accepted are left out. Raises ValueError for rates outside 0..1.
    """
    if not ((rate_DC >= 0) & (rate_DC <= 1)).all():
        raise ValueError("acceptance rates must lie in 0..1")
    depths, branch = min(max_depth, rate_DC.shape[0]), rate_DC.shape[1]
    paths: list[tuple[int, ...]] = []
    # The best first; among equals the shallowest, then the lowest rank.
    waiting: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while waiting and len(paths) < num_nodes:
        worth, depth, path = heapq.heappop(waiting)
        paths.append(path)
        if depth < depths:
            children = ((worth * rate_DC[depth, rank], depth + 1, (*path, rank)) for rank in range(branch))
            for child in children:
                if child[0] < 0:
                    heapq.heappush(waiting, child)
    return StaticTree(tuple(paths[1:]))


def comb(depth: int, ranks: int) -> StaticTree:
    """``ranks`` children of the root, of its first child, of that one's first child, and so on: a tree that shows how
    often each rank is accepted at each depth."""
    return StaticTree(tuple((0,) * d + (rank,) for d in range(depth) for rank in range(ranks)))


def best_trees(rate_DC: np.ndarray, nodes: Iterable[int], depths: Iterable[int]) -> list[StaticTree]:
    """The best tree of every size and depth, each once, and no tree."""
    depths = tuple(depths)
    return list(dict.fromkeys([OFF, *(best_tree(rate_DC, n, depth) for n in nodes for depth in depths)]))
