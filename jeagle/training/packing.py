"""Documents into rows of one length, and the loader over the rows.

Documents share a row but never see each other: ``segment`` numbers them, ``position`` starts again at 0 in each, and
attention asks for equal segments. Loading is grain's: shuffled anew in every epoch and a pure function of the step, so
a run that was killed in the middle of an epoch goes on with the very batch it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from jeagle.training.documents import DataError, Document

__all__ = ["Loader", "Rows", "groups", "pack"]

Array = Any  # numpy on the host, jax.Array inside a step
LongDocuments = Literal["error", "cut", "drop"]


class Rows(NamedTuple):
    """Packed rows, [rows, T] each (or with more leading axes)."""

    token_BT: Array  # int32
    segment_BT: Array  # int32: 1, 2, ... per document of the row, 0 for padding
    position_BT: Array  # int32: within the document
    learn_BT: Array  # bool: the token after this one belongs to an answer, so its distribution is learnt
    temperature_BT: Array  # float32: at which the document's answers were written, 1 where that is not known


def pack(documents: Sequence[Document], length: int, *, long_documents: LongDocuments = "error") -> Rows:
    """First-fit decreasing: the longest documents first, each into the first row that has room for it.

    long_documents: what to do with one longer than ``length``: refuse, keep its first ``length`` tokens, or leave it
    out.
    """
    whole = []
    for document in documents:
        if len(document) > length:
            if long_documents == "error":
                raise DataError(
                    f"{document.place or 'a document'} has {len(document)} tokens, more than the pack length of "
                    f'{length}; raise data.pack_length, or set data.long_documents to "cut" or "drop"'
                )
            if long_documents == "drop":
                continue
            document = replace(document, token_n=document.token_n[:length], response_n=document.response_n[:length])
        if document.response_n[1:].any():
            whole.append(document)
    if not whole:
        raise DataError(f"no document with an answer fits in {length} tokens; raise data.pack_length")
    order = sorted(range(len(whole)), key=lambda i: -len(whole[i]))  # stable: equal lengths stay in order
    bins: list[list[int]] = []
    room: list[int] = []
    first = [0] * (length + 1)  # no bin before first[n] has room for n tokens, so each search goes on where it stopped
    for i in order:
        n = len(whole[i])
        spot = first[n]
        while spot < len(bins) and room[spot] < n:
            spot += 1
        first[n] = spot
        if spot == len(bins):
            bins.append([])
            room.append(length)
        bins[spot].append(i)
        room[spot] -= n

    shape = (len(bins), length)
    rows = Rows(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.int32, bool, np.float32)))
    for row, members in enumerate(bins):
        start = 0
        for segment, i in enumerate(members, start=1):
            document = whole[i]
            part = slice(start, start + len(document))
            rows.token_BT[row, part] = document.token_n
            rows.segment_BT[row, part] = segment
            rows.position_BT[row, part] = np.arange(len(document))
            rows.learn_BT[row, start : start + len(document) - 1] = document.response_n[1:]
            rows.temperature_BT[row, part] = 1.0 if document.temperature is None else document.temperature
            start += len(document)
    return rows


def groups(rows: Rows, size: int) -> Iterator[Rows]:
    """``size`` rows at a time, the last ones with padding after them: one shape, so one program."""
    for start in range(0, len(rows.token_BT), size):
        part = (x[start : start + size] for x in rows)
        yield Rows(*(np.pad(x, [(0, size - len(x)), (0, 0)]) for x in part))


class Loader:
    """Step i's rows, [*shape, T]: the same for the same seed, however often and in whatever order they are asked."""

    def __init__(self, rows: Rows, shape: tuple[int, ...], *, seed: int):
        self.rows = rows
        self.shape = shape
        self.rows_per_step = int(np.prod(shape))
        source = grain.MapDataset.source(range(len(rows.token_BT)))
        self._order = source.seed(seed).shuffle().repeat()

    @property
    def steps_per_epoch(self) -> float:
        return len(self.rows.token_BT) / self.rows_per_step

    def __getitem__(self, step: int) -> Rows:
        first = step * self.rows_per_step
        index = np.array([self._order[i] for i in range(first, first + self.rows_per_step)])
        return Rows(*(x[index].reshape(*self.shape, x.shape[1]) for x in self.rows))
