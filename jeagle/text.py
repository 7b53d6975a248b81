"""From token ids to text as they arrive: whole characters only, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Detokenizer", "Tokenizer"]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that jeagle uses."""

    def decode(self, token_ids: list[int], **kwargs) -> str: ...


class Detokenizer:
    """Turns one row's ids into text, token by token.

    Text is released when it can no longer change: a token that ends inside a UTF-8 character waits for the rest, and an
    ending that may be the start of a stop string waits until it is not. ``finish_reason`` turns "stop" at a stop
    string; the text then ends exactly before it, and later ids are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._text = ""  # all decided characters
        self._released = 0
        # ids[begin:read] are decoded already; they stay as left context, as some tokenizers decode a token differently
        # at the start of a text.
        self._begin = self._read = 0
        self.token_ids: list[int] = []
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """Everything released so far."""
        return self._text[: self._released]

    def push(self, token_ids: list[int]) -> str:
        """Add ids; returns the newly released text."""
        before = self._released
        for token in token_ids:
            if self.stop_reason is not None:
                break
            self.token_ids.append(token)
            self._decode()
        if self.stop_reason is None:
            self._released = max(before, len(self._text) - self._held())
        return self._text[before : self._released]

    def finish(self) -> str:
        """No more ids: releases what only waited for a stop string. Half a character at the very end is dropped."""
        before = self._released
        self._released = len(self._text)
        return self._text[before:]

    def _decode(self) -> None:
        context = self._tokenizer.decode(self.token_ids[self._begin : self._read], skip_special_tokens=True)
        window = self._tokenizer.decode(self.token_ids[self._begin :], skip_special_tokens=True)
        if window.endswith("\ufffd"):  # the replacement character: inside a multi-byte character
            return
        start = len(self._text)
        self._text += window[len(context) :]
        self._begin, self._read = self._read, len(self.token_ids)
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
