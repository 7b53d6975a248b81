"""What PyTorch does with the same shapes on the same device. Knows no JAX.

On a GPU attention is captured into a CUDA graph, so that no launch is waited for, and timed by the host around whole
replays. Importing it without torch or transformers is an ImportError.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
import transformers

__all__ = ["generate_seconds", "sdpa_seconds"]


def _device(tiny: bool) -> torch.device:
    return torch.device("cpu" if tiny and not torch.cuda.is_available() else "cuda")


def _best(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def sdpa_seconds(
    *, B: int, T: int, length: int, K: int, G: int, H: int, copies: int, calls: int, tiny: bool, repeats: int = 5
) -> float:
    """Seconds of one ``scaled_dot_product_attention`` of T queries over ``length`` contiguous keys and values, without
    a mask: less than a tree needs. Each call's answer is the next one's query; ``copies`` caches take turns."""
    device = _device(tiny)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    caches = [(random(B, K, length, H), random(B, K, length, H)) for _ in range(copies)]
    first = random(B, K * G, T, H)

    def once() -> torch.Tensor:
        q = first
        for k, v in islice(cycle(caches), calls):
            q = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return q

    with torch.inference_mode():
        if device.type == "cpu":
            return _best(once, repeats) / calls
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
            once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return _best(graph.replay, repeats) / calls


def generate_seconds(
    config: dict[str, Any], prompt: list[int], tokens: int, *, tiny: bool, repeats: int = 3
) -> dict[str, Any]:
    """Best seconds of ``generate`` for one prompt, prefill included: static cache, compiled forward, greedy, bf16,
    random weights. ``config``: fields of transformers' LlamaConfig."""
    device = _device(tiny)
    with device:
        form = transformers.LlamaConfig(**config)
        model = transformers.AutoModelForCausalLM.from_config(form, dtype=torch.bfloat16).eval()
    ids = torch.tensor([prompt], device=device)
    compiled = device.type != "cpu"
    options = dict(
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        cache_implementation="static",
        pad_token_id=0,
        disable_compile=not compiled,
    )

    def run() -> None:
        out = model.generate(ids, **options)
        assert out.shape[1] == len(prompt) + tokens, out.shape

    with torch.inference_mode():
        for _ in range(2 if compiled else 0):  # compiling, then recording graphs
            run()
        seconds = _best(run, repeats)
    return dict(seconds=seconds, compiled=compiled, torch=torch.__version__, transformers=transformers.__version__)
