"""Part 4: ``generate`` of transformers (static cache, compiled) and of jeagle without speculation, on the same shapes:
random weights, bf16, batch 1, one prompt, greedy. Seconds are of a whole request, prefill included."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from gpu_parts.rows import Rows, Settings, Skip
from gpu_parts.steps import SHAPES, config_of, with_random_weights
from jeagle import LLM, LlamaConfig, SamplingParams
from jeagle.llama import Llama

PROMPT, TOKENS = 100, 256


def foreign_config(config: LlamaConfig) -> dict[str, Any]:
    """The same shape as transformers' LlamaConfig names it. Rotary scaling is left out: it costs nothing."""
    return dict(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_position,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids),
    )


def ours(shape: str, settings: Settings, prompt: list[int], tokens: int) -> dict[str, Any]:
    llm = LLM(with_random_weights(Llama, config_of(shape)), attention=settings.attention)
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
    found = generate_seconds(foreign_config(config_of(shape)), prompt, tokens, tiny=settings.tiny)
    return dict(found, tokens_per_second=tokens / found["seconds"], tokens=tokens)


def measure(rows: Rows, settings: Settings) -> None:
    length, tokens = (10, 8) if settings.tiny else (PROMPT, TOKENS)
    prompt = list(range(10, 10 + length))
    name, run = ("transformers", theirs) if settings.variant == "torch" else (settings.attention, ours)
    for shape in ("tiny",) if settings.tiny else SHAPES:
        key = dict(what="generate", shape=shape, implementation=name, length=length)
        rows.measure(partial(run, shape, settings, prompt, tokens), **key)
