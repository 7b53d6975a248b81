"""``jeagle demo``: a small real model answers with and without speculation, the same text both times."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from jeagle.llm import LLM
from jeagle.outputs import RequestMetrics, RequestOutput
from jeagle.sampling import SamplingParams

__all__ = ["demo"]

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that reverses a string.",
    "Count from one to twenty in words.",
)


def demo(model: Path, draft: str, *, tree: str = "auto", max_tokens: int = 64) -> int:
    """Fetch SmolLM2-135M-Instruct into ``model`` if it is not there, answer every prompt both ways, print both speeds.

    Returns the process's exit code: 1 if the two texts ever differ.
    """
    from convert.smollm2 import fetch

    directory = fetch(model)
    llm = LLM(directory, draft, tree=tree)
    conversations = [[{"role": "user", "content": p}] for p in PROMPTS]
    print(f"\n{llm.config.num_parameters / 1e6:.0f}M parameters, {jnp.dtype(llm.dtype).name}, on {jax.devices()[0]}.")
    equal = True
    for title, params in (
        ("greedy", SamplingParams(max_tokens=max_tokens)),
        (
            "temperature 0.8, top-p 0.95, seed 7",
            SamplingParams(max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=7),
        ),
    ):
        print(f"\n=== {title}")
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for prompt, messages in zip(PROMPTS, conversations, strict=True):
            texts = {}
            for speculative in (False, True):
                once = dict(speculative=speculative, use_tqdm=False)
                llm.chat(messages, params, **once)  # compiles, the first time
                (out,) = llm.chat(messages, params, **once)
                texts[speculative] = out
                speeds[speculative].append(_tokens_per_second(out))
            equal &= _show(prompt, texts[False], texts[True])
        mean = {kind: sum(s) / len(s) for kind, s in speeds.items()}
        print(f"\nplain {mean[False]:.1f} tok/s, speculative {mean[True]:.1f} tok/s: {mean[True] / mean[False]:.2f}x")
    print(
        "\nEvery text was the same with and without speculation." if equal else "\nThe texts DIFFER: please report it."
    )
    return 0 if equal else 1


def _show(prompt: str, plain: RequestOutput, speculative: RequestOutput) -> bool:
    same = plain.outputs[0].token_ids == speculative.outputs[0].token_ids
    print(f"\n> {prompt}")
    for name, out in (("plain", plain), ("speculative", speculative)):
        metrics = out.metrics
        speed = f"{_tokens_per_second(out):.1f} tok/s, {metrics.tokens_per_call:.2f} tokens per call"
        print(f"[{name}, {speed}, {_trees(metrics)}]")
        print(out.outputs[0].text)
    print("same tokens" if same else "DIFFERENT tokens")
    return same


def _trees(metrics: RequestMetrics) -> str:
    """What was drafted; where trees took turns, each with its rounds."""
    if metrics.tree != "dispatch":
        return f"tree: {metrics.tree}"
    return "rounds: " + ", ".join(f"{rounds} {tree}" for tree, rounds in metrics.rounds_by_tree.items())


def _tokens_per_second(out: RequestOutput) -> float:
    return out.metrics.num_emitted / out.metrics.decode_seconds
