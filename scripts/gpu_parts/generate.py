"""Part 4: ``generate`` of transformers (static cache, compiled) and of jeagle without speculation, on the same shapes:
random weights, bf16, batch 1, one prompt, greedy. Seconds are of a whole request, prefill included."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from convert.export import llama_config
from gpu_parts.rows import Rows, Settings, Skip
from gpu_parts.steps import SHAPES, config_of, with_random_weights
from jeagle import LLM, SamplingParams

PROMPT, TOKENS = 100, 256


def ours(shape: str, settings: Settings, prompt: list[int], tokens: int) -> dict[str, Any]:
    llm = LLM(with_random_weights(config_of(shape)), attention=settings.attention)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    seconds = []
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert len(output.outputs[0].token_ids) == tokens
    return dict(seconds=min(seconds[1:]), tokens_per_second=tokens / min(seconds[1:]), tokens=tokens)


def theirs(shape: str, settings: Settings, prompt: list[int], tokens: int) -> dict[str, Any]:
    try:
        import torch

        from gpu_parts.pytorch import generate_seconds
    except ImportError as error:
        raise Skip(f"not installed: {error.name or error}") from None
    if not settings.tiny and not torch.cuda.is_available():
        raise Skip("not installed: torch with CUDA")
    config = config_of(shape)
    form = llama_config(config) | dict(tie_word_embeddings=config.tie_embeddings)
    found = generate_seconds(form, prompt, tokens, tiny=settings.tiny)
    return dict(found, tokens_per_second=tokens / found["seconds"], tokens=tokens)


def measure(rows: Rows, settings: Settings) -> None:
    length, tokens = (10, 8) if settings.tiny else (PROMPT, TOKENS)
    prompt = list(range(10, 10 + length))
    name, run = ("transformers", theirs) if settings.variant == "torch" else (settings.attention, ours)
    for shape in ("tiny",) if settings.tiny else SHAPES:
        key = dict(what="generate", shape=shape, implementation=name, length=length)
        rows.measure(partial(run, shape, settings, prompt, tokens), **key)
