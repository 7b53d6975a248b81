"""From a decode state to what users get: finished rows as ids, then ``RequestOutput`` with text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jeagle.course import Course
from jeagle.decode import FINISH_REASONS
from jeagle.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jeagle.requests import Row
from jeagle.sharding import fetch
from jeagle.text import Detokenizer, Tokenizer

__all__ = ["Finished", "collect", "emitted", "request_output", "stop_at_strings", "summed"]


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
    seconds: tuple[float, float]
    tree: str
    synthetic_acceptance: tuple[float, ...] | None
    rounds_by_tree: dict[str, int]


def collect(
    rows: list[Row], course: Course, texts: list[Detokenizer | None], seconds: tuple[float, float]
) -> list[Finished]:
    state = course.state
    text_BS, count_B, finish_B, rounds_B = fetch(
        (state.text_BS, state.num_output_B, state.finish_B, state.num_rounds_B)
    )
    logprobs = fetch(state.logprobs)
    results = []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        token_ids = emitted(text_BS[i], row, count_B[i])
        reason = FINISH_REASONS[finish_B[i]]
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
                best = zip(*(x[i, p, : row.params.logprobs].tolist() for x in (logprobs.top_id_BOn, logprobs.top_BOn)))
                ranked = {t: Logprob(value, rank) for rank, (t, value) in enumerate(best, 1)}
                tops.append({token: Logprob(float(logprobs.chosen_BO[i, p])), **ranked})
        if text is not None:
            text.finish()
        results.append(
            Finished(
                row=row,
                token_ids=token_ids,
                text=None if text is None else text.text,
                finish_reason=str(reason),
                stop_reason=stop_reason,
                logprobs=tops,
                num_rounds=int(rounds_B[i]),
                num_emitted=int(count_B[i]),
                acceptance_P=course.acceptance_BP[i],
                looked_P=course.looked_BP[i],
                seconds=seconds,
                synthetic_acceptance=course.profile,
                tree=course.tree,
                rounds_by_tree={name: int(n_B[i]) for name, n_B in course.rounds_by_tree.items() if n_B[i]},
            )
        )
    return results


def emitted(text_S: np.ndarray, row: Row, count: int, since: int = 0) -> list[int]:
    """Of ``count`` tokens that a row has emitted those from ``since`` on."""
    first = len(row.prompt)
    return text_S[first + since : first + count].tolist()


def stop_at_strings(
    text_BS: np.ndarray,
    rows: list[Row],
    texts: list[Detokenizer | None],
    finish_B: np.ndarray,
    count_B: np.ndarray,
) -> bool:
    """Feed new tokens to the detokenizers; in ``finish_B`` end the rows whose stop string has appeared. Any?"""
    ended = False
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if text is None or text.stop_reason is not None:
            continue
        text.push(emitted(text_BS[i], row, count_B[i], len(text.token_ids)))
        if text.stop_reason is not None and finish_B[i] == 0:
            finish_B[i] = FINISH_REASONS.index("stop")
            ended = True
    return ended


def decode_all(tokenizer, token_ids: list[int]) -> str:
    text = Detokenizer(tokenizer)
    text.push(token_ids)
    text.finish()
    return text.text


def summed(histograms: Sequence[Sequence[int] | np.ndarray]) -> list[int]:
    """Acceptance histograms added up: those of different batches may come from trees of different depths."""
    total_P = np.zeros(max(map(len, histograms)), int)
    for histogram_P in histograms:
        total_P[: len(histogram_P)] += histogram_P
    return total_P.tolist()


def request_output(
    prompt: str | None, prompt_ids: list[int], finished: list[Finished], tokenizer: Tokenizer | None
) -> RequestOutput:
    """One request's samples put together. Without a tokenizer texts are empty."""
    rounds_by_tree: Counter[str] = Counter()
    for f in finished:
        rounds_by_tree.update(f.rounds_by_tree)
    completions = []
    for f in finished:
        text = f.text
        if text is None:
            text = "" if tokenizer is None else decode_all(tokenizer, f.token_ids)
        completions.append(
            CompletionOutput(f.row.sample, text, f.token_ids, f.finish_reason, f.stop_reason, f.logprobs)
        )
    metrics = RequestMetrics(
        num_rounds=sum(f.num_rounds for f in finished),
        num_emitted=sum(f.num_emitted for f in finished),
        acceptance_histogram=summed([f.acceptance_P for f in finished]),
        lookup_histogram=summed([f.looked_P for f in finished]),
        prefill_seconds=max(f.seconds[0] for f in finished),
        decode_seconds=max(f.seconds[1] for f in finished),
        tree=finished[0].tree,
        synthetic_acceptance=finished[0].synthetic_acceptance,
        rounds_by_tree=dict(rounds_by_tree),
    )
    return RequestOutput(prompt, prompt_ids, completions, metrics)
