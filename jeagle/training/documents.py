"""Documents: texts that the target wrote, as token ids with a mask of what it said in answer.

Three forms of JSON lines (plain, gzip or xz), told apart by their fields::

    {"token_ids": [...], "response": [[start, stop], ...]}     what jeagle/training/writer.py writes
    {"messages": [{"role": ..., "content": ...}, ...]}         conversations, through the tokenizer's chat template
    {"text": "..."}                                            plain text, all of it response

A conversation whose ``finish`` is "length" was cut off, so no end-of-turn token belongs after its last answer.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.text import REFERENCE_DATE, Tokenizer, encode, encode_chat

__all__ = ["DataError", "Document", "fingerprint", "read_documents", "read_json_lines"]


class DataError(ValueError):
    """Training data that cannot be used, said in one sentence that names the file and the mend."""


@dataclass(frozen=True)
class Document:
    token_n: np.ndarray  # int32
    response_n: np.ndarray  # bool: the tokens that the target wrote as an answer, end of turn included
    temperature: float | None = None  # at which it did, where the file says so
    rewritten: int = 0  # answers not learnt to their end, as the chat template writes them otherwise in later turns
    place: str = ""  # file and line

    def __len__(self) -> int:
        return len(self.token_n)


def read_documents(
    files: Sequence[str | Path], tokenizer: Tokenizer, *, vocab_size: int, end_of_turn: int
) -> list[Document]:
    """All documents of ``files``, in order. Raises DataError; documents that answer nothing are an error too."""
    documents = []
    for path in map(Path, files):
        for number, record in read_json_lines(path):
            try:
                document = _document(record, tokenizer, end_of_turn)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}, line {number}: {_reason(error)}; remove the line or mend it") from error
            if len(document) and not (document.token_n.min() >= 0 and document.token_n.max() < vocab_size):
                raise DataError(
                    f"{path}, line {number} has token ids outside the target's 0..{vocab_size - 1}; it was made with "
                    "another tokenizer, make it again with this target"
                )
            documents.append(dataclasses.replace(document, place=f"{path}, line {number}"))
    if not any(document.response_n.any() for document in documents):
        names = ", ".join(map(str, files)) or "no file"
        raise DataError(f"there is nothing to learn from in {names}; give files with at least one answer")
    return documents


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {number} is not a JSON object; remove the line or mend it")
                yield number, record
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}); check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON lines ({error}); make the file again") from error


def fingerprint(documents: Iterable[Document], *, temperatures: bool) -> str:
    """SHA-256 of ids and masks, and of temperatures where they matter: the same data, whatever files it came in."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.int64(len(document)).tobytes() + document.token_n.tobytes() + document.response_n.tobytes())
        if temperatures:
            digest.update(repr(document.temperature).encode())
    return digest.hexdigest()


def _document(record: dict[str, Any], tokenizer: Tokenizer, end_of_turn: int) -> Document:
    temperature = None if record.get("temperature") is None else float(record["temperature"])
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"its temperature must be 0 or more, not {temperature}")
    if "token_ids" in record:
        ids = np.asarray(record["token_ids"], np.int32).reshape(-1)
        response = np.zeros(len(ids), bool)
        for start, stop in record["response"]:
            response[start:stop] = True
        return Document(ids, response, temperature)
    if "messages" in record:
        cut = record.get("finish") == "length"
        document = _conversation(record["messages"], tokenizer, end_of_turn, cut=cut)
        return dataclasses.replace(document, temperature=temperature)
    if "text" in record:
        ids = np.asarray(encode(tokenizer, record["text"]), np.int32)
        return Document(ids, np.ones(len(ids), bool), temperature)
    raise ValueError(f"it has none of token_ids, messages and text, but {sorted(record)}")


def _conversation(messages: list[dict[str, str]], tokenizer: Tokenizer, end_of_turn: int, *, cut: bool) -> Document:
    """Every answer is encoded apart from what precedes it, as generation made it: no token spans the border."""
    ids: list[int] = []
    answers: list[tuple[int, int]] = []  # where in ids they stand
    rewritten = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_chat(tokenizer, messages[:i], today=REFERENCE_DATE)
        answer = encode(tokenizer, message["content"], add_special_tokens=False)
        if not (cut and i == len(messages) - 1):
            answer = [*answer, end_of_turn]
        # What the template drops or rewrites of earlier turns (space at their ends, thoughts) is no answer any more.
        same = next((n for n, (a, b) in enumerate(zip(ids, prompt)) if a != b), min(len(ids), len(prompt)))
        rewritten += sum(stop > same for _, stop in answers)
        answers = [(start, min(stop, same)) for start, stop in answers if start < same]
        ids = [*prompt, *answer]
        answers.append((len(prompt), len(ids)))
    if not ids:
        raise ValueError("no message has the role 'assistant'")
    response_n = np.zeros(len(ids), bool)
    for start, stop in answers:
        response_n[start:stop] = True
    return Document(np.asarray(ids, np.int32), response_n, rewritten=rewritten)


def _reason(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)
