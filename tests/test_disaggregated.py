"""Prompts filled in by devices of their own: what a row gets, and what the devices do meanwhile."""

from __future__ import annotations

import itertools
import re

import jax
import numpy as np
import pytest
import tiny_tokenizer
from helpers import no_compilation
from reciter import reciting_pair
from test_exactness import CAPACITY, PAGE, markov_head, markov_target
from test_serving import OPTIONS, QUIET, assert_same_logprobs, requests, told
from test_sharding import pair as wide_pair

from jeagle import LLM, SamplingParams, serving, sharding
from jeagle.checkpoint_writer import save
from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.disaggregated import Prefill
from jeagle.dispatch import Choice, Dispatch, Dispatcher
from jeagle.sharding import Layout, make_mesh, worker_meshes
from jeagle.tree import parse_tree

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture(scope="module")
def pair():
    target = markov_target(attention=1.0)
    return target, markov_head(target)


@pytest.fixture(scope="module")
def wanted(pair):
    """Of all rows side by side on one device, by tree."""
    trees = ("off", "chain-2+lookup-3")
    return {t: LLM(*pair, tree=t, max_batch_size=16, **OPTIONS).generate(*requests(), **QUIET) for t in trees}


@pytest.mark.parametrize(
    ("data", "tensor", "workers", "places", "tree"),
    [
        (1, 1, 1, 3, "chain-2+lookup-3"),
        (1, 1, 7, 16, "chain-2+lookup-3"),
        (1, 2, 2, 3, "off"),
        (2, 2, 2, 4, "chain-2+lookup-3"),
    ],
)
def test_what_a_row_gets_does_not_depend_on_where_its_prompt_was_filled_in(
    pair, wanted, data, tensor, workers, places, tree
):
    """Nor how many drafts are kept."""
    parallel = dict(data_parallel_size=data, tensor_parallel_size=tensor, prefill_workers=workers)
    llm = LLM(*pair, tree=tree, max_batch_size=places, **parallel, **OPTIONS)
    outputs = llm.generate(*requests(), **QUIET)
    assert told(outputs) == told(wanted[tree])
    assert_same_logprobs(outputs, wanted[tree])
    assert {p.name for p in llm._decoder.programs} == {"insert", "decode"}
    assert {p.name for worker in llm._workers for p in worker.programs} == {"prefill"}
    with no_compilation():
        assert told(llm.generate(*requests(), **QUIET)) == told(outputs)


def test_fp8_caches_travel_with_their_scales_and_a_whole_head_to_every_device():
    """And so does the feature that it goes on from: this head's drafts depend on all of it."""
    target, head = wide_pair(num_kv_heads=2)  # repeated, four times
    options = dict(tree="chain-2", kv_cache_dtype="fp8", max_batch_size=2, **OPTIONS)
    prompts = [[5, 6, 7], [8], [9] * 20, [10, 11], [12] * 17]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = LLM(target, head, **options).generate(prompts, params, **QUIET)
    sizes = dict(tensor_parallel_size=4, prefill_workers=1, draft_sharding="replicated")
    assert told(LLM(target, head, **sizes, **options).generate(prompts, params, **QUIET)) == told(alone)


def test_under_trees_that_change_with_every_launch(pair, wanted, monkeypatch):
    """Prompts are filled in for the head while the decoder has dropped it."""
    plans = itertools.cycle(Dispatch(candidates=["chain-1", "chain-3"]).plans)

    def choose(self, setting, refilled):
        self._seat(setting, self.values(setting))
        return Choice(next(plans), 3)

    monkeypatch.setattr(Dispatcher, "choose", choose)
    dispatch = Dispatch(candidates=["chain-1", "chain-3"])
    llm = LLM(*pair, tree=dispatch, max_batch_size=3, prefill_workers=1, **OPTIONS)
    outputs = llm.generate(*requests(), **QUIET)
    assert [out.outputs[0].token_ids for out in outputs] == [out.outputs[0].token_ids for out in wanted["off"]]
    assert {name for out in outputs for name in out.metrics.rounds_by_tree} == {"off", "chain-1", "chain-3"}


def test_workers_begin_before_there_is_a_place(pair, monkeypatch):
    """What is launched comes after the next prompts have been begun with, a group at each worker."""
    told = []
    fill, launch = Decoder.fill, Decoder.launch

    def watched_fill(self, caches, prompts, *args, **kwargs):
        told.append(("fill", id(self), [len(p) for p in prompts]))
        return fill(self, caches, prompts, *args, **kwargs)

    def watched_launch(self, *args):
        told.append(("launch",))
        return launch(self, *args)

    monkeypatch.setattr(Decoder, "fill", watched_fill)
    monkeypatch.setattr(Decoder, "launch", watched_launch)
    llm = LLM(*pair, tree="off", max_batch_size=2, prefill_workers=2, **OPTIONS)
    prompts = [[3 + i] * (20 - i) for i in range(9)] + [[5]]  # the last has nothing to fill in
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    llm.generate(prompts, params, **QUIET)
    kinds = "".join(entry[0][0] for entry in told)
    assert re.fullmatch("fff*l+.*", kinds) and kinds.count("f") == 5  # nine prompts, two a group
    assert kinds.index("l") == 3  # of the first launch's rows, and of two more groups
    fills = [entry for entry in told if entry[0] == "fill"]
    assert [n for _, _, lengths in fills for n in lengths] == list(range(20, 11, -1))
    assert len({worker for _, worker, _ in fills}) == 2 and fills[0][1] == fills[2][1]


def test_groups_are_full(pair, monkeypatch):
    """Whoever is seated, as many wait for a worker side by side as can: little of a prefill is padding."""
    sizes = []
    begun = Prefill._begun
    monkeypatch.setattr(Prefill, "_begun", lambda self, prompts: sizes.append(len(prompts)) or begun(self, prompts))
    llm = LLM(*pair, tree="off", max_batch_size=4, prefill_workers=1, **OPTIONS)
    monkeypatch.setattr(serving, "FREE", 0.75)
    llm.generate([[3] * (2 + i % 9) for i in range(22)], SamplingParams(max_tokens=5, ignore_eos=True), **QUIET)
    assert sizes == [4] * 5 + [2]


def test_rows_of_an_abandoned_call_are_not_served_to_the_next(pair, monkeypatch):
    llm = LLM(*pair, tree="chain-2", max_batch_size=2, prefill_workers=1, **OPTIONS)
    prompts, params = requests()
    launch = Decoder.launch
    monkeypatch.setattr(Decoder, "launch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(prompts, params, **QUIET)
    monkeypatch.setattr(Decoder, "launch", launch)
    alone = LLM(*pair, tree="chain-2", **OPTIONS)
    some = prompts[4:7], params[4:7]
    assert told(llm.generate(*some, **QUIET)) == told(alone.generate(*some, **QUIET))


def test_prompts_in_another_order(pair):
    here, there = Layout(make_mesh(1, 1)), Layout(*worker_meshes(make_mesh(1, 1), 1))
    decoder, worker = (Decoder(*pair, page_size=PAGE, layout=layout) for layout in (here, there))
    program = Program(plan=parse_tree("chain-2"))
    prefill = Prefill(decoder, [worker], program, capacity=CAPACITY, chunk=16, rows=2)
    one, other = np.arange(3, 9), np.arange(4, 20)
    prefill.expect([one, other])
    caches = decoder.empty_caches(2, program, CAPACITY)
    with pytest.raises(ValueError, match="in the order in which they were expected"):
        prefill.fill(caches, [other, one], np.arange(2))


@pytest.mark.parametrize(("data", "kv_cache_dtype"), [(1, "float8_e4m3fn"), (4, None)])
def test_prompts_are_put_into_caches_in_place(data, kv_cache_dtype):
    """And where rows are split every device keeps its own: nothing is gathered."""
    target, head = wide_pair()
    layouts = [Layout(make_mesh(data, 1)), Layout(*worker_meshes(make_mesh(data, 1), 1))]
    dtype = None if kv_cache_dtype is None else np.dtype(kv_cache_dtype)
    decoder, worker = (Decoder(target, head, page_size=8, kv_cache_dtype=dtype, layout=layout) for layout in layouts)
    program, rng = Program(plan=parse_tree("chain-2")), np.random.default_rng(0)
    prompts = [rng.integers(3, 97, n).astype(np.int32) for n in (30, 9, 17, 1)]
    prefill = Prefill(decoder, [worker], program, capacity=256, chunk=16, rows=2)
    filled = prefill.fill(decoder.empty_caches(4, program, 256), prompts, np.arange(4))
    shapes = dict(attention="auto", chunk=16, rows=4)
    here = decoder.fill(decoder.empty_caches(4, program, 256), prompts, np.arange(4), **shapes)
    for a, b in zip(*map(jax.tree.leaves, (filled, here)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        if kv_cache_dtype is None:  # else a number between two of 8 bits may fall either way
            np.testing.assert_allclose(a, b, atol=1e-5)
    (compiled, *_) = [p.executable for p in decoder.programs if p.name == "insert"]
    caches = sum(x.nbytes for x in jax.tree.leaves((filled.target, filled.head)))
    memory, moved = compiled.memory_analysis(), caches // 16  # 2 rows of 4 pages, of 4 of 32
    assert memory.alias_size_in_bytes >= caches // data
    assert memory.temp_size_in_bytes < moved + 1024  # once more, laid out anew
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())


def test_streams(tmp_path):
    target, head = reciting_pair()
    checkpoint = save(target, tmp_path / "target", extra_files=tiny_tokenizer.tokenizer_files())
    llm = LLM(checkpoint, head, tree="chain-2", prefill_workers=1)
    params = SamplingParams(max_tokens=30)
    for prompt in ("abcdefgh", "a"):
        (out,) = llm.generate(prompt, params, **QUIET)
        assert "".join(llm.stream(prompt, params)) == out.outputs[0].text != ""
        assert out.metrics.tokens_per_call > 2


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (dict(prefill_workers=-1), "prefill_workers must be a whole number of at least 0, got -1"),
        (dict(prefill_workers=8), "8 prefill workers of 1 devices beside the 1 that decode need 9 devices"),
        (dict(prefill_workers=2, tensor_parallel_size=2, data_parallel_size=3), "beside the 6 that decode need 10"),
    ],
)
def test_too_few_devices_are_one_sentence(pair, sizes, said):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        LLM(*pair, **sizes)
    assert "\n" not in str(raised.value)


def test_several_processes_have_no_workers(monkeypatch):
    monkeypatch.setattr(sharding.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="leave prefill_workers at 0"):
        worker_meshes(make_mesh(1, 1), 1)
