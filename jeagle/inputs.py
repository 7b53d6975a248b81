"""What users may give as prompts and parameters, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jeagle.sampling import SamplingParams

__all__ = ["Message", "Prompt", "as_list", "is_conversation", "one_each", "plain_ids"]

Prompt = str | Sequence[int] | Mapping[str, Any]  # a mapping holds one of the others: vLLM's TextPrompt, TokensPrompt
Message = Mapping[str, str]
FIELDS = ("prompt_token_ids", "prompt")


def plain_ids(prompt):
    """A prompt as a string or a list: what a mapping holds of it, arrays of token ids as lists."""
    if isinstance(prompt, Mapping):
        found = [prompt[name] for name in FIELDS if prompt.get(name) is not None]
        if not found:
            raise ValueError(f"a prompt given as a mapping must have {' or '.join(FIELDS)}, got {sorted(prompt)}")
        prompt = found[0]
    return prompt.tolist() if isinstance(prompt, (np.ndarray, jax.Array)) else prompt


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    prompts = plain_ids(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be a string, a list of token ids, or a list of these, got {prompts!r}")
    if prompts and isinstance(prompts[0], (int, np.integer)):
        return [prompts]
    return [plain_ids(prompt) for prompt in prompts]


def is_conversation(messages: object) -> bool:
    return isinstance(messages, (list, tuple)) and bool(messages) and all(isinstance(m, Mapping) for m in messages)


def one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(p, SamplingParams) for p in params):
        raise ValueError(f"sampling_params must be a SamplingParams, or a list of one per prompt, got {params!r}")
    if len(params) != count:
        raise ValueError(f"{count} prompts came with {len(params)} SamplingParams; give one, or one per prompt")
    return list(params)
