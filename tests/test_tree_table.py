"""What comes beside a head as ``trees.json``: what ``LLM`` drafts by it, and what a dispatcher begins with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_dispatch import CHAIN_1, CHAIN_3
from test_exactness import markov_head, markov_target

from jeagle import LLM, SamplingParams, heads
from jeagle.checkpoint_writer import save
from jeagle.dispatch import Dispatch, Dispatcher
from jeagle.host import described, processor
from jeagle.tree import OFF, parse_tree, tree_name
from jeagle.tree_table import TreeTable


def test_a_head_brings_its_trees_and_rates(tmp_path) -> None:
    """Candidates and first beliefs are the table's; what is counted has the last word, and options the first."""
    found = dict(rate=[[0.9, 0.05], [0.8, 0.1]], best={"1": "chain-3", "8": "chain-1"})
    (tmp_path / "trees.json").write_text(json.dumps(found))
    table = TreeTable.of_head(tmp_path)
    assert table is not None and table.greedy.best == table.sampled.best == {1: CHAIN_3, 8: CHAIN_1}
    d = Dispatcher(Dispatch(trees=table))
    assert d.plans == (OFF, CHAIN_3, CHAIN_1)
    rate_DC = d.acceptance[True].rate_DC
    np.testing.assert_allclose(rate_DC[:, 0], [0.9, 0.8, 0.8])  # what is deeper is as likely as the level above
    d.acceptance[True].add(CHAIN_1, np.array([1000, 1000]), np.array([1000, 100]))
    assert d.acceptance[True].rate_DC[0, 0] < 0.12
    assert Dispatcher(Dispatch(candidates=["bush-8"], trees=table)).plans == (OFF, parse_tree("bush-8"))
    (tmp_path / "trees.json").write_text(json.dumps(dict(found, candidates=["chain-3", "lookup-4"])))
    assert Dispatch(trees=TreeTable.of_head(tmp_path)).plans == (OFF, CHAIN_3, parse_tree("lookup-4"))
    assert TreeTable.of_head(tmp_path / "elsewhere") is None


def test_the_shipped_head_has_a_table() -> None:
    (name,) = heads.names()
    directory = heads.find(name)
    assert directory is not None
    table = TreeTable.of_head(directory)
    assert table is not None and table.greedy.best[1] != OFF


def test_sampled_requests_have_a_table_of_their_own(tmp_path) -> None:
    sampled = dict(rate=[[0.4]], lookup_share=0.05, lookup_rate=[0.5], best={"1": "chain-1+lookup", "8": "off"})
    greedy = dict(rate=[[0.6]], lookup_share=0.4, lookup_rate=[0.9], best={"1": "chain-3"})
    found = dict(greedy, device=described(), sampled=sampled)
    head = save(markov_head(markov_target()), tmp_path / "head")
    (head / "trees.json").write_text(json.dumps(found))
    d = Dispatcher(Dispatch(trees=TreeTable.of_head(head)))
    looked = parse_tree("chain-1+lookup")
    assert d.plans == (OFF, CHAIN_3, looked)
    greedy, other = (d.acceptance[sampled].rates for sampled in (False, True))
    assert (greedy.rate_DC[0, 0], other.rate_DC[0, 0]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert (greedy.lookup_share, other.lookup_share) == (pytest.approx(0.4), pytest.approx(0.05))
    llm = LLM(markov_target(), head, cache_dir=tmp_path)
    assert [llm.plan_for(batch) for batch in (1, 8)] == [CHAIN_3, CHAIN_3]
    assert [llm.plan_for(batch, sampled=True) for batch in (1, 8)] == [looked, OFF]
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=1, ignore_eos=True)
    (out,), (plain,) = (llm.generate([1, 2], params, speculative=s, use_tqdm=False) for s in (True, False))
    assert set(out.metrics.rounds_by_tree) == {"chain-1+lookup"} and out.outputs == plain.outputs


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"rate": [[2]], "best": {"1": "chain-1"}}',
        '{"rate": [[0.5]], "best": {"1": "dynamic"}}',
        '{"rate": [[0.5]], "best": {"1": "chain-1"}, "candidates": ["dynamic"]}',
    ],
)
def test_a_damaged_table_of_trees(tmp_path, content) -> None:
    (tmp_path / "trees.json").write_text(content)
    with pytest.raises(ValueError, match=r"trees.json is no table of trees .*; remove it"):
        TreeTable.of_head(tmp_path)


@pytest.mark.parametrize(
    ("device", "more", "trees"),
    [
        (f"cpu ({processor()}, 99 cores)", {}, ("chain-3+lookup-2", "chain-1")),
        (f"cpu ({processor()}, 99 cores)", {"tensor_parallel_size": 8}, ("chain-1+lookup",) * 2),
        ("cpu (x86_64 with other vectors, 2 cores)", {}, ("chain-1+lookup",) * 2),
        (f"a GPU ({processor()}, 99 cores)", {}, ("chain-1+lookup",) * 2),
    ],
)
def test_auto_is_what_was_searched_for_the_batch_size_on_such_a_device(tmp_path, device, more, trees) -> None:
    target = markov_target()
    head = save(markov_head(target), tmp_path / "head")
    found = dict(rate=[[0.9]], best={"1": "chain-3+lookup-2", "8": "chain-1"}, device=device, **more)
    (head / "trees.json").write_text(json.dumps(found))
    llm = LLM(target, head, cache_dir=tmp_path)
    assert [tree_name(llm.plan_for(batch)) for batch in (1, 2, 4, 64)] == [trees[0], trees[0], trees[1], trees[1]]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[1 + i] for i in range(4)]
    for asked, tree in ((prompts[:1], trees[0]), (prompts, trees[1])):
        outputs = llm.generate(asked, params, use_tqdm=False)
        depth = parse_tree(tree).max_depth
        assert {len(out.metrics.acceptance_histogram) for out in outputs} == {depth + 1}
        plain = llm.generate(asked, params, use_tqdm=False, speculative=False)
        assert [out.outputs for out in outputs] == [out.outputs for out in plain]
