"""Disaggregated prefill: some devices fill prompts into caches while the others decode (arXiv:2508.08192).

A **worker** is a decoder's double, with weights of its own on devices of its own. What travels from it to the decoder
are the pages that hold a prompt's keys and values, the target's and the head's, and the target's feature of the last
committed position, from which the head goes on. The first token is the decoder's, as every other: no text depends on
where its prompt was filled in.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.prefill import Caches, first_pages

__all__ = ["Prefill"]


@dataclass
class Group:
    """Prompts that a worker has begun with, side by side."""

    prompts: list[np.ndarray]
    filled: Caches  # on the decoder's devices, or on their way
    num_taken: int = 0


class Prefill:
    """The prompts of one course, in the order in which they will be seated, a group at each worker ahead of need.

    Args:
      program: the course's; its plan drafts if any does that the course may change to. Else there is no head's cache.
      capacity: cache positions of a row. chunk: prompt positions of one forward. rows: how many prompts are a group.
    """

    def __init__(
        self,
        decoder: Decoder,
        workers: Sequence[Decoder],
        program: Program,
        *,
        capacity: int,
        chunk: int,
        rows: int,
    ):
        self._decoder, self._workers, self._program = decoder, itertools.cycle(workers), program
        self._most_groups = len(workers)
        self._capacity, self._chunk, self._rows = capacity, chunk, rows
        self._coming, self._groups = deque[np.ndarray](), deque[Group]()

    def expect(self, prompts: Iterable[np.ndarray]) -> None:
        """Who will be seated, in this order, after those who have been told of; workers begin with the first of them.
        Returns at once."""
        # One token is the root of the first round: there is nothing to fill in.
        self._coming.extend(prompt for prompt in prompts if len(prompt) > 1)
        self._go_on()

    def fill(self, caches: Caches, prompts: Sequence[np.ndarray], places: np.ndarray) -> Caches:
        """As ``Decoder.fill``: ``caches`` with the prompts that have ``places`` in them.

        Raises ValueError for others than were expected next.
        """
        B, R = len(caches.page_table_BM), self._rows
        left = [(prompts[i], i) for i in places if i < len(prompts) and len(prompts[i]) > 1]
        while left:
            if not self._groups:  # nobody was expected
                self.expect(prompt for prompt, _ in left)
            group = self._groups[0]
            ready = group.prompts[group.num_taken :]
            now, left = left[: len(ready)], left[len(ready) :]
            if any(prompt is not expected for (prompt, _), expected in zip(now, ready)):
                raise ValueError("prompts must be seated in the order in which they were expected")
            place_R = np.full(R, B)  # there is no row B
            place_R[group.num_taken : group.num_taken + len(now)] = [place for _, place in now]
            caches = self._decoder.insert(caches, group.filled, place_R)
            group.num_taken += len(now)
            if group.num_taken == len(group.prompts):
                self._groups.popleft()
                self._go_on()
        return caches

    def _go_on(self) -> None:
        """Give free workers a group each."""
        while self._coming and len(self._groups) < self._most_groups:
            group = [self._coming.popleft() for _ in range(min(self._rows, len(self._coming)))]
            self._groups.append(Group(group, self._begun(group)))

    def _begun(self, prompts: list[np.ndarray]) -> Caches:
        """A group's caches, filled in by the next worker: a promise."""
        worker, R = next(self._workers), self._rows
        caches = worker.empty_caches(R, self._program, self._capacity)
        shapes = dict(chunk=self._chunk, rows=R)
        caches = worker.fill(caches, prompts, np.arange(R), attention=self._program.attention, **shapes)
        needed = -(-(max(map(len, prompts)) - 1) // worker.page_size)
        few = min(1 << (needed - 1).bit_length(), caches.page_table_BM.shape[1])  # few shapes
        return self._decoder.receive(first_pages(caches, num_pages=few))
