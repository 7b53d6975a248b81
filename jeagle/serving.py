"""Continuous batching: the rows of a batch are served side by side, and who finishes makes room for who waits.

The host looks after every launch. While rows wait, a launch ends as soon as a quarter of the places is free, and those
are prefilled anew; the other rows go on where they were. No text depends on when that happens, as none depends on the
company it is decoded in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jeagle.course import Course, Look
from jeagle.decode import FINISH_REASONS, Logprobs
from jeagle.outputs import Logprob
from jeagle.requests import Row, make_batch
from jeagle.sharding import fetch
from jeagle.text import Detokenizer

__all__ = ["Finished", "emitted", "serve", "spoken"]

# While stop strings are wanted the host looks this often; the rounds after a match are wasted.
ROUNDS_BETWEEN_STOP_CHECKS = 8
# The share of the places that are refilled at once. Fewer wait less for each other; but a prefill takes as long for one
# row as for a few, and the others stand still meanwhile.
FREE = 0.25


@dataclass(frozen=True)
class Finished:
    """A row's result, as ids."""

    row: Row
    token_ids: list[int]
    text: str | None  # decided already where stop strings were looked for
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None
    num_rounds: int
    num_emitted: int
    acceptance_P: np.ndarray
    looked_P: np.ndarray
    prefill_seconds: float  # of all that were prefilled with it
    decode_seconds: float  # from then until the host saw it finished
    tree: str
    synthetic_acceptance: tuple[float, ...] | None
    rounds_by_tree: dict[str, int]


@dataclass(frozen=True)
class Seat:
    """A row under way, in one of the batch's places."""

    row: Row
    text: Detokenizer | None  # where stop strings are wanted
    prefill_seconds: float
    since: float


def serve(
    course: Course,
    queue: Sequence[Row],
    places: int,
    most_rounds: int,
    detokenizer: Callable[[Row], Detokenizer | None],
    watch: Callable[[Look], None] = lambda look: None,
) -> Iterator[Finished]:
    """Serve ``queue`` in order, ``places`` rows side by side; yields them as they finish.

    most_rounds: of a launch. detokenizer: of a row that has stop strings, else None. watch: shown what the host sees
    after every launch, when those that have finished are handed out.
    """
    waiting, seats = deque(queue), dict[int, Seat]()
    course.expect(row.prompt for row in queue)
    quota = max(1, int(FREE * places))
    while waiting or seats:
        if waiting and len(seats) <= places - min(quota, len(waiting)):
            seats |= _seated(course, waiting, [i for i in range(places) if i not in seats], detokenizer)
        texts = any(seat.text for seat in seats.values())
        look = course.advance(
            min(most_rounds, ROUNDS_BETWEEN_STOP_CHECKS) if texts else most_rounds,
            least_running=places - min(quota, len(waiting)) + 1 if waiting else 1,
        )
        text_BS = None
        if texts:
            text_BS = fetch(course.state.text_BS)
            if _stop_at_strings(text_BS, seats, look):
                course.end(look.finish_B)
        done = [place for place in seats if look.finish_B[place]]
        if done:
            text_BS = fetch(course.state.text_BS) if text_BS is None else text_BS
            logprobs, now = fetch(course.state.logprobs), time.perf_counter()
            for place in done:
                yield _finished(course, place, seats.pop(place), look, text_BS, logprobs, now)
        watch(look)
    course.log()


def _seated(course: Course, waiting: deque[Row], free: list[int], detokenizer) -> dict[int, Seat]:
    """The next rows in the free places, prefilled."""
    began = time.perf_counter()
    rows = {place: waiting.popleft() for place in free[: len(waiting)]}
    batch = make_batch(rows, course.bucket)
    jax.block_until_ready(course.seat(batch, np.array(list(rows)), queued=bool(waiting)))
    now = time.perf_counter()
    return {place: Seat(row, detokenizer(row), now - began, now) for place, row in rows.items()}


def _finished(
    course: Course,
    place: int,
    seat: Seat,
    look: Look,
    text_BS: np.ndarray,
    logprobs: Logprobs | None,
    now: float,
) -> Finished:
    row, text, count = seat.row, seat.text, int(look.num_output_B[place])
    if text is not None:
        text.finish()  # what was held back for the rest of a character may hold the stop string
    token_ids = emitted(text_BS[place], row, count)
    reason = FINISH_REASONS[look.finish_B[place]]
    stop_reason: int | str | None = None
    if text is not None and text.stop_reason is not None:
        token_ids, stop_reason, reason = text.token_ids, text.stop_reason, "stop"
    elif reason == "stop" and token_ids[-1] in row.params.stop_token_ids:
        stop_reason = token_ids[-1]
    tops = None
    if logprobs is not None and row.params.logprobs is not None:
        tops = []
        for p, token in enumerate(token_ids):
            # The program may have computed more than this row asked for, as another one in the batch did.
            best = zip(*(x[place, p, : row.params.logprobs].tolist() for x in (logprobs.top_id_BOn, logprobs.top_BOn)))
            ranked = {t: Logprob(value, rank) for rank, (t, value) in enumerate(best, 1)}
            tops.append({token: Logprob(float(logprobs.chosen_BO[place, p])), **ranked})
    return Finished(
        row=row,
        token_ids=token_ids,
        text=None if text is None else text.text,
        finish_reason=str(reason),
        stop_reason=stop_reason,
        logprobs=tops,
        num_rounds=int(look.num_rounds_B[place]),
        num_emitted=count,
        acceptance_P=course.acceptance_BP[place].copy(),
        looked_P=course.looked_BP[place].copy(),
        prefill_seconds=seat.prefill_seconds,
        decode_seconds=now - seat.since,
        synthetic_acceptance=course.profile,
        tree=course.tree,
        rounds_by_tree={name: int(n_B[place]) for name, n_B in course.rounds_by_tree.items() if n_B[place]},
    )


def spoken(row: Row, token_ids: list[int], finish: int) -> list[int]:
    """Of a row's newest tokens those that have a say in its text: the stop id that ended it has none, as in vLLM."""
    if finish == FINISH_REASONS.index("stop") and token_ids and token_ids[-1] in row.params.stop_token_ids:
        return token_ids[:-1]
    return token_ids


def emitted(text_S: np.ndarray, row: Row, count: int, since: int = 0) -> list[int]:
    """Of ``count`` tokens that a row has emitted those from ``since`` on."""
    first = len(row.prompt)
    return text_S[first + since : first + count].tolist()


def _stop_at_strings(text_BS: np.ndarray, seats: dict[int, Seat], look: Look) -> bool:
    """Feed new tokens to the detokenizers; in ``finish_B`` end the rows whose stop string has appeared. Any?"""
    ended = False
    for place, seat in seats.items():
        text = seat.text
        if text is None or text.stop_reason is not None:
            continue
        new = emitted(text_BS[place], seat.row, look.num_output_B[place], len(text.token_ids))
        text.push(spoken(seat.row, new, look.finish_B[place]))
        if text.stop_reason is not None and look.finish_B[place] == 0:
            look.finish_B[place] = FINISH_REASONS.index("stop")
            ended = True
    return ended
