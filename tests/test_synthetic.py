"""Synthetic acceptance: tokens per call as asked, from an untrained head, and limits and stop ids as ever."""

from __future__ import annotations

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from reciter import make_head

from jeagle import LLM, Dispatch, EagleConfig, SamplingParams
from jeagle.costs import CostTable, Setting
from jeagle.tree import Tree, ancestor_mask, parse_tree
from jeagle.verify import check_profile, constant_profile, force

PROMPTS = [[5, 6, 7], [9] * 20]


@pytest.fixture(scope="module")
def llm() -> LLM:
    target = helpers.tiny_llama(max_position=256)
    head = make_head(EagleConfig.for_target(target.config, "eagle3"))
    return LLM(target, head, tree="chain-3", synthetic_acceptance=constant_profile(2.8))


def test_the_example_of_its_docstring():
    parent = jnp.array([[0, 0, 0, 1]])
    tree = Tree(parent, parent, jnp.array([[0, 1, 1, 2]]), ancestor_mask(parent, 2), jnp.ones((1, 4), bool))
    seed, length = jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.int32)
    assert [x.tolist() for x in force(tree, seed, length, (1.0, 1.0), 3)] == [[[0, 1, 3]], [2]]
    assert [x.tolist() for x in force(tree, seed, length, (1.0, 0.0), 3)] == [[[0, 1, 0]], [1]]
    assert [x.tolist() for x in force(tree, seed, length, (0.0,), 3)] == [[[0, 0, 0]], [0]]


def generate(llm: LLM, **changed):
    """Both prompts side by side, sampled: all tests share one compiled program."""
    params = SamplingParams(**dict(ignore_eos=True, temperature=1.0, max_tokens=17, seed=1) | changed)
    return llm.generate(PROMPTS, params, use_tqdm=False)


def test_tokens_per_call_as_asked(llm):
    """Of some 570 rounds: what was kept is within four standard errors, at every depth."""
    metrics = [out.metrics for seed in range(4) for out in generate(llm, max_tokens=200, seed=seed)]
    profile, rounds = constant_profile(2.8), sum(m.num_rounds for m in metrics)
    assert {m.synthetic_acceptance for m in metrics} == {profile}
    kept = np.sum([np.array(m.acceptance_per_position) * m.num_rounds for m in metrics], axis=0) / rounds
    wanted = np.cumprod(profile)
    assert (abs(kept - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / rounds)).all()
    assert sum(m.num_emitted for m in metrics) == 1600 and 1600 / rounds == pytest.approx(2.8, abs=0.2)


def test_limits_and_stop_ids_hold(llm):
    outs = generate(llm)
    assert [len(o.outputs[0].token_ids) for o in outs] == [17, 17]
    assert [o.outputs for o in generate(llm)] == [o.outputs for o in outs]  # drawn from the seed
    said = outs[0].outputs[0].token_ids
    stopped = generate(llm, stop_token_ids=[said[8]])[0].outputs[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == said[: said.index(said[8]) + 1]


def test_under_a_dispatcher_whose_largest_tree_is_a_lookup(tmp_path):
    target = helpers.tiny_llama(max_position=256)
    costs = CostTable(
        {Setting(2, 256, True): dict(zip(map(parse_tree, ("off", "chain-1", "lookup-8")), (3.0, 3.1, 9.0)))}
    )
    llm = LLM(
        target,
        make_head(EagleConfig.for_target(target.config, "eagle3")),
        tree=Dispatch(candidates=["chain-1", "lookup-8"], costs=costs),
        synthetic_acceptance=[1.0],
        cache_dir=tmp_path,
    )
    metrics = [out.metrics for out in generate(llm)]
    assert {m.synthetic_acceptance for m in metrics} == {(1.0,)} and {m.tokens_per_call for m in metrics} == {17 / 9}
    llm.plan = parse_tree("chain-1")  # from now on that tree alone
    assert {m.tree for m in (out.metrics for out in generate(llm))} == {"chain-1"}


def test_plain_decoding_is_not_marked(llm):
    (plain,) = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=4), speculative=False, use_tqdm=False)
    assert plain.metrics.synthetic_acceptance is None and plain.metrics.tokens_per_call == 1


def test_profiles():
    for depth in (1, 3, 7):
        p = constant_profile(1.9, depth)
        assert len(p) == depth and sum(np.cumprod(p)) == pytest.approx(0.9)
    assert constant_profile(1.0) == pytest.approx((0,) * 3) and constant_profile(4.0) == (1,) * 3
    with pytest.raises(ValueError, match="a chain of 3 emits 1 to 4 tokens per call, not 5"):
        constant_profile(5)
    for wrong in ((), (0.5, 1.5), "0.5", 2.8):
        with pytest.raises(ValueError, match="list of probabilities"):
            check_profile(wrong)
