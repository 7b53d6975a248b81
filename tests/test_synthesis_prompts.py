"""Self-synthesis from given prompts and texts: what is answered, continued, cut, dropped, and known as a repeat."""

# ruff: noqa: F811 - fixtures of synthesizing.py are imported, and arguments by the same names

from __future__ import annotations

import hashlib
from datetime import date

import pytest
from reciter import RECITED, TEXT
from synthesizing import checkpoints, contents, conversation, lines_of, llm, run, write_lines  # noqa: F401
from tiny_tokenizer import EOS, SPECIALS, VOCAB_SIZE

from jeagle.text import encode
from jeagle.training.documents import DataError, read_documents
from jeagle.training.overlap import overlapping, read_evaluation_prompts
from jeagle.training.prompts import around_user_turn

USER, ASSISTANT, END = (SPECIALS.index(f"<|{name}|>") for name in ("user", "assistant", "end"))


def test_answers_to_prompts(llm, tmp_path):
    """Answers in the file are left out; each turn is answered in the context of the target's own answers."""
    system = {"role": "system", "content": "Be brief."}
    old = {"role": "assistant", "content": "an answer of someone else"}
    first, second = conversation("one", "two")["messages"]
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        {"messages": [system, first, old, second, old]},
        {"question_id": 1, "category": "math", "turns": ["three"]},
        {"question_id": 2, "turns": ["three"], "system": "Be brief."},
    )
    manifest = run(llm, tmp_path / "out", prompts=prompts, temperatures=(0.0,))
    assert manifest["documents"] == 3  # all there are
    talk, question, told = lines_of(tmp_path / "out")
    said = {"role": "assistant", "content": TEXT}
    assert talk["messages"] == [system, first, said, second, said]
    assert question["messages"] == [{"role": "user", "content": "three"}, said]
    assert told["messages"] == [system, {"role": "user", "content": "three"}, said]

    tokenizer = llm.tokenizer

    def ids(text: str) -> list[int]:
        return encode(tokenizer, text, add_special_tokens=False)

    opening = ids("<s><|system|>Be brief.<|end|><|user|>one<|end|><|assistant|>")
    between = ids("<|end|><|user|>two<|end|><|assistant|>")
    assert talk["token_ids"] == [*opening, *RECITED, *between, *RECITED]
    a, b = len(opening), len(opening) + len(RECITED)
    assert talk["response"] == [[a, b], [b + len(between), len(talk["token_ids"])]]
    assert talk["finish"] == question["finish"] == "stop"


def test_no_date_but_one(llm, tmp_path, monkeypatch):
    """A template that prints the date, told another way than today's: a run may last past midnight."""
    dated = """{{ strftime_now("%d %b %Y") }}""" + llm.tokenizer.chat_template
    monkeypatch.setattr(llm.tokenizer, "chat_template", dated)
    prompts = write_lines(tmp_path / "prompts.jsonl", conversation("one", "two"))
    run(llm, tmp_path / "out", prompts=prompts, temperatures=(0.0,))
    (record,) = lines_of(tmp_path / "out")
    again = write_lines(tmp_path / "talk.jsonl", {"messages": record["messages"][:2]})
    (document,) = read_documents([again], llm.tokenizer, vocab_size=VOCAB_SIZE, end_of_turn=EOS)
    for ids in (record["token_ids"], document.token_n.tolist()):
        assert llm.tokenizer.decode(ids).startswith("26 Jul 2024")
        assert llm.tokenizer.decode(ids).count("2024") == 1
    (before, _), today = around_user_turn(llm.tokenizer), llm.apply_chat_template(record["messages"][:1])
    assert llm.tokenizer.decode(before).startswith("26 Jul 2024")
    assert llm.tokenizer.decode(today).startswith(date.today().strftime("%d %b %Y"))


def test_a_cut_answer_ends_the_conversation(llm, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", conversation("one", "two"))
    run(llm, tmp_path / "out", prompts=prompts, temperatures=(0.0,), max_answer_tokens=5)
    (record,) = lines_of(tmp_path / "out")
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
    assert record["finish"] == "length" and record["token_ids"][-5:] == RECITED[:5]


def test_what_is_dropped(llm, tmp_path):
    question = "How many legs have seven spiders and nine beetles together, please?"
    exclude = write_lines(tmp_path / "evaluation.jsonl", {"turns": [question, "Why?"]})
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        conversation("A preamble that many prompts share. " * 3 + "One."),
        conversation("A preamble that many prompts share. " * 3 + "Two."),
        conversation("a preamble  that many prompts share. " * 3 + "one."),
        conversation("  "),
        conversation("x" * 230),
        conversation("So: how many LEGS have seven spiders and nine beetles?"),
        conversation("Tell me", "why?"),
        conversation("How many legs have seven spiders and nine?"),
        conversation("How many legs have seven spiders?"),
        {"messages": [{"role": "system", "content": "Be brief."}, *conversation("How many legs?")["messages"]]},
        {"messages": [{"role": "system", "content": "Be long."}, *conversation("How many legs?")["messages"]]},
    )
    manifest = run(llm, tmp_path / "out", prompts=prompts, exclude=[exclude])
    assert manifest["documents"] == 5
    assert manifest["dropped"] == {"duplicate": 1, "empty": 1, "long": 1, "overlap": 3}
    assert manifest["exclude"]["files"] == [
        {"file": "evaluation.jsonl", "sha256": hashlib.sha256(exclude.read_bytes()).hexdigest()}
    ]
    kept = [record["messages"][0]["content"] for record in lines_of(tmp_path / "out")]
    assert [text[-5:] for text in kept] == [" One.", " Two.", "ders?", "rief.", "long."]
    assert not overlapping(kept, read_evaluation_prompts(exclude))
    with pytest.raises(DataError, match=r"no line is of use \(overlap 1\)"):
        run(llm, tmp_path / "other", prompts=exclude, exclude=[exclude])


def test_repeats_are_known_across_shards_and_runs(llm, tmp_path, monkeypatch):
    out = tmp_path / "out"
    turns = ["Tell me of cats", "Tell me of dogs", "tell me of  cats", "Tell me of ants"]
    prompts = write_lines(tmp_path / "prompts.jsonl", *map(conversation, turns))
    run(llm, out, prompts=prompts, shard_size=1)
    assert [record["index"] for record in lines_of(out)] == [0, 1, 3]
    full = contents(out)
    (out / "shard-00001.jsonl.gz").unlink()
    run(llm, out, prompts=prompts, shard_size=1)
    assert contents(out) == full


def test_texts_continued(llm, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "xyz" * 9}, {"text": "ab"}, {"text": ""})
    manifest = run(llm, tmp_path / "out", texts=texts, temperatures=(0.0,), prompt_tokens=7)
    assert manifest["dropped"] == {"empty": 1}
    long, short = lines_of(tmp_path / "out")
    assert long["text"] == "xyzxyz" + TEXT and short["text"] == TEXT
    assert long["token_ids"] == [*encode(llm.tokenizer, "xyzxyz"), *RECITED] and long["response"] == [
        [7, 7 + len(RECITED)]
    ]
    assert short["response"] == [[3, len(RECITED) + 1]] and "messages" not in short
