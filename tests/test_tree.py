"""Tree plans and the arrays they become: templates, ancestor masks, and EAGLE-2's re-ranking against brute force."""

from __future__ import annotations

from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jeagle.draft import Candidates, select
from jeagle.tree import (
    NAMED_TREES,
    OFF,
    DynamicTree,
    Level,
    StaticTree,
    Tree,
    ancestor_mask,
    parse_tree,
    tree_name,
    with_lookup,
)

SEEDS = st.integers(0, 2**32 - 1)


# Plans


def test_paths_are_sorted_and_deduplicated():
    tree = StaticTree(((1,), (0, 0), (0,), (0, 0)))
    assert tree.paths == ((0,), (1,), (0, 0))
    assert (tree.num_nodes, tree.max_depth) == (4, 2)
    assert tree == StaticTree(((0,), (1,), (0, 0))) and hash(tree) == hash(StaticTree(((0,), (1,), (0, 0))))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (((),), "must be a non-empty list of child ranks"),
        (((-1,),), "each 0 or more"),
        (((0.5,),), "each 0 or more"),
        (((0,), ("1",)), "each 0 or more"),
        (((0,), (None,)), "each 0 or more"),
        (((0,), (0, [1])), "each 0 or more"),
        (((0,), (1, 0)), r"tree path \[1, 0\] has no parent: add the path \[1\]"),
        (((0,), (0, 0, 0)), r"add the path \[0, 0\]"),
    ],
)
def test_bad_paths_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        StaticTree(paths)


def test_numbers_have_bounds():
    for name in ("chain-1025", "lookup-99999999999", "chain-3+lookup-2000", "dynamic-2-3-5000"):
        with pytest.raises(ValueError, match="is too large; its numbers may go up to 1024"):
            parse_tree(name)
    with pytest.raises(ValueError, match="candidates at most"):
        parse_tree("dynamic-1024-1024-1024")
    assert parse_tree("dynamic-2-300-400").num_nodes == 400 and parse_tree("chain-1024").num_nodes == 1025


@pytest.mark.parametrize("numbers", [(0, 1, 2), (1, 0, 2), (1, 1, 1)])
def test_bad_dynamic_trees_are_refused(numbers):
    with pytest.raises(ValueError, match="needs depth >= 1, top_k >= 1 and total >= 2"):
        DynamicTree(*numbers)


def test_parse_tree():
    assert parse_tree("off") is OFF and OFF.num_nodes == 1 and OFF.max_depth == 0 and OFF.levels == ()
    assert parse_tree("chain-3") == StaticTree(((0,), (0, 0), (0, 0, 0))) == StaticTree.chain(3)
    assert parse_tree("chain-0") == OFF
    assert parse_tree("dynamic-5-4-24") == DynamicTree(depth=5, top_k=4, total=24)
    assert parse_tree([[0], [1], [0, 0]]) == StaticTree(((0,), (1,), (0, 0)))
    for name, plan in NAMED_TREES.items():
        assert parse_tree(name) is plan and parse_tree(plan) is plan


@pytest.mark.parametrize("name", ["", "chain", "chain--1", "chain-2x", "dynamic-1-2", "eagle", "Off"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"is unknown; use 'auto', 'chain-K'.*'bush-8', 'dynamic', 'eagle-26', 'off'"):
        parse_tree(name)


def test_names_are_read_as_what_they_name():
    plans = [*NAMED_TREES.values(), StaticTree.chain(4), DynamicTree(2, 3, 9), StaticTree(((0,), (2,), (0, 1)))]
    names = [tree_name(plan) for plan in plans]
    assert [parse_tree(name) for name in names] == plans
    assert names[-3:] == ["chain-4", "dynamic-2-3-9", "[[0],[2],[0,1]]"]
    looking = [with_lookup(plan, length) for plan in plans for length in (None, 1, 5)]
    assert [parse_tree(tree_name(plan)) for plan in looking] == looking
    names = [tree_name(plan) for plan in looking]
    assert names[:3] == ["off", "lookup-1", "lookup-5"] and names[-9:-6] == [
        "chain-4+lookup",
        "chain-4+lookup-1",
        "chain-4+lookup-5",
    ]
    with pytest.raises(ValueError, match="is not a list of paths"):
        parse_tree("[[0]")


def test_lookups_of_a_plan():
    """As many tokens as its nodes hold, 8 at most, or as asked for, which may make it larger."""
    assert parse_tree("chain-3+lookup") == StaticTree(StaticTree.chain(3).paths, lookup=3)
    assert parse_tree("eagle-26+lookup").lookup == 8
    more = parse_tree("chain-1+lookup-4")
    assert (more.num_nodes, more.max_depth, len(more.levels)) == (5, 4, 1)
    dynamic = parse_tree("dynamic-2-2-4+lookup-6")
    assert (dynamic.num_nodes, dynamic.max_depth, len(dynamic.levels)) == (7, 6, 2)
    alone = parse_tree("lookup-4")
    assert (alone.num_nodes, alone.max_depth, alone.levels) == (5, 4, ())
    for wrong in ("lookup", "lookup-x", "nothing+lookup", "chain-3+lookup-"):
        with pytest.raises(ValueError, match=r"is unknown|needs a number of tokens"):
            parse_tree(wrong)
    for wrong in (-1, True, 1.5):
        with pytest.raises(ValueError, match="lookup must be a number of tokens"):
            StaticTree((), lookup=wrong)


def test_named_trees():
    eagle = NAMED_TREES["eagle-26"]
    assert (eagle.num_nodes, eagle.max_depth) == (26, 5)
    assert [sum(len(p) == d for p in eagle.paths) for d in range(1, 6)] == [4, 8, 8, 3, 2]
    assert NAMED_TREES["bush-8"].num_nodes == 8
    assert (NAMED_TREES["dynamic"].num_nodes, NAMED_TREES["dynamic"].max_depth) == (60, 8)  # the first level and 7 more


def test_levels_of_a_worked_example():
    """Root -> {0, 1, 3}; 0 -> {0, 1}; 3 -> {0}; 00 -> {2}. Rank 2 is drafted at level 1 but not kept."""
    tree = StaticTree(((0,), (1,), (3,), (0, 0), (0, 1), (3, 0), (0, 0, 2)))
    assert tree.levels == (
        Level(branch=4, kept=(0, 1, 3), frontier=(0, 2)),
        Level(branch=2, kept=(0, 1, 2), frontier=(0,)),
        Level(branch=3, kept=(2,), frontier=()),
    )


@st.composite
def static_trees(draw):
    rng = np.random.default_rng(draw(SEEDS))
    paths = [()]
    for _ in range(draw(st.integers(1, 14))):
        paths.append((*paths[rng.integers(len(paths))], int(rng.integers(3))))
    return StaticTree(tuple(p for p in paths if p))


@given(static_trees())
def test_levels_rebuild_the_paths(tree):
    """Following the level plans literally gives back the template, node by node in order."""
    frontier, rebuilt = [()], []
    for level in tree.levels:
        children = [(*path, rank) for path in frontier for rank in range(level.branch)]
        nodes = [children[i] for i in level.kept]
        rebuilt += nodes
        frontier = [nodes[i] for i in level.frontier]
        assert level.frontier_size == len(frontier)
    assert frontier == []
    assert tuple(rebuilt) == tree.paths
    assert tree.num_nodes == 1 + len(rebuilt) and tree.max_depth == len(tree.levels)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 30))
def test_dynamic_levels(depth, top_k, total):
    plan = DynamicTree(depth, top_k, total)
    sizes = [len(level.kept) for level in plan.levels]
    assert len(sizes) == plan.max_depth == min(depth, total - 1)
    assert sizes == [top_k] + [top_k**2] * (plan.max_depth - 1)
    assert plan.num_nodes == min(total, 1 + sum(sizes))
    assert all(level.branch == top_k and level.frontier_size == top_k for level in plan.levels)


# Arrays


@pytest.mark.parametrize(
    ("parent", "rows"),
    [
        ([0], ["1"]),
        ([0, 0, 0, 1], ["1000", "1100", "1010", "1101"]),
        ([0, 0, 1, 2], ["1000", "1100", "1110", "1111"]),
        ([0, 0, 0, 0], ["1000", "1100", "1010", "1001"]),
    ],
)
def test_ancestor_mask_examples(parent, rows):
    mask = jax.jit(ancestor_mask, static_argnums=1)(np.array([parent], np.int32), 3)
    assert ["".join(map(str, row)) for row in np.asarray(mask[0]).astype(int)] == rows


MASK = jax.jit(partial(ancestor_mask, max_depth=8))


@given(SEEDS)
def test_ancestor_mask_equals_a_walk_to_the_root(seed):
    rng = np.random.default_rng(seed)
    parents = [helpers.random_tree_parents(rng, 9) for _ in range(4)]
    mask = np.asarray(MASK(np.array(parents, np.int32)))
    for row, parent in enumerate(parents):
        for node in range(9):
            assert np.flatnonzero(mask[row, node]).tolist() == sorted(helpers.ancestors_of(node, parent))


def test_root_only():
    tree = jax.jit(Tree.root_only)(jnp.array([7, 9]))
    assert tree.token_BT.tolist() == [[7], [9]] and tree.parent_BT.tolist() == tree.depth_BT.tolist() == [[0], [0]]
    assert tree.mask_BTT.tolist() == [[[True]], [[True]]] and tree.valid_BT.tolist() == [[True], [True]]


# Re-ranking

PLAN = DynamicTree(depth=3, top_k=3, total=9)
ROWS = 6
run_select = jax.jit(select, static_argnames="plan")


def grow(rng: np.random.Generator, plan: DynamicTree, coarse: bool) -> dict[str, np.ndarray]:
    """Candidates of one row as the EAGLE drafter lists them. ``coarse`` scores tie often and are -inf now and then."""
    token, score, parent, depth = [], [], [], []
    frontier = [(-1, 0.0)]
    for level in range(1, plan.max_depth + 1):
        nodes = []
        for number, base in frontier:
            gains = -rng.exponential(size=plan.top_k)
            if coarse:
                gains = np.where(rng.random(plan.top_k) < 0.15, -np.inf, np.round(gains * 2) / 2)
            for gain in sorted(gains, reverse=True):
                nodes.append((len(score), base + gain))
                token.append(int(rng.integers(1000)))
                score.append(base + gain)
                parent.append(number)
                depth.append(level)
        frontier = sorted(nodes, key=lambda node: (-node[1], node[0]))[: plan.top_k]
    return dict(
        token_Bn=np.array(token, np.int32),
        score_Bn=np.array(score, np.float32),
        parent_Bn=np.array(parent, np.int32),
        depth_Bn=np.array(depth, np.int32),
    )


def rerank(row: dict[str, np.ndarray], root: int, remaining: int, num_nodes: int) -> dict[str, list]:
    """EAGLE-2: the best candidates of all levels, earlier ones first among equals, then in their original order."""
    order = sorted(range(len(row["score_Bn"])), key=lambda i: (-row["score_Bn"][i], i))
    kept = sorted(order[: num_nodes - 1])
    index = {-1: 0} | {candidate: 1 + i for i, candidate in enumerate(kept)}
    return dict(
        token_BT=[root] + [int(row["token_Bn"][i]) for i in kept],
        parent_BT=[0] + [index[int(row["parent_Bn"][i])] for i in kept],  # KeyError if a child came without its parent
        depth_BT=[0] + [int(row["depth_Bn"][i]) for i in kept],
        valid_BT=[True] + [bool(row["score_Bn"][i] > -np.inf and row["depth_Bn"][i] < remaining) for i in kept],
    )


@given(SEEDS)
def test_select_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    rows = [grow(rng, PLAN, coarse=i % 2 == 1) for i in range(ROWS)]
    root = rng.integers(0, 1000, ROWS).astype(np.int32)
    remaining = rng.integers(1, 6, ROWS).astype(np.int32)
    columns = [np.stack([row[key] for row in rows]) for key in rows[0]]
    tree = jax.tree.map(np.asarray, run_select(root, Candidates(*columns), remaining_B=remaining, plan=PLAN))
    for i, row in enumerate(rows):
        wanted = rerank(row, int(root[i]), int(remaining[i]), PLAN.num_nodes)
        for field, values in wanted.items():
            assert getattr(tree, field)[i].tolist() == values, field
        assert helpers.depths_of(wanted["parent_BT"]) == wanted["depth_BT"]
        for node in range(PLAN.num_nodes):
            line = helpers.ancestors_of(node, wanted["parent_BT"])
            assert np.flatnonzero(tree.mask_BTT[i, node]).tolist() == sorted(line)
            # What is not valid has no valid descendants, so acceptance may look at a node alone.
            assert not tree.valid_BT[i, node] or tree.valid_BT[i, line].all()


def test_select_example_and_the_end_of_a_request():
    """The docstring's example; then the same with ever less to emit: d drafts need d + 1 tokens of room."""
    token, score = np.array([5, 6, 7, 8], np.int32), np.array([-1, -3, -2, -9], np.float32)
    parent, depth = np.array([-1, -1, 0, 1], np.int32), np.array([1, 1, 2, 2], np.int32)
    columns = [np.tile(x, (4, 1)) for x in (token, score, parent, depth)]
    plan = StaticTree(((0,), (1,), (0, 0)))
    tree = run_select(
        np.full(4, 4, np.int32), Candidates(*columns), remaining_B=np.array([3, 2, 1, 0], np.int32), plan=plan
    )
    assert tree.token_BT[0].tolist() == [4, 5, 6, 7]
    assert tree.parent_BT[0].tolist() == [0, 0, 0, 1]
    assert tree.valid_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_select_keeps_all_of_a_static_tree():
    """Also candidates without a finite score, so that shapes stay; they are just not valid."""
    plan = StaticTree(((0,), (1,), (0, 0)))
    columns = [np.array([[5, 6, 7]], np.int32), np.array([[-np.inf, -1, -np.inf]], np.float32)]
    columns += [np.array([[-1, -1, 0]], np.int32), np.array([[1, 1, 2]], np.int32)]
    tree = run_select(np.array([4], np.int32), Candidates(*columns), remaining_B=np.array([9], np.int32), plan=plan)
    assert tree.token_BT.tolist() == [[4, 5, 6, 7]]
    assert tree.valid_BT.tolist() == [[True, False, True, False]]
