"""Do training texts hold evaluation prompts? Word n-grams in common (GPT-3's test, arXiv:2005.14165, section 4).

Words are runs of letters, digits and underscores, in one case and one Unicode form (NFKC); what stands between them
does not count. An n-gram without a single letter is no overlap: "1 2 3 4 5 6 7 8" is counting, not a question.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from jeagle.training.documents import DataError, read_json_lines

__all__ = ["NGrams", "overlapping", "read_evaluation_prompts"]

WORD = re.compile(r"\w+")
LETTER = re.compile(r"[^\W\d_]")


class NGrams:
    """The word n-grams of ``prompts``; a prompt of fewer words is one n-gram as a whole.

    A writing system without spaces makes long words, so there only whole phrases are found.
    """

    def __init__(self, prompts: Iterable[str], n: int = 8):
        self._grams: dict[int, set[tuple[str, ...]]] = {}  # by length: n, and that of each shorter prompt
        for prompt in prompts:
            words = _words(prompt)
            size = min(n, len(words))
            grams = {gram for gram in _windows(words, size) if any(map(LETTER.search, gram))}
            if grams:
                self._grams.setdefault(size, set()).update(grams)

    def shared(self, text: str) -> list[str]:
        """Those that ``text`` holds, each once, words joined by spaces."""
        words = _words(text)
        found = (gram for size in sorted(self._grams) for gram in _windows(words, size) if gram in self._grams[size])
        return list(dict.fromkeys(map(" ".join, found)))


def overlapping(texts: Iterable[str], prompts: Iterable[str], n: int = 8) -> list[tuple[int, str]]:
    """(index of the text, n-gram) for every word n-gram that a text shares with a prompt."""
    grams = NGrams(prompts, n)
    return [(index, gram) for index, text in enumerate(texts) for gram in grams.shared(text)]


def read_evaluation_prompts(path: str | Path) -> list[str]:
    """Every turn of a file in EAGLE's question format, {"question_id", "category", "turns": [...]} a line."""
    turns = []
    for number, record in read_json_lines(Path(path)):
        said = record.get("turns")
        if not isinstance(said, list) or not said or not all(isinstance(turn, str) for turn in said):
            raise DataError(
                f'{path}, line {number}: "turns" must be a list of texts, got {said!r}; '
                "give evaluation prompts in EAGLE's question format"
            )
        turns += said
    return turns


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _windows(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1)) if size else iter(())
