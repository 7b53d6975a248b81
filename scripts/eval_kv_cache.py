"""What do FP8 caches change?

    python scripts/eval_kv_cache.py models/smollm2-135m smollm2-135m-eagle3 --prompts scripts/prompts/mt_bench.jsonl

The target answers a few questions greedily in float32, once with caches of its own dtype and once with FP8 caches, each
plainly and speculatively. Then it reads its float32 answers with both caches: how far apart are its probabilities, and
how often does it prefer the same token? One forward over a whole answer says it, as new keys are rounded to what an FP8
cache will hold of them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import chat, environment, load_questions, spread, write_result
from flax import nnx
from tqdm import tqdm

from jeagle import LLM, SamplingParams
from jeagle.cache import KVCache, Prefix
from jeagle.checkpoint import load_llama
from jeagle.fp8 import FP8
from jeagle.llama import Llama


@partial(jax.jit, static_argnames=("definition", "dtype"))
def log_probabilities(definition, params, token_1T: jax.Array, *, dtype) -> jax.Array:
    """[T, V] float32 of the token after each position, all of them new positions of an empty cache of ``dtype``."""
    target: Llama = nnx.merge(definition, params)
    T = token_1T.shape[1]
    cache = KVCache.create(target.config, num_pages=1, page_size=1, dtype=dtype)
    nothing = Prefix.full(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))
    forward = target(token_1T, jnp.arange(T)[None], jnp.tril(jnp.ones((1, T, T), bool)), cache, nothing)
    return jax.nn.log_softmax(target.logits(forward.hidden_BTD))[0]


def agreement(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("target", help="a converted checkpoint")
    parser.add_argument("draft", help="an EAGLE head for it")
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, default=8, help="questions, spread evenly over the file")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--out", help="also write the JSON here")
    args = parser.parse_args()

    here = environment()
    target = load_llama(args.target, dtype="float32")
    questions = [q.opening for q in load_questions(args.prompts, args.limit)]
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)
    answers = {}
    for dtype in ("auto", "fp8"):
        llm = LLM(args.target, args.draft, dtype="float32", kv_cache_dtype=dtype, max_batch_size=1)
        for speculative in (False, True):
            outputs = chat(llm, questions, params, speculative=speculative)
            answers[dtype, speculative] = [list(o.outputs[0].token_ids) for o in outputs]
    prompts = [list(o.prompt_token_ids) for o in outputs]

    definition, weights = nnx.split(target)
    width = max(map(len, prompts)) + args.max_tokens
    divergence, same_best = [], []
    for prompt, answer in zip(tqdm(prompts, desc="read"), answers["auto", False], strict=True):
        token_1T = np.zeros((1, width), np.int32)
        token_1T[0, : len(prompt) + len(answer)] = prompt + answer
        said = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        exact, fp8 = (log_probabilities(definition, weights, token_1T, dtype=d)[said] for d in (jnp.float32, FP8))
        divergence += jnp.sum(jnp.exp(exact) * (exact - fp8), axis=-1).tolist()
        same_best += (jnp.argmax(exact, axis=-1) == jnp.argmax(fp8, axis=-1)).tolist()

    def alike(one: tuple[str, bool], other: tuple[str, bool]) -> list[int]:
        return [agreement(a, b) for a, b in zip(answers[one], answers[other], strict=True)]

    result = dict(
        environment=here,
        target=args.target,
        questions=len(prompts),
        tokens=len(divergence),
        kl_nats=dict(mean=float(np.mean(divergence)), **spread(divergence)),
        same_best_token=float(np.mean(same_best)),
        tokens_alike_fp8_and_float32=alike(("auto", False), ("fp8", False)),
        tokens_alike_plain_and_speculative=alike(("auto", False), ("auto", True)),
        tokens_alike_plain_and_speculative_fp8=alike(("fp8", False), ("fp8", True)),
    )
    print(f"{len(divergence)} tokens: mean KL {np.mean(divergence):.2g} nats, same best token {np.mean(same_best):.2%}")
    if args.out:
        write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
