"""What generation returns. Field names follow vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"]


@dataclass(frozen=True)
class Logprob:
    """log p of one token under the target, before temperature and filters; rank 1 is the likeliest, None unranked."""

    logprob: float
    rank: int | None = None


@dataclass(frozen=True)
class CompletionOutput:
    index: int  # which of the request's n samples
    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" (EOS, a stop id or a stop string) or "length"
    stop_reason: int | str | None = None  # the stop id or string, None for EOS and length
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the chosen one and the best n


@dataclass(frozen=True)
class RequestMetrics:
    """Counts over all n samples; of seconds, the wall time of the slowest."""

    num_rounds: int  # target forwards after prefill
    num_emitted: int  # tokens the rounds emitted, bonus tokens included (those after a stop string too)
    acceptance_histogram: list[int]  # how many rounds kept 0, 1, 2, ... draft tokens
    prefill_seconds: float  # of the prefill it took part in
    decode_seconds: float  # from there on until the host saw it finished, which it does after every launch
    lookup_histogram: list[int] = field(default_factory=list)  # the same of the rounds that looked their drafts up
    tree: str = "off"
    rounds_by_tree: dict[str, int] = field(default_factory=dict)  # num_rounds by the tree that served them
    # The profile that acceptance was forced to (LLM's argument), else None. If set, the text is not the target's.
    synthetic_acceptance: tuple[float, ...] | None = None

    @property
    def tokens_per_call(self) -> float:
        """tau: tokens emitted per target forward, the bonus token included. 1.0 without speculation."""
        return self.num_emitted / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of rounds that kept at least 1, 2, ... draft tokens."""
        rounds = max(1, self.num_rounds)
        return [sum(self.acceptance_histogram[depth:]) / rounds for depth in range(1, len(self.acceptance_histogram))]


@dataclass(frozen=True)
class RequestOutput:
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = field(repr=False)
