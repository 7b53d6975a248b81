"""Prompt lookup: what is found against a search in plain Python, and texts that stay what the target alone says."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import BUSH, CONFIG, DYNAMIC, Bench, batches, markov_head, markov_target, same_tokens

from jeagle import LLM, SamplingParams
from jeagle.decode import DecodeState
from jeagle.lookup import LEAST, LEAST_SAMPLED, MOST, look_up, propose
from jeagle.tree import OFF, StaticTree, Tree, TreePlan, with_lookup

LOOKUP = StaticTree((), lookup=5)
find = jax.jit(look_up, static_argnames="length")


def searched(text: list[int], length: int) -> tuple[list[int], int]:
    """What followed the longest repeated end of a text, its latest place, and how long that end is."""
    for alike in range(MOST, 0, -1):
        for start in range(len(text) - 1, alike - 1, -1):
            if text[start - alike : start] == text[len(text) - alike :]:
                more = list(text)
                for i in range(length):
                    more.append(more[start + i])
                return more[len(text) :], alike
    return [], 0


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=24))
def test_what_is_found(text: list[int]) -> None:
    """In texts of three words, whatever stands after their ends."""
    padded = np.full((1, 30), 1, np.int32)
    padded[0, : len(text)] = text
    token_BK, alike_B = find(jnp.asarray(padded), jnp.array([len(text) - 1]), length=6)
    expected, alike = searched(text, 6)
    assert int(alike_B[0]) == alike
    if alike:
        assert token_BK[0].tolist() == expected


def test_the_place_whose_past_is_most_alike() -> None:
    """Twice "7 8" was said, the second time after other words than now."""
    text = [5, 7, 8, 1, 2, 6, 7, 8, 3, 4, 5, 7, 8]
    token_BK, alike_B = find(jnp.array([text]), jnp.array([len(text) - 1]), length=2)
    assert alike_B.tolist() == [3] and token_BK.tolist() == [[1, 2]]


def test_the_tree_of_a_row() -> None:
    """A chain as far as the request goes, then nodes that are not valid; nothing for rows that do not ask, or whose
    ends are too short to say much: a sampled row's must be longer, and without a head any will do."""
    ends = [[1, 2, 3, 9, 1, 2, 3], [0, 0, 2, 3, 7, 2, 3], [7, 1, 2, 3, 4, 5, 6]]
    text = jnp.pad(jnp.array([ends[0]] * 4 + ends[1:], jnp.int32), ((0, 0), (0, 2)))
    asked_B = jnp.array([True, True, False, True, True, True])
    temperature_B = jnp.array([0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    remaining_B = jnp.array([9, 3, 9, 9, 9, 9])

    def proposed(plan: TreePlan) -> tuple[Tree, jax.Array]:
        return jax.jit(partial(propose, plan=plan))(text, jnp.full(6, 6), remaining_B, asked_B, temperature_B)

    tree, found_B = proposed(StaticTree(BUSH.paths, lookup=4))
    assert 2 < LEAST <= 3 < LEAST_SAMPLED
    assert found_B.tolist() == [True, True, False, False, False, False]
    assert tree.token_BT.shape == (6, BUSH.num_nodes)
    assert tree.token_BT[0, :5].tolist() == [3, 9, 1, 2, 3]
    valid = np.asarray(tree.valid_BT).sum(1)
    assert valid.tolist() == [5, 3, 1, 1, 1, 1]  # root and 4; 3 tokens, of which one is the bonus; the root
    assert tree.parent_BT[0].tolist() == [0, 0, 1, 2, 3, 0, 0, 0]
    assert tree.depth_BT[0].tolist() == [0, 1, 2, 3, 4, 1, 1, 1]
    mask = np.asarray(tree.mask_BTT[0])
    assert mask[4].tolist() == [True] * 5 + [False] * 3 and mask[6].nonzero()[0].tolist() == [0, 6]
    assert proposed(LOOKUP)[1].tolist() == [True, True, False, True, True, False]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def counted(state: DecodeState) -> None:
    """Lookups are rounds like others."""
    assert (np.asarray(state.looked_BP) <= np.asarray(state.acceptance_BP)).all()
    drafted_B = np.asarray(state.num_rounds_B) - np.asarray(state.looked_BP).sum(1)
    if state.tried_BN.shape[1] > 1:
        assert (np.asarray(state.tried_BN)[:, 1] <= drafted_B).all()


@pytest.mark.parametrize(
    ("name", "plan"),
    [("eagle3", with_lookup(BUSH)), ("eagle1", with_lookup(DYNAMIC, 9)), ("meta", StaticTree(((0,),), lookup=6))],
    ids=["static", "dynamic", "longer than the tree"],
)
def test_random_heads(bench: Bench, name: str, plan: TreePlan) -> None:
    """Greedy and sampled rows side by side, of which few repeat themselves."""

    @settings(max_examples=8)
    @given(batches())
    def check(batch) -> None:
        state = bench.run(name, batch, plan)
        same_tokens(bench.run(None, batch, OFF), state)
        counted(state)

    check()


def test_texts_that_go_in_circles(bench: Bench) -> None:
    """The target follows its last token alone, so greedy rows soon repeat themselves: with a head that is always wrong,
    and with none, most tokens are looked up."""
    target = markov_target()
    wrong = markov_head(target, wrong=True)

    @settings(max_examples=6)
    @given(batches(greedy=True))
    def check(batch) -> None:
        plain = bench.run(None, batch, OFF, target=target)
        for name, head, plan in (("meta", wrong, with_lookup(BUSH)), (None, None, LOOKUP)):
            state = bench.run(name, batch, plan, target=target, head=head)
            same_tokens(plain, state)
            counted(state)
            kept = np.asarray(state.looked_BP) @ np.arange(state.looked_BP.shape[1])
            np.testing.assert_array_equal(np.asarray(state.num_output_B) - np.asarray(state.num_rounds_B), kept)

    check()


def test_without_a_head(tmp_path) -> None:
    """``tree="lookup-K"`` needs none, and says what it did."""
    llm = LLM(markov_target(), tree="lookup-5", cache_dir=tmp_path)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts = [[1, 2, 3], [4]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    plain = llm.generate(prompts, params, use_tqdm=False, speculative=False)
    for a, b in zip(outputs, plain, strict=True):
        assert a.outputs == b.outputs
        assert a.metrics.tree == "lookup-5" and set(a.metrics.rounds_by_tree) == {"lookup-5"}
        assert sum(a.metrics.lookup_histogram) <= a.metrics.num_rounds == sum(a.metrics.acceptance_histogram)
        assert sum(b.metrics.lookup_histogram) == 0
    assert max(a.metrics.tokens_per_call for a in outputs) > 2
    for tree in ("auto", "dispatch", "off"):
        assert LLM(markov_target(), tree=tree, cache_dir=tmp_path).plan == OFF
    for tree in ("chain-3", "chain-3+lookup", [[0], [0, 0]]):  # not plain decoding without a word
        with pytest.raises(ValueError, match=r"needs a head: give a draft, or"):
            LLM(markov_target(), tree=tree, cache_dir=tmp_path)


def test_a_request_of_all_positions(tmp_path) -> None:
    """The text holds one token more than the caches."""
    llm = LLM(markov_target(), tree="lookup-5", page_size=16, cache_dir=tmp_path)
    prompt = [[3, 1, 4, 1, 5, 9]]
    params = SamplingParams(max_tokens=CONFIG.max_position - len(prompt[0]), ignore_eos=True)
    outs = [llm.generate(prompt, params, use_tqdm=False, speculative=s)[0].outputs for s in (True, False)]
    assert outs[0] == outs[1] and len(outs[0][0].token_ids) == params.max_tokens
