"""The best static trees, against every tree there is."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from jeagle.acceptance import expected_tokens
from jeagle.tree import OFF, StaticTree
from jeagle.tree_search import best_tree, best_trees, comb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import search_tree


def random_rates(rng: np.random.Generator, depths: int, branch: int) -> np.ndarray:
    """Ranks in any order: a second child may be likelier than the first."""
    rates = rng.dirichlet(np.ones(branch + 1), depths)[:, :branch]
    return np.where(rng.random(rates.shape) < 0.1, 0.0, rates)


def every_tree(num_nodes: int, max_depth: int, branch: int) -> list[StaticTree]:
    paths = [p for d in range(1, max_depth + 1) for p in itertools.product(range(branch), repeat=d)]
    trees = []
    for chosen in itertools.chain.from_iterable(itertools.combinations(paths, n) for n in range(num_nodes)):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            trees.append(StaticTree(chosen))
    return trees


def programme(rates: np.ndarray, num_nodes: int, max_depth: int) -> float:
    """Sequoia's: the most tokens of a subtree of n nodes at each depth, its nodes shared out among the ranks."""
    below = [0.0] + [1.0] * num_nodes  # [n]: of subtrees at the depth below
    for depth in reversed(range(min(max_depth, len(rates)))):
        shared = [0.0] * num_nodes  # [m]: of the ranks so far with m nodes
        for rate in rates[depth]:
            shared = [max(shared[m - n] + rate * below[n] for n in range(m + 1)) for m in range(num_nodes)]
        below = [0.0] + [1.0 + shared[n - 1] for n in range(1, num_nodes + 1)]
    return below[num_nodes]


@pytest.mark.parametrize("seed", range(6))
def test_against_every_tree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depths, branch = [(3, 2), (2, 3), (4, 1)][seed % 3]
    rates = random_rates(rng, depths, branch)
    for num_nodes, max_depth in itertools.product((1, 2, 4, 5), range(1, depths + 1)):
        best = best_tree(rates, num_nodes, max_depth)
        assert best.num_nodes <= num_nodes
        assert best.max_depth <= max_depth
        most = max(expected_tokens(tree, rates) for tree in every_tree(num_nodes, max_depth, branch))
        assert expected_tokens(best, rates) == pytest.approx(most)


def test_against_the_dynamic_programme() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rates, num_nodes, max_depth = random_rates(rng, 6, 4), int(rng.integers(1, 33)), int(rng.integers(1, 8))
        found = expected_tokens(best_tree(rates, num_nodes, max_depth), rates)
        assert found == pytest.approx(programme(rates, num_nodes, max_depth))


def test_shapes_that_are_known() -> None:
    steep = np.array([[0.9, 0.01]] * 4)
    assert best_tree(steep, 4, 4) == StaticTree.chain(3)
    flat = np.array([[0.3, 0.29, 0.28]] * 4)
    assert best_tree(flat, 4, 4) == StaticTree(((0,), (1,), (2,)))
    assert best_tree(steep, 1, 4) == OFF
    assert best_tree(np.zeros((3, 2)), 8, 3) == OFF  # nothing is ever accepted
    pair = StaticTree(((0,), (1,)))
    assert best_trees(steep, (2, 3), (1, 2)) == [OFF, StaticTree.chain(1), pair, StaticTree.chain(2)]
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        best_tree(np.array([[1.2]]), 2, 1)


def test_a_comb_has_every_rank_at_every_depth() -> None:
    assert comb(2, 2) == StaticTree(((0,), (1,), (0, 0), (0, 1)))


def test_spread_of_answers() -> None:
    assert search_tree.spread(np.array([1.5, 2.5])) == 0.5
    assert search_tree.spread(np.array([2.0, 2.0])) == search_tree.spread(np.ones(3)) == 0
