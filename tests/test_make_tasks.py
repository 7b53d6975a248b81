"""Prompts of many kinds: made the same by the same seed, and none of them an evaluation question."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jeagle.training.documents import read_json_lines
from jeagle.training.overlap import overlapping, read_evaluation_prompts
from jeagle.training.prompts import read_conversations

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ROOT / "scripts" / "data" / "smollm2-selfsynth.jsonl.gz"
sys.path.insert(0, str(ROOT / "scripts"))
import make_tasks  # noqa: E402


def make(out: Path, *arguments: str, count: int = 330) -> int:
    return make_tasks.main([str(out), "--count", str(count), "--passages", str(ANSWERS), *arguments])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_prompts_are_of_all_kinds_and_the_same_for_a_seed(tmp_path):
    one, same, other = (tmp_path / f"{name}.jsonl" for name in ("one", "same", "other"))
    assert (make(one), make(same), make(other, "--seed", "1")) == (0, 0, 0)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    records = [record for _, record in read_json_lines(one)]
    kinds = [record["kind"] for record in records]
    assert len(set(kinds)) == 11 and {kinds.count(kind) for kind in kinds} == {30}
    asked = [said["content"] for (said,) in read_conversations(one)]
    assert len(set(asked)) == len(asked) == 330
    assert all(text[0] == text[0].upper() and text == text.strip() for text in asked)


def test_every_template_and_every_entry_can_be_filled():
    with make_tasks.TASKS.open("rb") as file:
        tables = make_tasks.tomllib.load(file)
    rng, blanks = make_tasks.random.Random(0), {**tables["blanks"], "passage": ["A passage."]}
    for template in [t for part in (tables["templates"], tables["blanks"]) for texts in part.values() for t in texts]:
        assert "{" not in make_tasks.fill(template, blanks, rng).replace("{print $2}", "")


def test_none_is_near_an_evaluation_question(tmp_path):
    """So ``synthesize.py --exclude`` has nothing to drop."""
    assert make(tmp_path / "tasks.jsonl", count=3300) == 0
    asked = [said["content"] for (said,) in read_conversations(tmp_path / "tasks.jsonl")]
    turns = [t for file in (ROOT / "scripts" / "prompts").glob("*.jsonl") for t in read_evaluation_prompts(file)]
    assert overlapping(asked, turns) == []


def test_blanks_differ_within_a_prompt():
    rng = make_tasks.random.Random(0)
    for _ in range(20):
        assert set(make_tasks.fill("{name} {name} {name}", {"name": list("abc")}, rng).split()) == set("abc")
    assert make_tasks.fill("{3-3} {passage}", {"passage": ["{left} as it is"]}, rng) == "3 {left} as it is"


@pytest.mark.parametrize(
    ("tables", "count", "said"),
    [
        ('[templates]\na = ["{what}"]\n[blanks]\n', 1, "there is no list for the blank {what}"),
        ('[templates]\na = ["{what}"]\n[blanks]\nwhat = ["x", "y"]\n', 3, "a makes hardly more than 2 prompts"),
        ('[templates]\na = ["x"]\n[blanks]\nwhat = ["a {what}"]\n', 1, "what of [blanks] has the blank {what} itself"),
        ('[templates]\na = ["{b}"]\n[blanks]\nb = ["{c}"]\nc = ["{b}"]\n', 1, "have each other's blanks"),
        ('[templates]\na = "x"\n[blanks]\n', 1, "a of [templates] must be a list of texts"),
        ("[templates]\na = [3]\n[blanks]\n", 1, "a of [templates] must be a list of texts"),
        ('[templates]\na = ["{9-3}"]\n[blanks]\n', 1, "has {9-3}, of which the first must be the less"),
        ('[templates]\na = ["x"]\n[blanks]\n', 0, "--count must be at least 1, got 0"),
        ('[templates]\na = ["{what} {what}"]\n[blanks]\nwhat = ["x"]\n', 1, "has more blanks {what} than its list"),
        ("[templates\n", 1, "is not TOML"),
        ('[templates]\na = ["x"]\n', 1, "has no [blanks]"),
        ("[templates]\n[blanks]\n", 1, "has no [templates]"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, capsys, tables, count, said):
    path = write(tmp_path / "tables.toml", tables)
    assert make(tmp_path / "out.jsonl", "--tasks", str(path), count=count) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_passages(tmp_path):
    long = " ".join(["word"] * 50)
    answers = [f"{long}. {long}. {long}. {long}.", "Too short.", f"I think that {long}.", f"{long} without an end"]
    ask = {"role": "user", "content": "?"}
    lines = [json.dumps({"messages": [ask, {"role": "assistant", "content": text}]}) for text in answers]
    path = write(tmp_path / "answers.jsonl", "\n".join(lines))
    assert make_tasks.read_passages(path) == [f"{long}. {long}. {long}."]
    with pytest.raises(ValueError, match="no answer has 40 words in whole sentences"):
        make_tasks.read_passages(write(path, lines[1]))
    with pytest.raises(ValueError, match="line 1 is not"):
        make_tasks.read_passages(write(path, '{"messages": [{"role": "assistant"}]}'))
