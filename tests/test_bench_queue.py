"""``scripts/bench_queue.py``: both ways serve every request, and turns take no more rounds than batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_tokenizer
from reciter import reciting_pair

from jeagle.checkpoint_writer import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_queue


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("queue")
    target, _ = reciting_pair()
    save(target, directory / "target", extra_files=tiny_tokenizer.tokenizer_files())
    questions = [json.dumps(dict(question_id=i, category="c", turns=["abc"[: i % 3 + 1]])) for i in range(7)]
    (directory / "questions.jsonl").write_text("\n".join(questions))
    return [str(directory / "target"), "--prompts", str(directory / "questions.jsonl")]


def test_turns_and_batches(given, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "queue.json", tmp_path / "queue.png"
    options = ["--places", "1", "3", "--lengths", "2", "20", "--out", str(out), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["bench_queue.py", *given, *options])
    assert bench_queue.main() == 0 and picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text()) and result["script"] == "bench_queue"
    alone, three = result["runs"]
    for run in (alone, three):
        assert run["requests"] == run["equal_texts"] == 7
        assert run["ratio"]["median"] > 0 and run["tokens_per_call"] == 1.0
    assert alone["rounds"] == {"in turns": alone["tokens"], "in batches": alone["tokens"]}
    assert three["rounds"]["in turns"] < three["rounds"]["in batches"] < three["tokens"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--lengths", "9", "3"], "--lengths must be two numbers, the smaller first, got [9, 3]"),
        (["--places", "0"], "--places and --repeats must be at least 1"),
    ],
)
def test_wrong_options_are_one_sentence(given, wrong, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_queue.py", *given, *wrong])
    assert bench_queue.main() == 1
    assert capsys.readouterr().err == f"error: {said}\n"
