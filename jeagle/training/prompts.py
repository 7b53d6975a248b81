"""What a target is given to answer or continue, and the text of a chat template around what is said."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jeagle.text import REFERENCE_DATE, Tokenizer, encode, render_chat
from jeagle.training.documents import DataError, read_json_lines

if TYPE_CHECKING:
    from jeagle.inputs import Message

__all__ = ["around_user_turn", "before_next_answer", "end_of_turn", "read_conversations", "read_texts"]

MARKER = "JeagleMarksThisPlace"


def read_texts(path: Path) -> list[str]:
    """The texts of JSON lines {"text": "..."}. Raises DataError."""
    texts = []
    for number, record in read_json_lines(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise DataError(f'{path}, line {number} is not {{"text": "..."}}; remove the line or mend it')
        _check_unicode(text, path, number)
        texts.append(text)
    return _some(texts, path, '{"text": ...}')


def read_conversations(path: Path) -> list[list[Message]]:
    """Those of JSON lines {"messages": [...]}, or of EAGLE's questions {"turns": [...]}, perhaps with a "system".
    Raises DataError."""
    conversations = []
    for number, record in read_json_lines(path):
        turns, said = record.get("turns"), record.get("messages")
        if isinstance(turns, list):
            system = record.get("system")
            said = [] if system is None else [{"role": "system", "content": system}]
            said += [{"role": "user", "content": turn} for turn in turns]
        if not _is_conversation(said):
            raise DataError(
                f'{path}, line {number} is not {{"messages": [{{"role": ..., "content": ...}}, ...]}} or '
                '{"turns": ["...", ...]}; remove the line or mend it'
            )
        assert isinstance(said, list)
        _check_unicode(said, path, number)
        conversations.append(said)
    return _some(conversations, path, '{"messages": ...} or {"turns": ...}')


def _some[T](found: list[T], path: Path, lines: str) -> list[T]:
    if not found:
        raise DataError(f"{path} is empty; give JSON lines of {lines}")
    return found


def around_user_turn(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that the template puts before and after what a user says first."""
    before, after = _around_marker(tokenizer, [{"role": "user", "content": MARKER}], add_generation_prompt=False)
    return (
        encode(tokenizer, before, add_special_tokens=False),
        encode(tokenizer, after, add_special_tokens=False),
    )


def before_next_answer(tokenizer: Tokenizer, messages: list[Message], ask: Message, *, last: int) -> list[int]:
    """Token ids from the end of the newest answer in ``messages`` to that of the user's turn ``ask``.

    last: the token that the answer ended with; where the template writes it too, it is not there twice.
    """
    answer: Message = {"role": "assistant", "content": MARKER}
    _, after = _around_marker(tokenizer, [*messages[:-1], answer, ask], add_generation_prompt=True)
    ids = encode(tokenizer, after, add_special_tokens=False)
    return ids[ids.index(last) + 1 :] if last in ids[:2] else ids


def end_of_turn(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> int:
    """Of the ids that may end an answer the one that the chat template writes after it; the first, where it writes none
    of them or there is no template."""
    if getattr(tokenizer, "chat_template", None):
        ask, answer = ({"role": role, "content": text} for role, text in (("user", "Hello"), ("assistant", MARKER)))
        with contextlib.suppress(ValueError):  # of a template that shows no answers, or refuses these
            _, after = _around_marker(tokenizer, [ask, answer, {**ask, "content": MARKER}], add_generation_prompt=True)
            between = encode(tokenizer, after.partition(MARKER)[0], add_special_tokens=False)
            return next((token for token in between if token in eos_token_ids), eos_token_ids[0])
    return eos_token_ids[0]


def _around_marker(tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool) -> tuple[str, str]:
    text = render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt, today=REFERENCE_DATE)
    before, found, after = text.partition(MARKER)
    if not found:
        raise DataError("the chat template does not show what is said; give texts to continue instead")
    return before, after


def _check_unicode(said: object, path: Path, number: int) -> None:
    try:
        json.dumps(said, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number} is not valid Unicode; remove the line or mend it") from error


def _is_conversation(said: object) -> bool:
    """Whether the texts are texts, the roles ours, and something is asked."""
    return (
        isinstance(said, list)
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in said)
        and {"user"} <= {str(message.get("role")) for message in said} <= {"system", "user", "assistant"}
    )
