"""The draft vocabulary: the target ids that answers use most (EAGLE-3, arXiv:2503.01840; FR-Spec, arXiv:2502.14856)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jeagle.training.documents import Document

__all__ = ["choose_vocabulary", "coverage"]


def choose_vocabulary(
    documents: Iterable[Document], *, vocab_size: int, size: int, always: Sequence[int] = ()
) -> np.ndarray:
    """Target ids [size], ascending int32: ``always`` (end-of-turn tokens), then the most frequent in the answers.

    Ids that never occur fill up in ascending order: BPE numbers its merges by frequency, so low ids are the likelier.
    """
    count_V = _count(documents, vocab_size)
    count_V[list(always)] = np.iinfo(np.int64).max
    best = np.argsort(-count_V, kind="stable")[:size]
    return np.sort(best).astype(np.int32)


def coverage(documents: Iterable[Document], ids: np.ndarray, *, vocab_size: int) -> float:
    """Share of the answers' tokens that ``ids`` hold: an upper bound of the acceptance at any position."""
    count_V = _count(documents, vocab_size)
    return float(count_V[ids].sum() / max(1, count_V.sum()))


def _count(documents: Iterable[Document], vocab_size: int) -> np.ndarray:
    count_V = np.zeros(vocab_size, np.int64)
    for document in documents:
        count_V += np.bincount(document.token_n[document.response_n], minlength=vocab_size)
    return count_V
