"""What tests of self-synthesis share: a target that answers everything with ``TEXT``, and a small run.

The target is the reciter of ``reciter.py``: greedy, it answers everything with ``TEXT``; at temperature 1 one token in
twelve is another one, so that its user turns differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_tokenizer
from reciter import reciting_pair

from jeagle import LLM
from jeagle.checkpoint_writer import save
from jeagle.training.documents import read_json_lines
from jeagle.training.synthesis import Settings, synthesize

__all__ = ["SMALL", "checkpoints", "contents", "conversation", "lines_of", "llm", "run", "write_lines"]

SMALL = dict(documents=10, shard_size=4, seed=5, max_user_tokens=70, max_answer_tokens=40)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("synthesis")
    target, head = reciting_pair()
    return save(target, directory / "reciter", extra_files=tiny_tokenizer.tokenizer_files()), save(
        head, directory / "head"
    )


@pytest.fixture(scope="module")
def llm(checkpoints) -> LLM:
    return LLM(*checkpoints, tree="chain-2", max_batch_size=4, prefill_chunk=64)


def run(llm: LLM, out: Path, *, prompts=None, texts=None, exclude=(), head="head", **settings) -> dict:
    return synthesize(
        llm,
        out,
        Settings(**(SMALL | settings)),
        prompts=prompts,
        texts=texts,
        exclude=exclude,
        head=head,
        use_tqdm=False,
    )


def lines_of(out: Path) -> list[dict]:
    return [record for file in sorted(out.glob("shard-*.jsonl.gz")) for _, record in read_json_lines(file)]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def conversation(*turns: str) -> dict:
    return {"messages": [{"role": "user", "content": turn} for turn in turns]}
