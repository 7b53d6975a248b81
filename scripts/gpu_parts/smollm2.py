"""Part 5: SmolLM2-135M-Instruct from end to end with the head that ships, plain and speculative in turns, greedy.

Tiny: a random model and head of test size, whose conversations are token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import chat_in_pairs, load_questions, pooled, spread, tokens_per_second

from gpu_parts.rows import Rows, Settings, Skip
from gpu_parts.steps import config_of, with_random_weights
from jeagle import LLM, EagleConfig, RequestOutput, SamplingParams

HEAD = "smollm2-135m-eagle3"
PROMPTS = Path(__file__).resolve().parent.parent / "prompts" / "mt_bench.jsonl"
QUESTIONS, TOKENS = 10, 256


class _OfIds(LLM):
    """A model without a tokenizer: what is said is token ids."""

    def chat(self, messages: Any, *args: Any, **kwargs: Any) -> list[RequestOutput]:
        return self.generate(messages, *args, **kwargs)


def tiny_pair(settings: Settings, dtype: str) -> tuple[LLM, Sequence[Any]]:
    del dtype  # there is nothing to compare
    config = config_of("tiny")
    target = with_random_weights(config)
    head = with_random_weights(EagleConfig.for_target(config, "eagle3"))
    return _OfIds(target, draft=head, attention=settings.attention), [[5, 6, 7]]


def real_pair(settings: Settings, dtype: str) -> tuple[LLM, Sequence[Any]]:
    if not settings.smollm2.exists():
        raise Skip(f"{settings.smollm2} is not here; make demo fetches it, or name it with --smollm2")
    questions = load_questions(PROMPTS, QUESTIONS)
    conversations = [q.opening for q in questions]
    return LLM(settings.smollm2, draft=HEAD, dtype=dtype, attention=settings.attention), conversations


def in_pairs(make: Callable[[], tuple[LLM, Sequence[Any]]], tokens: int) -> dict[str, Any]:
    llm, conversations = make()
    params = [SamplingParams(max_tokens=tokens, ignore_eos=True)] * len(conversations)
    plain, speculative = chat_in_pairs(llm, conversations, params)
    each = [tokens_per_second([s]) / tokens_per_second([p]) for p, s in zip(plain, speculative, strict=True)]
    total = pooled([output.metrics for output in speculative])
    same = [p.outputs[0].token_ids == s.outputs[0].token_ids for p, s in zip(plain, speculative, strict=True)]
    return dict(
        plain_tokens_per_second=tokens_per_second(plain),
        tokens_per_second=tokens_per_second(speculative),
        ratio=tokens_per_second(speculative) / tokens_per_second(plain),
        ratio_of_pairs=spread(each),
        tokens_per_call=total.tokens_per_call,
        draft_tree=total.tree,
        same_text=sum(same),
        requests=len(same),
        tokens=tokens,
    )


def measure(rows: Rows, settings: Settings) -> None:
    pair, tokens = (tiny_pair, 8) if settings.tiny else (real_pair, TOKENS)
    for dtype in ("bfloat16",) if settings.tiny else ("float32", "bfloat16"):

        def find(dtype=dtype) -> dict[str, Any]:
            return in_pairs(lambda: pair(settings, dtype), tokens)

        rows.measure(find, what="chat", dtype=dtype, implementation=settings.attention)
