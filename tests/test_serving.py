"""Rows that take the places of finished ones: the text, and what is counted, is that of each row alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tokenizer
from reciter import reciting_pair
from test_exactness import CAPACITY, CHUNK, CONFIG, PAGE, markov_head, markov_target
from test_switching import make_batch
from test_text import ByteTokenizer

from jeagle import LLM, RequestOutput, SamplingParams, serving
from jeagle.checkpoint_writer import save
from jeagle.costs import CostTable, Setting
from jeagle.course import Look
from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.dispatch import Choice, Dispatch, Dispatcher
from jeagle.requests import Row
from jeagle.serving import ROUNDS_BETWEEN_STOP_CHECKS, Seat, _finished
from jeagle.text import Detokenizer
from jeagle.tree import OFF, StaticTree

QUIET = dict(use_tqdm=False)
OPTIONS = dict(page_size=PAGE, prefill_chunk=16, max_model_len=CAPACITY)
ROWS = 13


@pytest.fixture(scope="module")
def pair():
    """A head that is right where attention does not interfere: some drafts are kept, others not."""
    target = markov_target(attention=1.0)
    return target, markov_head(target)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, rng.integers(1, 40)).tolist() for _ in range(ROWS)]
    params = [
        SamplingParams(max_tokens=3 + 7 * i % 31, ignore_eos=True, seed=i, temperature=0.8 * (i % 3 == 0), logprobs=1)
        for i in range(ROWS)
    ]
    return prompts, params


def told(outputs: Sequence[RequestOutput]) -> list[tuple]:
    """Everything but seconds."""
    return [
        (
            [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in out.outputs],
            out.metrics.num_rounds,
            out.metrics.num_emitted,
            out.metrics.acceptance_histogram,
            out.metrics.lookup_histogram,
            out.metrics.rounds_by_tree,
        )
        for out in outputs
    ]


def assert_same_logprobs(ours: Sequence[RequestOutput], theirs: Sequence[RequestOutput]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert list(a) == list(b)
            assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)


@pytest.mark.parametrize("tree", ["off", "chain-2", "chain-2+lookup-3"])
@pytest.mark.parametrize(("places", "free"), [(1, 0.25), (3, 0.01), (8, 0.25), (8, 1.0)])
def test_what_a_row_gets_does_not_depend_on_its_turn(pair, tree, places, free, monkeypatch):
    """Not even how many drafts are kept: its prompt is in the head's cache, too."""
    prompts, params = requests()
    together = LLM(*pair, tree=tree, max_batch_size=16, **OPTIONS).generate(prompts, params, **QUIET)
    assert tree == "off" or any(sum(out.metrics.acceptance_histogram[1:]) for out in together)
    monkeypatch.setattr(serving, "FREE", free)
    in_turns = LLM(*pair, tree=tree, max_batch_size=places, **OPTIONS).generate(prompts, params, **QUIET)
    assert told(in_turns) == told(together)
    assert_same_logprobs(in_turns, together)


def test_under_trees_that_change_with_every_launch(pair, monkeypatch):
    """Off and on again: rows are seated in a batch whose head has been dropped, and beside such as came before it."""
    plans = itertools.cycle(Dispatch(candidates=["chain-1", "chain-3"]).plans)

    def choose(self, setting, refilled):
        self._seat(setting, self.values(setting))
        return Choice(next(plans), 3)

    monkeypatch.setattr(Dispatcher, "choose", choose)
    prompts, params = requests()
    plain = LLM(*pair, tree="off", max_batch_size=16, **OPTIONS).generate(prompts, params, **QUIET)
    llm = LLM(*pair, tree=Dispatch(candidates=["chain-1", "chain-3"]), max_batch_size=3, **OPTIONS)
    switched = llm.generate(prompts, params, **QUIET)
    assert [out.outputs[0].token_ids for out in switched] == [out.outputs[0].token_ids for out in plain]
    for out in switched:
        metrics = out.metrics
        assert sum(metrics.rounds_by_tree.values()) == metrics.num_rounds == sum(metrics.acceptance_histogram)
    assert {name for out in switched for name in out.metrics.rounds_by_tree} == {"off", "chain-1", "chain-3"}


def test_stop_strings_in_turns(tmp_path, monkeypatch):
    target, head = reciting_pair()
    checkpoint = save(target, tmp_path / "target", extra_files=tiny_tokenizer.tokenizer_files())
    prompts = list("abcdfghijkl")
    params = [SamplingParams(max_tokens=40, stop=stop) for stop, _ in zip(itertools.cycle(("STOP", "k", ())), prompts)]
    outputs = [
        LLM(checkpoint, head, tree="chain-2", max_batch_size=n).generate(prompts, params, **QUIET) for n in (3, 16)
    ]
    assert [out.outputs for out in outputs[0]] == [out.outputs for out in outputs[1]]  # rounds after a match are wasted
    assert outputs[0][0].outputs[0].text.endswith("m.") and outputs[0][0].outputs[0].stop_reason == "STOP"

    # Where one is wanted the host looks often, and the dispatcher is told whether others wait.
    launched, queued = [], []
    launch, choose = Decoder.launch, Dispatcher.choose
    monkeypatch.setattr(Decoder, "launch", lambda self, *args: launched.append(args[2]) or launch(self, *args))
    llm = LLM(checkpoint, head, tree="chain-2", max_batch_size=2)
    for stop, most in ((("STOP",), ROUNDS_BETWEEN_STOP_CHECKS), ((), 64)):
        launched.clear()
        llm.generate(prompts[:1], SamplingParams(max_tokens=40, stop=stop), **QUIET)
        assert set(launched) == {most}
    monkeypatch.setattr(Dispatcher, "choose", lambda self, *args: queued.append(args[1]) or choose(self, *args))
    costs = CostTable({Setting(2, 256, False): {OFF: 1.0, StaticTree.chain(1): 0.5}})
    dispatched = LLM(checkpoint, head, tree=Dispatch(candidates=["chain-1"], costs=costs), max_batch_size=2)
    dispatched.generate(prompts[:5], SamplingParams(max_tokens=9, ignore_eos=True), **QUIET)
    assert queued[0] and not queued[-1]


def test_a_stop_string_in_what_was_held_back():
    """The last token is a space and half a character: what ends the text is known when nothing more can come."""
    row = Row(0, 0, np.array([1], np.int32), SamplingParams(max_tokens=2, stop=" "), np.zeros(2, np.uint32), ())
    seat = Seat(row, Detokenizer(ByteTokenizer("word", b" \xe2\x80"), (" ",)), 0.0, 0.0)
    text_BS, look = np.array([[1, 256, 257]]), Look(np.array([2]), np.array([2]), np.array([2]))
    seat.text.push(text_BS[0, 1:].tolist())
    none = SimpleNamespace(acceptance_BP=np.zeros((1, 1), int), looked_BP=np.zeros((1, 1), int), rounds_by_tree={})
    none.profile, none.tree = None, "off"
    finished = _finished(none, 0, seat, look, text_BS, None, 0.0)
    assert (finished.text, finished.finish_reason, finished.stop_reason) == ("word", "stop", " ")


def test_nobody_waits_for_the_longest(pair, monkeypatch):
    """One long row beside eight short ones, in two places: as many rounds as the long one needs, and a few."""
    seated, rounds = [], [0]
    refill, launch = Decoder.refill, Decoder.launch

    def watched_refill(self, state, program, batch, places, **shapes):
        seated.append(places.tolist())
        return refill(self, state, program, batch, places, **shapes)

    def watched_launch(self, state, program, *limits):
        before = np.array(state.num_rounds_B)
        state = launch(self, state, program, *limits)
        rounds[0] += int((np.array(state.num_rounds_B) - before).max())
        return state

    monkeypatch.setattr(Decoder, "refill", watched_refill)
    monkeypatch.setattr(Decoder, "launch", watched_launch)
    llm = LLM(*pair, max_batch_size=2, **OPTIONS)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (40, *[5] * 8)]
    llm.generate([[1, 2, 3, 4], *[[7]] * 8], params, speculative=False, **QUIET)
    assert seated == [[1]] * 7  # the other place stays taken
    assert rounds == [40]


def test_a_launch_ends_when_so_many_have_finished(pair):
    decoder, batch, program = Decoder(*pair, page_size=PAGE), make_batch(sampled=False), Program()
    state = decoder.start(batch, program, capacity=CAPACITY, chunk=CHUNK)  # rows of 40, 33, 26 and 37 tokens
    rounds = []
    for least in (4, 3, 1):
        state = decoder.launch(state, program, 1000, least)
        rounds.append(np.asarray(state.num_rounds_B).tolist())
    assert rounds == [[26, 26, 26, 26, 0, 0], [33, 33, 26, 33, 0, 0], [40, 33, 26, 37, 0, 0]]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_refilled_rows_in_groups(pair, rows):
    """Whatever rows are prefilled side by side, in whatever places."""
    program = Program(plan=OFF)
    decoder, batch = Decoder(*pair, page_size=PAGE), make_batch(sampled=False)
    alone = decoder.launch(decoder.start(batch, program, capacity=CAPACITY, chunk=CHUNK), program, 1000)
    state = decoder.launch(decoder.start(batch, program, capacity=CAPACITY, chunk=CHUNK), program, 30)
    places = np.array([0, 2, 3])
    state = decoder.refill(state, program, batch, places, chunk=CHUNK, rows=rows)
    assert np.asarray(state.num_output_B).tolist() == [0, 30, 0, 0, 0, 0]
    state = decoder.launch(state, program, 1000)
    np.testing.assert_array_equal(state.text_BS, alone.text_BS)
    assert np.asarray(state.num_rounds_B).tolist() == [40, 33, 26, 37, 0, 0]
