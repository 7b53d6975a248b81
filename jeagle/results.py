"""From finished rows to what users get: ``RequestOutput`` with text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jeagle.decode import FINISH_REASONS
from jeagle.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jeagle.serving import Finished, spoken
from jeagle.text import Detokenizer, Tokenizer

__all__ = ["request_output", "summed"]


def decode_all(tokenizer, prompt_ids: list[int], token_ids: list[int]) -> str:
    text = Detokenizer(tokenizer, prompt_ids=prompt_ids)
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
            said = spoken(f.row, f.token_ids, FINISH_REASONS.index(f.finish_reason))
            text = "" if tokenizer is None else decode_all(tokenizer, prompt_ids, said)
        completions.append(
            CompletionOutput(f.row.sample, text, f.token_ids, f.finish_reason, f.stop_reason, f.logprobs)
        )
    metrics = RequestMetrics(
        num_rounds=sum(f.num_rounds for f in finished),
        num_emitted=sum(f.num_emitted for f in finished),
        acceptance_histogram=summed([f.acceptance_P for f in finished]),
        lookup_histogram=summed([f.looked_P for f in finished]),
        prefill_seconds=max(f.prefill_seconds for f in finished),
        decode_seconds=max(f.decode_seconds for f in finished),
        tree=finished[0].tree,
        synthetic_acceptance=finished[0].synthetic_acceptance,
        rounds_by_tree=dict(rounds_by_tree),
    )
    return RequestOutput(prompt, prompt_ids, completions, metrics)
