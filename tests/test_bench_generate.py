"""``scripts/bench_generate.py``, ``bench_steady.py`` and ``bench_start.py`` on a tiny pair: figures known in advance,
the files they write, and one sentence per error."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import tiny_tokenizer
from reciter import make_head, reciting_pair

from jeagle import LLM, EagleConfig, costs
from jeagle.checkpoint_writer import save
from jeagle.tree_table import TreeTable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_generate
import bench_start
import bench_steady
import common
import measuring
import reporting
import search_tree


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("bench")
    target, head = reciting_pair()
    prompts = directory / "questions.jsonl"
    prompts.write_text("\n".join(json.dumps({"turns": [text]}) for text in ("ab", "again", "one more")))
    return {
        "target": str(save(target, directory / "target", extra_files=tiny_tokenizer.tokenizer_files())),
        "head": str(save(head, directory / "head")),
        "prompts": str(prompts),
    }


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script; returns its JSON, which it prints last and writes, and what it printed."""

    def run(script, *arguments: str) -> tuple[dict, str]:
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments, "--out", str(out)])
        code = script.main()
        printed, errors = capsys.readouterr()
        assert (code, [e for e in errors.splitlines() if e.startswith("error")]) == (0, [])
        result = json.loads(out.read_text())
        assert json.loads(printed.splitlines()[-1]) == result and result["script"] == script.__name__
        return result, printed

    return run


def test_search_tree(run, files, tmp_path, monkeypatch):
    """What it finds is what ``LLM`` reads beside a head. The head is always right, at any temperature."""
    monkeypatch.setattr(costs, "LAUNCHES", 1)
    options = ["--prompts", files["prompts"], "--temperature", "0", "1", "--batch", "1", "--capacity", "64"]
    options += ["--nodes", "3", "--depths", "2", "--ranks", "2", "--max-tokens", "40"]
    result, printed = run(search_tree, files["target"], files["head"], *options)
    assert "temperature 0, batch 1" in printed and "temperature 1, batch 1" in printed
    for found, sampled in ((result, False), (result["sampled"], True)):
        assert found["rate"][0][0] > 0.7 and found["temperature"] == sampled
        assert {row["tree"] for row in found["trees"]["1"]} == {"off", "chain-2+lookup"}
        assert found["candidates"] == ["chain-2+lookup"]
        assert [row["sampled"] for row in found["rounds"]] == [sampled] and "lookup-2" in found["rounds"][0]["seconds"]
    (tmp_path / "result.json").rename(tmp_path / "trees.json")
    table = TreeTable.of_head(tmp_path)
    assert table is not None and table.greedy.rates.rate_DC.tolist() == result["rate"]
    assert table.sampled.rates.lookup_share == result["sampled"]["lookup_share"]


@pytest.fixture(autouse=True)
def small_bandwidth(monkeypatch):
    """1 GB read is for machines that measure."""
    monkeypatch.setattr(bench_generate, "bandwidth", lambda: 1e9)


def test_generate(run, files, tmp_path):
    """A head that is always right: what a chain of 2 gives is known. Acceptance is forced to the same, and says so."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "generate.png"
    options = ["--draft", files["head"], "--prompts", files["prompts"], "--tree", "chain-2", "--batch", "2"]
    options += ["--max-tokens", "12", "--repeats", "2", "--phases", "--picture", str(picture)]
    result, printed = run(bench_generate, files["target"], *options, "--synthetic-acceptance", "1", "1")
    assert [(r["batch"], r["tree"]) for r in result["runs"]] == [(2, "plain"), (2, "chain-2")]
    for row in result["runs"]:
        speculative = row["tree"] == "chain-2"
        assert row["requests"] == row["equal_texts"] == 4
        assert row["tokens_per_call"] == (3 if speculative else 1)
        assert row["acceptance_per_position"] == ([1, 1] if speculative else [])
        assert row["synthetic_acceptance"] == ([1, 1] if speculative else None)
        assert set(row["ms_per_token_by_phase"]) == {"prefill", "verify", "draft", "outside"}
        assert row["ms_per_token"]["median"] <= row["ms_per_token"]["p99"] and row["share_of_floor"] > 0
        assert row["peak_memory_MB"] > 1
    assert result["runs"][0]["speedup"] == dict.fromkeys(common.spread([1]), 1)
    assert "SYNTHETIC ACCEPTANCE 1.000 1.000" in printed and "SYNTHETIC" in result["title"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_what_is_done(run, files, monkeypatch):
    compare = bench_generate.compare

    def until_batch_2(*args):
        if args[-2] == 2:
            raise KeyboardInterrupt
        return compare(*args)

    monkeypatch.setattr(bench_generate, "compare", until_batch_2)
    options = ["--random-lengths", "4", "9", "--max-tokens", "4", "--repeats", "1", "--requests", "3", "--batch"]
    result, _ = run(bench_generate, files["target"], "--draft", files["head"], "--tree", "chain-1", *options, "1", "2")
    assert [(r["batch"], r["tree"], r["requests"]) for r in result["runs"]] == [(1, "plain", 3), (1, "chain-1", 3)]
    assert all(row["share_of_floor"] > 0 for row in result["runs"]) and result["interrupted"]


def test_trees_that_lost_are_dropped_from_larger_batches():
    speed = {("plain", 4): 1.0, ("chain-1", 4): 0.9, ("chain-3", 4): 0.5, ("dispatch", 4): 0.5, ("chain-5", 8): 0.2}
    rows = [dict(tree=t, batch=b, temperature=0.0, speedup=dict(median=s)) for (t, b), s in speed.items()]
    assert bench_generate.too_slow(rows, 0.6, 8, 0.0) == {"chain-3"}
    assert bench_generate.too_slow(rows, 0.0, 8, 0.0) == bench_generate.too_slow(rows, 0.6, 8, 1.0) == set()


def test_a_killed_run_goes_on(tmp_path):
    path, nothing = tmp_path / "generate.json", dict(runs=[], continued_from=None)
    assert bench_generate.cut_short(path, "this") == nothing
    common.write_result(path, dict(command="this", commit="abc", runs=[1]))
    assert bench_generate.cut_short(path, "this") == dict(runs=[1], continued_from="abc")
    assert bench_generate.cut_short(path, "that") == nothing
    common.write_result(path, dict(command="this", commit="abc", runs=[1], bandwidth_GBps=1.0))
    assert bench_generate.cut_short(path, "this") == nothing  # it has ended: measured anew


def test_prompts_and_profiles(files):
    given = argparse.Namespace(
        random_lengths=(3, 9), batch=[2, 4], repeats=5, requests=0, seed=1, synthetic_acceptance=[2.8]
    )
    prompts = bench_generate.read_prompts(given, None, 50)
    assert len(prompts) == 20 and {len(p) for p in prompts} == set(range(3, 10)) and max(map(max, prompts)) < 50
    assert sum(np.cumprod(bench_generate.read_profile(given))) == pytest.approx(1.8)
    assert reporting.synthetic_note(None) == ""
    asked = argparse.Namespace(random_lengths=None, prompts=[files["prompts"]], limit=2)
    assert len(bench_generate.read_prompts(asked, Path(files["target"]), 50)) == 2
    with pytest.raises(ValueError, match="--shape has no tokenizer"):
        bench_generate.read_prompts(asked, None, 50)


def test_steady(run, files):
    options = ["--short", "8", "--long", "60", "--repeats", "1", "--requests", "8", "--request-tokens", "4"]
    result, printed = run(bench_steady, files["target"], "--prompt", "ab", *options)
    assert set(result["runs"]) == {"plain"} and "long / short" in printed
    found = result["runs"]["plain"]
    assert 0 < found["host"]["host_share"] <= 1 and found["host"]["tokens"] == 8
    assert found["length"]["ratio"]["median"] > 0 and found["memory"]["last_MB"] > 1
    assert len(found["memory"]["held_MB"]) == 8 and max(found["memory"]["held_MB"]) > 1
    llm = LLM(files["target"])
    said = llm.apply_chat_template([dict(role="user", content="ab")])
    assert (result["prompt"], result["prompt_tokens"]) == ("ab", len(said))
    assert bench_steady.read_prompt(llm, "ab") == said and len(bench_steady.read_prompt(llm, None)) == 100


def test_start(run, files, monkeypatch):
    """The run that fills the cache is here the one that counts, too: a process takes seconds."""
    began: list[dict] = []
    start = bench_start.start
    monkeypatch.setattr(bench_start, "start", lambda *given: began[0] if began else began.append(start(*given)))
    result, printed = run(bench_start, files["target"], "--repeats", "1", "--max-tokens", "60")
    assert list(result["phases"]) == list(bench_start.PHASES) and result["cold"] is None
    total = sum(found["median"] for found in result["phases"].values())
    assert result["seconds"]["median"] == pytest.approx(total) and total > 0.5
    assert all(found["median"] >= 0 for found in result["phases"].values()) and "warm, median" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL", "--prompts", "none.jsonl"], "none.jsonl does not exist"),
        (["--prompts", "FILE"], "give a model or --shape"),
        (["MODEL", "--random-lengths", "9", "3"], "--random-lengths must be two whole numbers"),
        (["MODEL", "--prompts", "FILE", "--tree", "oak"], "tree 'oak' is unknown"),
        (["MODEL", "--prompts", "FILE", "--batch", "0"], "must be at least 1"),
        (["MODEL", "--prompts", "FILE", "--synthetic-acceptance", "5"], "a chain of 3 emits 1 to 4 tokens per call"),
        (["MODEL", "--prompts", "FILE", "--out", "no/where.json"], "no/where.json cannot be written"),
    ],
)
def test_refused(files, monkeypatch, capsys, options, message):
    given = [{"MODEL": files["target"], "FILE": files["prompts"]}.get(o, o) for o in options]
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *given])
    assert bench_generate.main() == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_bytes_read():
    """Tied weights are read whole, an untied embedding by the row; a borrowed LM head is read with the head."""
    for tied in (True, False):
        target = helpers.tiny_llama(tie_embeddings=tied)
        table = 4 * target.config.width * target.config.vocab_size
        assert measuring.target_bytes(target) == 4 * target.config.num_parameters - (0 if tied else table)
    configs = (EagleConfig.for_target(target.config, "eagle3", own_lm_head=own) for own in (True, False))
    own, borrowed = map(make_head, configs)
    assert measuring.head_bytes(own, target) == measuring.head_bytes(borrowed, target)
