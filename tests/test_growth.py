"""Caches that grow with their texts: what a row gets does not depend on how large its cache is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_exactness import CONFIG, PAGE, markov_head, markov_target
from test_serving import QUIET, assert_same_logprobs, told

from jeagle import LLM, SamplingParams, course
from jeagle.course import capacities
from jeagle.decoder import Decoder
from jeagle.dispatch import Choice, Dispatch, Dispatcher

OPTIONS = dict(page_size=PAGE, prefill_chunk=16, max_model_len=256)
ROWS = 5


def test_capacities() -> None:
    assert capacities(256, 64) == [256] and capacities(1984, 64) == [1984]
    assert capacities(4224, 64) == [1088, 2112, 4224] and capacities(2048, 16) == [1024, 2048]
    assert capacities(2048, 2048) == [2048] and capacities(8192, 4096) == [4096, 8192]  # no less than a page
    for most, page in itertools.product(range(2048, 9000, 192), (16, 64)):
        found = capacities(most // page * page, page)
        assert found[-1] == most // page * page and all(n % page == 0 for n in found)
        assert all(a < b <= 2 * a for a, b in itertools.pairwise(found)) and found[0] < 2048 + 2 * page


@pytest.fixture
def grown(monkeypatch) -> list[tuple[int, int]]:
    """Capacities before and after, of caches that begin small."""
    monkeypatch.setattr(course, "SMALL_CAPACITY", 32)
    before_and_after, grow = [], Decoder.grow

    def seen(decoder, state, capacity):
        new = grow(decoder, state, capacity)
        sizes = tuple(x.page_table_BM.shape[1] * decoder.page_size for x in (state, new))
        assert sizes[1] == capacity
        before_and_after.append(sizes)
        return new

    monkeypatch.setattr(Decoder, "grow", seen)
    return before_and_after


@pytest.fixture(scope="module")
def pair():
    target = markov_target(attention=1.0)
    return target, markov_head(target)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 3, 25, 20, 5)]
    some = dict(ignore_eos=True, logprobs=1)
    return prompts, [
        SamplingParams(max_tokens=20 + 40 * i, seed=i, temperature=0.8 * (i % 2), **some) for i in range(ROWS)
    ]


@pytest.mark.parametrize("kv", [None, "fp8"])
@pytest.mark.parametrize(("tree", "places"), [("off", 8), ("chain-2", 8), ("bush-8+lookup", 2), ("chain-3", 1)])
def test_what_a_row_gets_does_not_depend_on_its_cache(pair, tree, places, kv, grown, monkeypatch) -> None:
    """Neither in one batch nor in turns."""
    options = dict(tree=tree, max_batch_size=places, **OPTIONS) | ({} if kv is None else dict(kv_cache_dtype=kv))
    prompts, params = requests()
    small = LLM(*pair, **options).generate(prompts, params, **QUIET)
    assert grown and all(before < after for before, after in grown)
    monkeypatch.setattr(Decoder, "grows", False)
    grown.clear()
    whole = LLM(*pair, **options).generate(prompts, params, **QUIET)
    assert told(small) == told(whole) and not grown
    assert_same_logprobs(small, whole)


def test_under_trees_that_change(pair, grown, monkeypatch) -> None:
    """A head that comes and goes, trees that need more room than the one before."""
    plans = itertools.cycle(Dispatch(candidates=["chain-1", "bush-8"]).plans)

    def choose(self, setting, refilled):
        assert setting.capacity < 64  # what is measured is the first capacity
        self._seat(setting, self.values(setting))
        return Choice(next(plans), 5)

    monkeypatch.setattr(Dispatcher, "choose", choose)
    prompts, params = requests()
    llm = LLM(*pair, tree=Dispatch(candidates=["chain-1", "bush-8"]), max_batch_size=2, **OPTIONS)
    switched = llm.generate(prompts, params, **QUIET)
    assert grown
    plain = LLM(*pair, tree="off", max_batch_size=8, **OPTIONS).generate(prompts, params, **QUIET)
    assert [out.outputs[0].token_ids for out in switched] == [out.outputs[0].token_ids for out in plain]


def test_what_ends_early_never_has_the_large_cache(pair, grown) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True, stop_token_ids=list(range(CONFIG.vocab_size)))
    (out,) = LLM(*pair, tree="chain-2", **OPTIONS).generate([1, 2, 3], params, **QUIET)
    assert out.outputs[0].finish_reason == "stop" and not grown
