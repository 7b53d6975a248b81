"""What training data may share with evaluation questions: nothing. The committed data is looked through."""

from __future__ import annotations

from pathlib import Path

import pytest

from jeagle.text import load_tokenizer
from jeagle.training.documents import read_json_lines
from jeagle.training.overlap import overlapping, read_evaluation_prompts

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = sorted((ROOT / "scripts" / "prompts").glob("*.jsonl"))
TRAINING_DATA = sorted((ROOT / "scripts" / "data").glob("*.jsonl.gz"))
TOKEN_DATA = sorted((ROOT / "scripts" / "data").glob("*.jsonl.xz"))
# Said in 32 of the H100s' 72,704 answers to other questions, by a target that was not given these: counting, a sequence
# of Fibonacci's kind, what functions do, names.
PHRASES = (
    "a sequence of numbers in which each number is the sum of the",
    "are 1 2 3 4 5 6 7",
    "as input and returns the sum of the",
    "function that takes a string as input and returns the",
    "grid 1 2 3 4 5 6 7",
    "is not greater than or equal to the",
    "prove the pythagorean theorem",
    "that takes a string as an argument and returns a",
    "the hogwarts school of witchcraft and wizardry a",
    "this function will take a list of integers",
    "write a function that takes a string and returns",
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It says ONE two, three;\nfour five six seven eight!", ["one two three four five six seven eight"]),
        ("one two three four five six seven", []),  # seven words
        ("one two three four six five seven eight nine ten", []),
        (
            "two three four five six seven eight nine ten",
            ["two three four five six seven eight nine", "three four five six seven eight nine ten"],
        ),
        ("Now parallelize it, please", ["parallelize it"]),  # a shorter prompt, whole
        ("Now parallelize that", []),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9", []),  # counting
        ("\uff30arallelize  it \uff30ARALLELIZE it", ["parallelize it"]),  # full-width letters; named once
        ("", []),
    ],
)
def test_overlapping(text, found):
    prompts = ["One two three four five six seven eight nine ten.", "Parallelize it!", "1 2 3 4 5 6 7 8 9 10", ""]
    assert overlapping(["other words", text], prompts) == [(1, gram) for gram in found]


def test_planted_questions_are_found():
    """Every evaluation turn, in the middle of other words, is recognised."""
    turns = [turn for file in QUESTIONS for turn in read_evaluation_prompts(file)]
    assert len(QUESTIONS) == 3 and len(turns) == 320
    planted = [f"please {turn.upper()} thanks" for turn in turns]
    assert {index for index, _ in overlapping(planted, turns)} == set(range(len(turns)))


@pytest.mark.parametrize("file", TRAINING_DATA, ids=lambda path: path.name)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_no_evaluation_question_is_in_the_training_data(file, role):
    """Answers are held to the same rule, but for PHRASES: what is asked must not be learnt from them either."""
    turns = [turn for path in QUESTIONS for turn in read_evaluation_prompts(path)]
    said = [
        message["content"]
        for _, record in read_json_lines(file)
        for message in record["messages"]
        if message["role"] == role
    ]
    assert said
    found = overlapping(said, turns)
    assert role == "assistant" or not found
    assert [gram for _, gram in found if not any(gram in phrase for phrase in PHRASES)] == []


@pytest.mark.parametrize("file", TOKEN_DATA, ids=lambda path: path.name)
def test_no_evaluation_question_is_in_the_training_data_of_token_ids(file, smollm2_dir):
    """By the same rule: one turn each, and the answer after it."""
    turns = [turn for path in QUESTIONS for turn in read_evaluation_prompts(path)]
    documents = [(record["token_ids"], record["response"][0][0]) for _, record in read_json_lines(file)]
    assert len(documents) == {"smollm2-h100-2.jsonl.xz": 64_512, "smollm2-tasks.jsonl.xz": 2_432}[file.name]
    decode = load_tokenizer(smollm2_dir).batch_decode
    assert overlapping(decode([ids[:answer] for ids, answer in documents]), turns) == []
    found = overlapping(decode([ids[answer:] for ids, answer in documents]), turns)
    assert [gram for _, gram in found if not any(gram in phrase for phrase in PHRASES)] == []


def test_there_is_training_data():
    assert "smollm2-selfsynth.jsonl.gz" in {path.name for path in TRAINING_DATA} and TOKEN_DATA
