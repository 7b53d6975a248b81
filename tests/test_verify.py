"""Acceptance against a walk in Python, and the law of the emitted tokens against the target's, computed exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jeagle.sampling import Filters, SamplingParams, choose, gumbel, warp
from jeagle.tree import Tree, ancestor_mask
from jeagle.verify import accept

ROWS, NODES = 16, 9
NUM_PATH = NODES
VOCAB = 4  # few tokens, so that choices often match

SEEDS = st.integers(0, 2**32 - 1)


@partial(jax.jit, static_argnames=("max_depth", "num_path"))
def run_accept(token, parent, depth, valid, chosen, *, max_depth, num_path):
    return accept(Tree(token, parent, depth, ancestor_mask(parent, max_depth), valid), chosen, num_path)


def accept_rows(token, parent, valid, chosen) -> tuple[np.ndarray, np.ndarray]:
    depth = np.array([helpers.depths_of(row) for row in parent], np.int32)
    arrays = [np.asarray(x, np.int32) for x in (token, parent, depth)]
    out = run_accept(
        *arrays, np.asarray(valid, bool), np.asarray(chosen, np.int32), max_depth=NODES - 1, num_path=NUM_PATH
    )
    return np.asarray(out[0]), np.asarray(out[1])


def draw(rng: np.random.Generator, *, distinct: bool) -> tuple[list, list, list, list]:
    """A random tree and choices that half of the time follow a child of the node. distinct: no two siblings alike."""
    parent, token, valid, chosen = helpers.random_tree_parents(rng, NODES), [0], [True], []
    if distinct:
        while max(np.bincount(parent[1:])) > VOCAB:
            parent = helpers.random_tree_parents(rng, NODES)
    for node in range(1, NODES):
        taken = {token[n] for n in range(1, node) if parent[n] == parent[node]} if distinct else set()
        token.append(int(rng.choice([t for t in range(VOCAB) if t not in taken])))
        valid.append(bool(rng.random() < 0.9))
    for node in range(NODES):
        children = [n for n in range(1, NODES) if parent[n] == node]
        follow = children and rng.random() < 0.7
        chosen.append(token[rng.choice(children)] if follow else int(rng.integers(VOCAB)))
    return token, parent, valid, chosen


@given(SEEDS)
def test_accept_equals_a_walk(seed):
    rng = np.random.default_rng(seed)
    rows = [draw(rng, distinct=True) for _ in range(ROWS)]
    path, accepted = accept_rows(*zip(*rows))
    for row, (token, parent, valid, chosen) in enumerate(rows):
        walk = [0]
        while True:
            here = [n for n in range(1, NODES) if parent[n] == walk[-1] and token[n] == chosen[walk[-1]] and valid[n]]
            if not here:
                break
            walk.append(here[0])
        assert accepted[row] == len(walk) - 1
        assert path[row].tolist() == walk + [0] * (NUM_PATH - len(walk))


@given(SEEDS)
def test_duplicate_siblings_still_give_the_longest_chain(seed):
    """A head that proposes one token twice may cost a draft slot, but the path stays a path of the target's choices."""
    rng = np.random.default_rng(seed)
    rows = [draw(rng, distinct=False) for _ in range(ROWS)]
    path, accepted = accept_rows(*zip(*rows))
    for row, (token, parent, valid, chosen) in enumerate(rows):
        lines = [helpers.ancestors_of(node, parent) for node in range(NODES)]
        good = [
            line
            for line in lines
            if all(valid[child] and token[child] == chosen[node] for node, child in pairwise(line))
        ]
        assert path[row, : accepted[row] + 1].tolist() in good
        assert accepted[row] + 1 == max(map(len, good))
        assert not path[row, accepted[row] + 1 :].any()


def test_the_example_of_its_docstring():
    the, a, cat, sat = 10, 11, 12, 13
    out = run_accept(
        np.array([[1, the, a, cat]]),
        np.array([[0, 0, 0, 1]]),
        np.array([[0, 1, 1, 2]]),
        np.ones((1, 4), bool),
        np.array([[the, cat, a, sat]]),
        max_depth=2,
        num_path=3,
    )
    assert [x.tolist() for x in out] == [[[0, 1, 3]], [2]]


def test_an_invalid_node_ends_the_path_whatever_hangs_below():
    token, parent = [0, 1, 2, 3, 1, 1, 1, 1, 1], [0, 0, 1, 2, 0, 0, 0, 0, 0]
    chosen = [1, 2, 3, 0, 0, 0, 0, 0, 0]
    lengths = []
    for invalid in (None, 3, 2, 1):
        valid = [node != invalid and node < 4 for node in range(NODES)]
        path, accepted = accept_rows([token] * ROWS, [parent] * ROWS, [valid] * ROWS, [chosen] * ROWS)
        lengths.append(int(accepted[0]))
        assert path[0, : accepted[0] + 1].tolist() == list(range(accepted[0] + 1))
    assert lengths == [3, 2, 1, 0]


# The law of the emitted tokens

V, LENGTH, DRAWS = 8, 3, 100_000
NUM_CONTEXTS = 1 + V + V**2  # of fewer than LENGTH tokens; context 0 is the empty one, its children 1 .. V, and so on


@dataclass(frozen=True)
class Shape:
    """Children per node by level: (1, 1) is a chain of two, (2, 2) has two children with two each."""

    branches: tuple[int, ...]

    @property
    def parents(self) -> list[int]:
        parents, level = [0], [0]
        for branch in self.branches:
            first = len(parents)
            parents += [node for node in level for _ in range(branch)]
            level = list(range(first, len(parents)))
        return parents


def child(context, token):
    """Number of the context that has one token more."""
    return V * context + 1 + token


@partial(jax.jit, static_argnames=("shape", "filters"))
def sample(target_CV, draft_CV, rows, *, shape, filters):
    """LENGTH tokens of every row by rounds of draft, choose and accept. Logits are rows of a table, one per context.

    Deeper contexts than the law looks at take some row of the tables, the same whenever they come up.
    """
    B, parents = rows.temperature_B.shape[0], shape.parents
    depth = np.array(helpers.depths_of(parents))
    T, P = len(parents), len(shape.branches) + 1

    def tile(x, dtype=jnp.int32):
        return jnp.broadcast_to(jnp.asarray(x, dtype), (B, T))

    parent_BT, depth_BT = tile(parents), tile(depth)
    mask_BTT = ancestor_mask(parent_BT, P - 1)

    def one_round(_, state):
        out_BO, length_B, context_B, rounds_B = state
        # Children are ranked by log q plus the very noise the target will choose with.
        token, context, level_context = [jnp.zeros((B, 1), jnp.int32)], [context_B[:, None]], context_B[:, None]
        for level, branch in enumerate(shape.branches):
            q_BFV = jax.nn.log_softmax(draft_CV[level_context % NUM_CONTEXTS], axis=-1)
            score_BFV = q_BFV + gumbel(rows.seed_B2, (length_B + level)[:, None], jnp.arange(V))
            token_BFC = jax.lax.top_k(score_BFV, branch)[1]
            level_context = child(level_context[:, :, None], token_BFC).reshape(B, -1)
            token.append(token_BFC.reshape(B, -1))
            context.append(level_context)
        token_BT, context_BT = jnp.concatenate(token, axis=1), jnp.concatenate(context, axis=1)
        tree = Tree(token_BT, parent_BT, depth_BT, mask_BTT, tile(True, bool))
        logits_BTV = target_CV[context_BT % NUM_CONTEXTS]
        chosen_BT = choose(logits_BTV, length_B[:, None] + depth_BT, rows, filters)
        path_BP, accepted_B = accept(tree, chosen_BT, P)
        emitted_BP = jnp.take_along_axis(chosen_BT, path_BP, axis=1)
        going_B = length_B < LENGTH
        slot_BP = jnp.where(
            going_B[:, None] & (jnp.arange(P) <= accepted_B[:, None]), length_B[:, None] + jnp.arange(P), LENGTH + P
        )
        out_BO = out_BO.at[jnp.arange(B)[:, None], slot_BP].set(emitted_BP, mode="drop")
        last_BP = child(jnp.take_along_axis(context_BT, path_BP, axis=1), emitted_BP)
        last_B = jnp.take_along_axis(last_BP, accepted_B[:, None], axis=1)[:, 0]
        context_B = jnp.where(going_B, last_B, context_B)
        length_B = jnp.where(going_B, length_B + accepted_B + 1, length_B)
        return out_BO, length_B, context_B, rounds_B + going_B

    zero_B = jnp.zeros(B, jnp.int32)
    start = (jnp.zeros((B, LENGTH + P), jnp.int32), zero_B, zero_B, zero_B)
    out_BO, _, _, rounds_B = jax.lax.fori_loop(0, LENGTH, one_round, start)
    return out_BO[:, :LENGTH], rounds_B


OFF, CHAIN, BUSH = Shape(()), Shape((1, 1)), Shape((2, 2))


@pytest.mark.parametrize(
    ("params", "shapes"),
    [
        (SamplingParams(temperature=1.0), (OFF, CHAIN, BUSH)),
        (SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.02), (OFF, BUSH)),
    ],
    ids=["plain", "filtered"],
)
def test_emitted_tokens_follow_the_law_of_the_target(params, shapes):
    """Chi-square of 1e5 sequences of three tokens: jointly, and of each token given the ones before it."""
    filters = Filters.needed([params])
    rng = np.random.default_rng(11)
    target_CV = 1.5 * rng.standard_normal((NUM_CONTEXTS, V)).astype(np.float32)
    draft_CV = target_CV + rng.standard_normal((NUM_CONTEXTS, V)).astype(np.float32)
    one_each = helpers.same_for_all_rows(params, NUM_CONTEXTS)
    given_CV = np.asarray(
        jax.jit(lambda x, rows: jax.nn.softmax(warp(x[:, None], rows, filters), axis=-1))(target_CV, one_each)
    )[:, 0].astype(np.float64)
    joint = np.array(
        [
            given_CV[0, a] * given_CV[child(0, a), b] * given_CV[child(child(0, a), b), c]
            for a in range(V)
            for b in range(V)
            for c in range(V)
        ]
    )
    assert joint.sum() == pytest.approx(1, abs=1e-5)

    rows = helpers.same_for_all_rows(params, DRAWS, seed=3)
    texts, rounds = [], []
    for shape in shapes:
        text, num_rounds = sample(target_CV, draft_CV, rows, shape=shape, filters=filters)
        texts.append(np.asarray(text))
        rounds.append(float(np.mean(num_rounds)))
    # The same tokens whatever was drafted, so there is one law to test; and larger trees do accept more.
    for text in texts:
        np.testing.assert_array_equal(text, texts[0])
    assert (np.diff(rounds) < -0.2).all()

    counts = np.bincount(text @ np.array([V * V, V, 1]), minlength=V**3)
    assert helpers.chi_square_p(counts, joint) > 1e-4
    counts = counts.reshape(V, V, V)
    tests = [(counts.sum((1, 2)), given_CV[0])]
    tests += [(counts[a].sum(1), given_CV[child(0, a)]) for a in range(V)]
    tests += [(counts[a, b], given_CV[child(child(0, a), b)]) for a in range(V) for b in range(V)]
    assert min(helpers.chi_square_p(*test) for test in tests) > 1e-4 / len(tests)
