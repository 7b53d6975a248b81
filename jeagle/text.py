"""Between text and token ids: tokenizers, and text as ids arrive, in whole characters and up to stop strings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = [
    "REFERENCE_DATE",
    "Detokenizer",
    "Tokenizer",
    "encode",
    "encode_chat",
    "load_tokenizer",
    "render_chat",
    "vocabulary_hash",
]


# The day on which text that is learnt from, or measured on, is written: Llama's own default. Else a run that goes on
# past midnight would have other text than it began with.
REFERENCE_DATE = date(2024, 7, 26)

CONTEXT = 6  # ids of a prompt that its answer's first ones are decoded with


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that jeagle uses."""

    chat_template: str | None
    bos_token: str | None
    bos_token_id: int | None

    def __call__(self, text: str, **kwargs) -> Any: ...

    def decode(self, token_ids: list[int], **kwargs) -> str: ...

    def apply_chat_template(self, conversation: list, **kwargs) -> Any: ...


def load_tokenizer(directory: Path) -> Tokenizer:
    """The transformers tokenizer in ``directory``. Code that a checkpoint brings along is never run.

    tokenizer.json is taken as it stands: of the class that tokenizer_config.json names, transformers would rebuild the
    pre-tokenizer, which loses every space where byte-level checkpoints say LlamaTokenizer (DeepSeek-R1-Distill-Llama).
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it misses PyTorch, aloud
    # Seconds to import, for which who gives ids to a model without a tokenizer need not wait.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast if (directory / "tokenizer.json").exists() else AutoTokenizer
    try:
        return tokenizer.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            clean_up_tokenization_spaces=False,  # what is cleaned up could not be streamed
        )
    except Exception as error:  # of any type: JSON, KeyError, Rust
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot load the tokenizer in {directory} ({type(error).__name__}: {reason})") from error


def vocabulary_hash(directory: Path) -> str | None:
    """SHA-256 of which id means what in ``directory``'s tokenizer.json; None where that cannot be read.

    Of the vocabulary and not of the file: versions of the tokenizers library write the same tokenizer differently.
    """
    try:
        data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: a list of (token, score)
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        vocabulary = vocabulary | {added["content"]: added["id"] for added in data.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def encode(tokenizer: Tokenizer, text: str, **kwargs) -> list[int]:
    """Token ids of a text. One that begins with the begin-of-text token, as chat templates write it, gets no second."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
    ids = tokenizer(text, **kwargs).input_ids
    bos = tokenizer.bos_token
    begun = bos is not None and text.startswith(bos) and not text.startswith(2 * bos)
    return ids[1:] if begun and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def encode_chat(tokenizer: Tokenizer, messages: list, *, today: date | None = None) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to speak."""
    text = render_chat(tokenizer, messages, today=today)
    return encode(tokenizer, text, add_special_tokens=False)  # the template writes them


def render_chat(
    tokenizer: Tokenizer, messages: list, *, add_generation_prompt: bool = True, today: date | None = None
) -> str:
    """A conversation as its chat template writes it. today: for templates that print the date; None: this day's."""
    # Templates ask for the date by this name; what is given goes before what transformers has under it.
    clock = {} if today is None else {"strftime_now": today.strftime}
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **clock
        )
    except Exception as error:  # of any type: the template is a program of the checkpoint's, run by jinja2
        raise ValueError(f"the chat template cannot render {messages!r}: {error}") from error


class Detokenizer:
    """Turns one row's ids into text, as they come.

    Text is released when it can no longer change: ids that end inside a UTF-8 character wait for the rest, and an
    ending that may be the start of a stop string waits until it is not. At one ``stop_reason`` becomes it, the text
    then ends exactly before it, and later ids are ignored.

    prompt_ids: what the ids follow, of which a few are context: prompt and text joined are one text. Without them
    SentencePiece leaves out the first space.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt_ids: Sequence[int] | np.ndarray = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._text = ""  # all decided characters
        self._released = 0
        # ids[begin:read] are decoded already; they stay as left context, as some tokenizers decode a token differently
        # at the start of a text.
        self._ids = _context(tokenizer, [int(i) for i in prompt_ids[-CONTEXT - 3 :]])
        self._begin, self._read = 0, len(self._ids)
        self._num_context = len(self._ids)
        self.stop_reason: str | None = None

    @property
    def token_ids(self) -> list[int]:
        """All that were pushed, up to the one that ended a stop string."""
        return self._ids[self._num_context :]

    @property
    def text(self) -> str:
        """Everything released so far."""
        return self._text[: self._released]

    def push(self, token_ids: list[int]) -> str:
        """Add ids; returns the newly released text."""
        before = self._released
        # All at once where that can be: each time costs two decodings. Token by token what may end at a stop string,
        # or holds broken characters: some tokenizers break a whole run of bytes for one of them.
        whole = not self._stop and "\ufffd" not in self._tokenizer.decode(token_ids, skip_special_tokens=True)
        for step in [token_ids] if whole else [[token] for token in token_ids]:
            if self.stop_reason is not None:
                break
            self._ids += step
            self._decode(final=False)
        if self.stop_reason is None:
            self._released = max(before, len(self._text) - self._held())
        return self._text[before : self._released]

    def finish(self) -> str:
        """No more ids: releases what only waited for more. Half a character at the very end is dropped."""
        before = self._released
        if self.stop_reason is None:
            self._decode(final=True)
        self._released = len(self._text)
        return self._text[before:]

    def _decode(self, *, final: bool) -> None:
        context = self._tokenizer.decode(self._ids[self._begin : self._read], skip_special_tokens=True)
        new = self._tokenizer.decode(self._ids[self._begin :], skip_special_tokens=True)[len(context) :]
        if new.endswith("\ufffd"):  # the replacement character: inside a multi-byte character
            if not final:
                return
            new = new.rstrip("\ufffd")
        start = len(self._text)
        self._text += new
        if new:  # a token without text, such as EOS, is no left context
            self._begin = self._read
        self._read = len(self._ids)
        self._find_stop(start)

    def _find_stop(self, start: int) -> None:
        found = []
        for stop in self._stop:
            at = self._text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if found:
            at, self.stop_reason = min(found)
            self._text = self._text[:at]
            self._released = len(self._text)

    def _held(self) -> int:
        """Length of the longest ending of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def _context(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The last CONTEXT, or a few more where these begin inside a character of up to four bytes: one broken byte breaks
    a whole run of them. None of a prompt that ends inside a character, as none of its text stays as it is."""
    for size in range(min(CONTEXT, len(ids)), len(ids) + 1):
        found = ids[len(ids) - size :]
        if not tokenizer.decode(found, skip_special_tokens=True).endswith("\ufffd"):
            return found
    return []
