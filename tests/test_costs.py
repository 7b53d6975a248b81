"""What rounds take: tables, their files, and how they come about."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from test_dispatch import CHAIN_1, CHAIN_3, TABLE, make_llm
from test_exactness import markov_head, markov_target

from jeagle import SamplingParams, costs, dispatch
from jeagle.costs import Setting, load_costs, modelled_costs, monotone, save_costs
from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.devices import DEVICES
from jeagle.dispatch import Dispatch
from jeagle.floor import Job
from jeagle.footprint import Split
from jeagle.sizes import head_for, size
from jeagle.tree import OFF, parse_tree


def test_monotone() -> None:
    np.testing.assert_allclose(monotone(np.array([[1], [2], [3]]), np.array([5.0, 4.0, 6.0])), [4.5, 4.5, 6.0])
    rng = np.random.default_rng(0)
    sizes, value = rng.integers(0, 4, (40, 3)), rng.random(40)
    smooth = monotone(sizes, value)
    for i, j in itertools.permutations(range(40), 2):
        if (sizes[i] <= sizes[j]).all():
            assert smooth[i] <= smooth[j]
    np.testing.assert_array_equal(monotone(sizes, smooth), smooth)


def test_a_table_outlives_its_file(tmp_path) -> None:
    save_costs(tmp_path / "new" / "costs.json", TABLE, dict(device="cpu"))
    assert load_costs(tmp_path / "new" / "costs.json") == TABLE
    assert TABLE.seconds(Setting(1, 256, False))[CHAIN_3] == 0.014
    assert TABLE.nearest(Setting(24, 4096, True)) == Setting(32, 256, False)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rounds": []}', '{"rounds": [{"batch": 1}]}', "missing"])
def test_a_file_that_is_no_table(tmp_path, text: str) -> None:
    path = tmp_path / "costs.json"
    if text != "missing":
        path.write_text(text)
    with pytest.raises(ValueError, match=r"is not a cost table .*; remove it|does not exist") as error:
        load_costs(path)
    assert "\n" not in str(error.value)


def test_modelled_costs_count_experts() -> None:
    """More rows and more nodes ask for more of Maverick's experts, so a tree costs relatively more than on a dense
    model of memory-bound rounds."""

    def ratios(model: str) -> list[float]:
        target = size(model)
        head = head_for(target, "eagle3")[0]
        split = Split(tensor=8)
        job = Job(name=model, target=target, head=head, device=DEVICES["h100"], split=split, context=4096, tree=CHAIN_3)
        table = modelled_costs(job, (OFF, CHAIN_3), (1, 8))
        return [row[CHAIN_3] / row[OFF] for row in table.rounds.values()]

    dense, routed = ratios("llama-3.3-70b"), ratios("llama-4-maverick")
    assert all(1 < of_dense < of_experts for of_dense, of_experts in zip(dense, routed, strict=True))


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch, caplog) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    tree = Dispatch(candidates=["chain-1"])
    first = make_llm(tmp_path, tree=tree).generate([[1, 2]], params, use_tqdm=False)
    (path,) = (tmp_path / "costs").glob("*.json")
    (row,) = json.loads(path.read_text())["rounds"]
    assert row["batch"] == 1
    assert set(row["seconds"]) == {"off", "chain-1"}
    assert 0 < row["seconds"]["off"] <= 10

    measured = []
    monkeypatch.setattr(dispatch, "measure_rounds", lambda *args: measured.append(args) or {OFF: 1.0, CHAIN_1: 9.0})
    second = make_llm(tmp_path, tree=tree)
    assert second.generate([[1, 2]], params, use_tqdm=False)[0].outputs == first[0].outputs
    assert not measured
    path.write_text("{")
    third = make_llm(tmp_path, tree=tree)
    (out,) = third.generate([[1, 2]], params, use_tqdm=False)
    assert len(measured) == 1
    assert "is not a cost table" in caplog.text
    assert out.metrics.rounds_by_tree == {"off": 12}
    assert load_costs(path).rounds == {Setting(1, 256, False): {OFF: 1.0, CHAIN_1: 9.0}}


def test_costs_that_cannot_be_kept_are_measured_and_said(tmp_path, monkeypatch, caplog) -> None:
    """The cache directory is read only, or its disk full: that is no reason to fail a request."""
    monkeypatch.setattr(dispatch, "measure_rounds", lambda *args: {OFF: 1.0, CHAIN_1: 9.0})
    (tmp_path / "costs").write_text("in the way")
    llm = make_llm(tmp_path, tree=Dispatch(candidates=["chain-1"]))
    (out,) = llm.generate([[1, 2]], SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert out.metrics.rounds_by_tree == {"off": 12}
    assert "cannot be written" in caplog.text


def test_costs_that_another_process_has_measured_meanwhile_are_kept(tmp_path, monkeypatch) -> None:
    def measure(decoder, program, plans, setting):
        if setting.batch == 1:
            generate([[1], [2]])
        return dict.fromkeys(plans, float(setting.batch))

    def generate(prompts):
        llm = make_llm(tmp_path, tree=Dispatch(candidates=["chain-1"]))
        llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)

    monkeypatch.setattr(dispatch, "measure_rounds", measure)
    generate([[1]])
    (path,) = (tmp_path / "costs").glob("*.json")
    assert {setting.batch for setting in load_costs(path).rounds} == {1, 2}


def test_filters_have_costs_of_their_own(tmp_path, monkeypatch) -> None:
    """A top-p program searches the vocabulary for every node."""
    measured = []

    def measure(decoder, program, plans, setting):
        measured.append((setting.sampled, setting.filtered, program.filters.top_p))
        return dict.fromkeys(plans, 1.0)

    monkeypatch.setattr(dispatch, "measure_rounds", measure)
    llm = make_llm(tmp_path, tree=Dispatch(candidates=["chain-1"]))
    for _ in range(2):
        for options in (dict(temperature=0.0), dict(temperature=1.0), dict(temperature=1.0, top_p=0.9)):
            llm.generate([[1, 2]], SamplingParams(max_tokens=2, seed=1, **options), use_tqdm=False)
    assert measured == [(False, False, False), (True, False, False), (True, True, True)]
    (path,) = (tmp_path / "costs").glob("*.json")
    assert len(load_costs(path).rounds) == 3


def test_measured_rounds_look_nothing_up(monkeypatch) -> None:
    """The measured text is all zeros: lookups would find something in every round, and no head would be timed."""
    monkeypatch.setattr(costs, "ENOUGH", 0.01)
    target = markov_target()
    looked, launch = [], Decoder.launch

    def watched(self, *args):
        state = launch(self, *args)
        looked.append(int(np.asarray(state.looked_BP).sum()))
        return state

    monkeypatch.setattr(Decoder, "launch", watched)
    plan = parse_tree("chain-1+lookup")
    decoder = Decoder(target, markov_head(target), page_size=16)
    assert costs.measure_rounds(decoder, Program(), [plan], Setting(2, 64, False))[plan] > 0
    assert len(looked) == 2 + costs.LAUNCHES and not any(looked)
