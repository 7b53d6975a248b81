"""What the measuring scripts share of measuring: bandwidth and bytes, memory, runs that compile nothing, host time."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import LLM, EagleConfig, SamplingParams
from jeagle.checkpoint import load_head, load_llama
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Batch
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.locate import cache_directory, check_vocabulary, locate
from jeagle.sampling import RowSampling, seed_keys

__all__ = [
    "bandwidth",
    "compiled_before",
    "head_bytes",
    "host_share",
    "load_pair",
    "make_batch",
    "memory_now",
    "peak_memory",
    "random_head",
    "target_bytes",
]


def load_pair(model: str | Path, draft: str | Path | None, dtype: str = "auto") -> tuple[Llama, EagleHead | None, Path]:
    """Target, head and the target's checkpoint directory, as ``LLM`` finds them: one copy of the weights for several
    ``LLM``s."""
    cache = cache_directory()
    directory = locate(model, cache, kind="llama")
    target = load_llama(directory, dtype=dtype)
    if draft is None:
        return target, None, directory
    found = locate(draft, cache, kind="eagle", target=directory)
    check_vocabulary(found, directory)
    return target, load_head(found, target), directory


def random_head(target: Llama, seed: int = 0) -> EagleHead:
    """An untrained EAGLE-3 head that borrows the target's LM head: it runs at full cost and rarely guesses right."""
    config = EagleConfig.for_target(target.config, "eagle3", own_lm_head=False)
    return EagleHead(config, dtype=target.embed[...].dtype, rngs=nnx.Rngs(seed))


def bandwidth(repeats: int = 7) -> float:
    """Bytes per second of reading 1 GB of float32: the better of numpy and XLA."""
    host = np.ones(1 << 28, np.float32)
    device = jnp.asarray(host)
    xla_sum = jax.jit(jnp.sum)
    best = np.inf
    for _ in range(repeats):
        for read in (lambda: float(host.sum()), lambda: float(xla_sum(device))):
            began = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - began)
    return host.nbytes / best


def target_bytes(target: Llama) -> int:
    """Weights that one forward reads: all, but for an untied embedding, which is a look-up of a few rows."""
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(target)))
    return weights if target.lm_head is None else weights - target.embed[...].nbytes


def head_bytes(head: EagleHead, target: Llama) -> int:
    """Weights that one step of the head reads, those of a borrowed LM head among them."""
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(head)))
    if head.embed is not None:
        weights -= head.embed[...].nbytes
    if not head.config.own_lm_head:
        weights += (target.embed if target.lm_head is None else target.lm_head)[...].nbytes
    return weights


def peak_memory() -> int:
    """Most bytes held so far: of the device where it says so, else of the process. It never falls again."""
    if found := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def memory_now() -> int:
    """Bytes held now: of the device where it says so, else the process's own, mapped files left out."""
    if found := (jax.devices()[0].memory_stats() or {}).get("bytes_in_use"):
        return found
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def compiled_before[T](llm: LLM, run: Callable[[], T]) -> T:
    """What ``run`` returns, of a run that compiled nothing: one that did is made again."""
    before = None
    while before != llm.compiled_programs:
        before = llm.compiled_programs
        result = run()
    return result


def make_batch(rows: int, prompt: Sequence[int], max_tokens: int) -> Batch:
    sampling = RowSampling.stack([SamplingParams()] * rows, seed_keys(0, rows))
    limits = np.full(rows, max_tokens, np.int32)
    return Batch([np.array(prompt, np.int32)] * rows, sampling, np.full((rows, 4), -1, np.int32), limits)


def host_share(llm: LLM, prompt: list[int], tokens: int, repeats: int, *, speculative: bool = False) -> dict:
    """Share of generate's decode time outside the device loop, at batch 1; the best of ``repeats``.

    Counted: everything between launches, and for every launch what one of no rounds costs (key, dispatch, return).
    """
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    once = dict(speculative=speculative, use_tqdm=False)
    decoder, launch = llm._decoder, llm._decoder.launch
    spent: list[float] = []
    last: list[Program] = []

    def timed_launch(state: DecodeState, program: Program, most_rounds: int, least_running: int = 1) -> DecodeState:
        began = time.perf_counter()
        state = jax.block_until_ready(launch(state, program, most_rounds, least_running))
        spent.append(time.perf_counter() - began)
        last[:] = [program]
        return state

    llm.generate(prompt, params, **once)  # compiles
    decoder.launch = timed_launch  # type: ignore[method-assign]
    best: dict = {}
    try:
        for _ in range(repeats):
            spent.clear()
            (out,) = llm.generate(prompt, params, **once)
            whole, launches, in_launches = out.metrics.decode_seconds, len(spent), sum(spent)
            (program,) = last
            bucket = next(p for p in reversed(llm.compiled_programs) if p.program == program)
            state = decoder.start(make_batch(1, prompt, tokens), program, capacity=bucket.capacity, chunk=256)
            for _ in range(5):
                state = timed_launch(state, program, 0)
            host = whole - in_launches + launches * min(spent[-5:])
            if not best or host / whole < best["host_share"]:
                found = dict(tokens=tokens, launches=launches, generate_s=whole, host_ms=host * 1e3)
                best = dict(found, host_share=host / whole)
    finally:
        decoder.launch = launch  # type: ignore[method-assign]
    return best
