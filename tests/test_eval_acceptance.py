"""``scripts/eval_acceptance.py`` and what it shares in ``scripts/common.py``: figures that are known in advance or that
``LLM`` gives, the files it writes, and one sentence per error."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from reciter import RECITED, TEXT, save_pairs

from jeagle import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import common
import eval_acceptance

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["ab", "again"]},
    {"question_id": "q", "category": "math", "turns": ["1 + 1", "and?"], "reference": ["2"]},
    {"question_id": 83, "category": "writing", "turns": ["ab"]},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The checkpoints of ``save_pairs`` and a file of questions."""
    directory = tmp_path_factory.mktemp("acceptance")
    prompts = directory / "questions.jsonl"
    prompts.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return {name: str(path) for name, path in save_pairs(directory).items()} | {"prompts": str(prompts)}


@pytest.fixture
def evaluate(files, monkeypatch, tmp_path, capsys):
    """Runs the command on a pair; returns its JSON and what it printed."""

    def run(pair: str, *options: str) -> tuple[dict, str]:
        out = tmp_path / "result.json"
        arguments = [files[pair], files[f"{pair}-head"], "--prompts", files["prompts"], "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", ["eval_acceptance.py", *arguments])
        code = eval_acceptance.main()
        printed, errors = capsys.readouterr()
        assert (code, errors) == (0, "")
        return json.loads(out.read_text()), printed

    return run


def test_figures_known_in_advance(evaluate, files, tmp_path):
    """A head that is always right: every round keeps all, but the one that EOS cuts."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "result.png"
    result, printed = evaluate("reciter", "--tree", "chain-2", "off", "--max-tokens", "99", "--picture", str(picture))
    rounds, left = -(-len(RECITED) // 3), len(RECITED) % 3
    assert left == 2  # EOS comes with one draft token kept
    chain, off = result["runs"]
    assert chain["whole"] == dict(
        answers=3,
        rounds=3 * rounds,
        tokens=3 * len(RECITED),
        tokens_per_call=len(RECITED) / rounds,
        acceptance_per_position=[1.0, 1 - 1 / rounds],
        acceptance_histogram=[0, 3, 3 * (rounds - 1)],
        lookup_histogram=[0, 0, 0],
        repeated=off["whole"]["repeated"],
    )
    assert {c: row["answers"] for c, row in chain["categories"].items()} == {"writing": 2, "math": 1}
    assert 0 <= off["whole"]["repeated"] < 1
    assert off["whole"]["tokens_per_call"] == 1 and off["whole"]["acceptance_histogram"] == [3 * len(RECITED)]
    assert (chain["tree"], chain["nodes"], chain["depth"], chain["temperature"]) == ("chain-2", 3, 2, 0)
    expected = dict(script="eval_acceptance", model=files["reciter"], head=files["reciter-head"], dtype="float32")
    expected |= dict(batch=8, max_tokens=99, seed=0, turns="first", tensor_parallel_size=1, data_parallel_size=1)
    assert result == {**expected, **{key: result[key] for key in common.environment()}, "runs": [chain, off]}
    assert result["command"].startswith("python scripts/eval_acceptance.py ")
    assert f"{len(RECITED) / rounds:.2f}" in printed and "questions, temperature 0, chain-2" in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_repeated():
    assert eval_acceptance.repeated([1, 2, 3], [1, 2, 3]) == 1
    assert eval_acceptance.repeated([], [7, 7, 7, 7, 7]) == 2  # the first pair has not been seen
    assert eval_acceptance.repeated([1, 2, 3, 1, 2, 4], [1, 2, 3, 9, 1, 2, 3]) == 1  # the last time counts
    assert eval_acceptance.repeated([5, 6, 5, 6, 5, 6], [1]) == 0


def test_totals_are_those_of_the_metrics(evaluate, files):
    """The counts of ``LLM``'s metrics added up, and their ratio."""
    options = ["--tree", "chain-2", "--temperature", "0", "1", "--max-tokens", "20", "--dtype", "float32"]
    result, _ = evaluate("random", *options)
    greedy, sampled = result["runs"]
    assert (greedy["temperature"], sampled["temperature"]) == (0, 1)
    llm = LLM(files["random"], files["random-head"], tree="chain-2")
    talks = [[{"role": "user", "content": q["turns"][0]}] for q in QUESTIONS]
    outputs = llm.chat(talks, SamplingParams(max_tokens=20), use_tqdm=False)
    for row, chosen in [(greedy["whole"], outputs), (greedy["categories"]["writing"], outputs[::2])]:
        metrics = [o.metrics for o in chosen]
        assert row["tokens"] == sum(m.num_emitted for m in metrics) == sum(len(o.outputs[0].token_ids) for o in chosen)
        assert row["rounds"] == sum(m.num_rounds for m in metrics) == sum(row["acceptance_histogram"])
        assert row["tokens_per_call"] == row["tokens"] / row["rounds"]
        assert row["tokens_per_call"] == pytest.approx(1 + sum(row["acceptance_per_position"]))


def test_seeds_and_turns(files):
    """Equal questions get their own samples, another --seed others; the second turn follows the model's answer."""

    def converse(pair: str, questions: list[common.Question], temperature: float, **changed):
        options = dict(all_turns=False, max_tokens=40, seed=0, speed=False) | changed
        return eval_acceptance.converse(llms[pair], questions, temperature, argparse.Namespace(**options))

    llms = {pair: LLM(files[pair], files[f"{pair}-head"], tree="chain-2") for pair in ("random", "reciter")}

    questions = common.load_questions(files["prompts"])
    first, _, third = samples = [a.speculative.outputs[0].token_ids for a in converse("random", questions, 1.0)]
    assert first != third
    assert [a.speculative.outputs[0].token_ids for a in converse("random", questions[2:], 1.0)] == [third]
    assert [a.speculative.outputs[0].token_ids for a in converse("random", questions, 1.0, seed=1)] != samples

    prompts = [a.speculative.prompt_token_ids for a in converse("reciter", questions, 0.0, all_turns=True)]
    assert len(prompts) == 5
    talk = [("user", "ab"), ("assistant", TEXT), ("user", "again")]
    assert prompts[3] == llms["reciter"].apply_chat_template([{"role": role, "content": text} for role, text in talk])


def test_speed(evaluate):
    result, printed = evaluate("reciter", "--speed", "--all-turns", "--tree", "chain-2", "--max-tokens", "40")
    (run,) = result["runs"]
    assert (result["batch"], result["turns"], run["whole"]["answers"]) == (1, "all", 5)
    speed = run["speed"]
    assert speed["equal_answers"] == 5 and "5 of 5 answers equal" in printed
    assert speed["plain_tokens_per_second"] > 0 and speed["speculative_tokens_per_second"] > 0
    for name in ("speedup", "speedup_without_prefill"):
        assert 0 < speed[name]["min"] <= speed[name]["median"] <= speed[name]["max"]


def test_answers_that_differ_are_an_error(files, monkeypatch, capsys):
    generate = LLM.generate

    def forgetful(self, prompts, params, *, speculative=True, **options):
        shorter = params if speculative else SamplingParams(max_tokens=params.max_tokens - 1)
        return generate(self, prompts, shorter, speculative=speculative, **options)

    monkeypatch.setattr(LLM, "generate", forgetful)
    arguments = [files["reciter"], files["reciter-head"], "--prompts", files["prompts"]]
    arguments += ["--speed", "--tree", "chain-2", "--max-tokens", "9"]
    monkeypatch.setattr(sys, "argv", ["eval_acceptance.py", *arguments])
    assert eval_acceptance.main() == 1
    assert "differ in float32: questions, temperature 0, chain-2\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "none.jsonl"], "none.jsonl does not exist"),
        (["--prompts", "."], "cannot read ."),
        (["--tree", "chain-2", "oak"], "tree 'oak' is unknown"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or a positive number, got -1.0"),
        (["--max-tokens", "0"], "max_tokens must be a whole number of at least 1, got 0"),
        (["--batch", "0"], "max_batch_size must be a whole number of at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--out", "no/where.json"], "no/where.json cannot be written: no is not a directory"),
        (["--picture", "acceptance.doc"], "--picture acceptance.doc must end in one of ."),
        ([], "made for a target of width 64; this one has 32"),
        (["--max-tokens", "255"], "together they exceed the limit of 256 positions"),
    ],
)
def test_refused(files, monkeypatch, capsys, options, message):
    if "--picture" in options:
        pytest.importorskip("matplotlib")
    head = files["random-head" if "255" in options else "reciter-head"]
    monkeypatch.setattr(sys, "argv", ["eval", files["random"], head, "--prompts", files["prompts"], *options])
    assert eval_acceptance.main() == 1
    printed, errors = capsys.readouterr()
    assert not printed and errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_questions_of_both_forms(tmp_path):
    path = tmp_path / "mixed.jsonl"
    messages = [("system", "recite"), ("user", "one"), ("assistant", "thrown away"), ("user", "two\u2028lines")]
    shared = [("system", "be"), ("human", "four"), ("gpt", "thrown away"), ("human", "five")]
    lines = [
        {"messages": [{"role": role, "content": text} for role, text in messages]},
        {"turns": ["three"], "category": "math", "question_id": 7, "system": "count"},
        {"id": "s", "conversations": [{"from": who, "value": text} for who, text in shared]},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert common.load_questions(path) == [
        common.Question(1, 1, "mixed", ("one", "two\u2028lines"), "recite"),
        common.Question(3, 7, "math", ("three",), "count"),
        common.Question(5, 5, "mixed", ("four", "five"), "be"),
    ]
    path.write_text("\n".join(json.dumps({"turns": [str(i)]}) for i in range(10)))
    assert [q.line - 1 for q in common.load_questions(path, 3)] == [0, 3, 6]
    assert len(common.load_questions(path, 99)) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.jsonl holds no questions"),
        (" \n\n", "bad.jsonl holds no questions"),
        ('{"turns": ["a"]}\n{"turns": ["a"', "bad.jsonl, line 2 is not JSON: Expecting"),
        ("[1]", 'bad.jsonl, line 1 needs "turns"'),
        ('{"turns": []}', 'line 1 needs "turns"'),
        ('{"turns": "a"}', 'line 1 needs "turns"'),
        ('{"turns": ["a", 5]}', 'line 1 needs "turns"'),
        ('{"messages": ["a"]}', 'line 1 needs "turns"'),
        ('{"conversations": [{"from": "gpt", "value": "a"}]}', 'line 1 needs "turns"'),
        ('{"conversations": "a"}', 'line 1 needs "turns"'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', 'line 1 needs "turns"'),
        ('{"messages": [{"role": "system", "content": 1}, {"role": "user", "content": "a"}]}', 'line 1 needs "turns"'),
        (b"\xff", "cannot read"),
    ],
)
def test_refused_questions(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as refused:
        common.load_questions(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/bench.py", "--model", "a b"])
    here = common.environment()
    assert here["command"] == "python scripts/bench.py --model 'a b'"
    assert (
        set(here) == {"command", "device", "jax", "versions", "commit", "load_average"} and "cores)" in here["device"]
    )
    monkeypatch.setenv("PATH", "")
    assert common.environment()["commit"] is None
