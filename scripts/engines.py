"""Several ways to generate for the same prompts, run in turns, and what each took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import pooled, spread
from measuring import compiled_before, peak_memory

from jeagle import LLM, RequestOutput, SamplingParams
from jeagle.outputs import RequestMetrics
from jeagle.tree import parse_tree

__all__ = ["PLAIN", "Engine", "figures"]

PLAIN = "plain"


@dataclass
class Engine:
    """One way to generate, and what it took, a list entry per repeat."""

    name: str  # of the tree, or PLAIN
    llm: LLM
    speculative: bool
    seconds: list[float] = field(default_factory=list)  # wall
    outputs: list[list[RequestOutput]] = field(default_factory=list)
    compile_seconds: float = 0.0

    def warm_up(self, prompts: list[list[int]], params: Sequence[SamplingParams]) -> None:
        self.seconds, self.outputs = [], []
        known = self.llm.compiled_programs
        compiled_before(self.llm, lambda: self._generate(prompts, params))
        self.compile_seconds = sum(p.seconds for p in self.llm.compiled_programs if p not in known)

    def run(self, prompts: list[list[int]], params: Sequence[SamplingParams]) -> None:
        def timed() -> tuple[float, list[RequestOutput]]:
            began = time.perf_counter()
            outputs = self._generate(prompts, params)
            return time.perf_counter() - began, outputs

        seconds, outputs = compiled_before(self.llm, timed)
        self.seconds.append(seconds)
        self.outputs.append(outputs)

    def _generate(self, prompts: list[list[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        return self.llm.generate(prompts, params, speculative=self.speculative, use_tqdm=False)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every repeat."""
        tokens = (sum(o.metrics.num_emitted for o in outputs) for outputs in self.outputs)
        return [n / seconds for n, seconds in zip(tokens, self.seconds, strict=True)]


def draft_steps(total: RequestMetrics) -> float:
    """How many the head makes in a mean round, were it left out of all that look their drafts up."""
    steps = sum(n * len(parse_tree(tree).levels) for tree, n in total.rounds_by_tree.items()) / total.num_rounds
    return steps * (1 - sum(total.lookup_histogram) / total.num_rounds)


def figures(engine: Engine, plain: Engine) -> dict[str, Any]:
    """A row of the table, of one engine at one batch size and temperature."""
    requests = [o.metrics for outputs in engine.outputs for o in outputs]
    batches = [[o.metrics for o in outputs] for outputs in engine.outputs]
    total = pooled(requests)
    # The rows of a batch share its rounds: as many as its longest-running row took.
    rounds = sum(max(m.num_rounds for m in batch) for batch in batches)
    decode = sum(max(m.decode_seconds for m in batch) for batch in batches)
    prefill = sum(max(m.prefill_seconds for m in batch) for batch in batches)
    round_seconds = decode / rounds
    per_token = [m.decode_seconds / m.num_emitted * 1e3 for m in requests]
    tokens = sum(m.num_emitted for m in requests)
    return dict(
        tree=engine.name,
        described_as=total.tree,
        synthetic_acceptance=total.synthetic_acceptance,
        requests=len(requests),
        first_token_ms=float(np.median([(m.prefill_seconds + round_seconds) * 1e3 for m in requests])),
        ms_per_token=dict(median=float(np.median(per_token)), p99=float(np.quantile(per_token, 0.99))),
        tokens_per_second=tokens / sum(engine.seconds),
        decode_tokens_per_second=tokens / decode,
        speedup=spread([a / b for a, b in zip(engine.rates, plain.rates, strict=True)]),
        tokens_per_call=total.tokens_per_call,
        acceptance_per_position=total.acceptance_per_position,
        acceptance_histogram=total.acceptance_histogram,
        round_ms=round_seconds * 1e3,
        lookup_histogram=total.lookup_histogram,
        draft_steps=draft_steps(total),
        rounds_by_tree=total.rounds_by_tree,
        ms_per_token_by_phase=dict(
            prefill=prefill / tokens * 1e3,
            rounds=decode / tokens * 1e3,
            outside=(sum(engine.seconds) - prefill - decode) / tokens * 1e3,
        ),
        peak_memory_MB=peak_memory() / 1e6,
        compile_s=round(engine.compile_seconds, 2),
        equal_texts=sum(
            a.outputs[0].token_ids == b.outputs[0].token_ids
            for ours, theirs in zip(engine.outputs, plain.outputs, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ),
    )
