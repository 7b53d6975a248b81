"""Tiny random models whose choices are clear, and the statistics the sampling tests share."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import nnx

from jeagle.config import LlamaConfig
from jeagle.llama import Llama
from jeagle.sampling import RowSampling, SamplingParams, seed_keys


def fill_randomly[M: nnx.Module](module: M, seed: int, *, dtype=jnp.float32) -> M:
    """Give every parameter of a (perhaps abstract) module random weights, made in numpy: nothing is compiled.

    Norms are near 1, biases small, embeddings of size 1, and matrices keep the size of what passes through them; the LM
    head triples it, so that the largest logit stands out from the others.
    """
    rng = np.random.default_rng(seed)
    for path, parameter in nnx.iter_graph(module):
        if not isinstance(parameter, nnx.Param):
            continue
        name, shape = path[-1], parameter.shape
        noise = rng.standard_normal(shape)
        if name == "scale":
            value = 1 + 0.2 * noise
        elif name == "bias":
            value = 0.1 * noise
        elif name == "embed":
            value = noise
        elif name == "lm_head":
            value = 3 * noise / math.sqrt(shape[0])
        else:  # a Linear kernel: [*inputs, *outputs], and only the attention output has several inputs
            inputs = math.prod(shape[:3]) if path[-2] == "out" else shape[0]
            value = noise / math.sqrt(inputs)
        parameter.set_value(jnp.asarray(value, dtype))
    return module


def tiny_llama(seed: int = 0, *, dtype=jnp.float32, **overrides) -> Llama:
    """``LlamaConfig.tiny(**overrides)`` with clear-cut random weights."""
    config = LlamaConfig.tiny(**overrides)
    return fill_randomly(nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0))), seed, dtype=dtype)


def random_tree_parents(rng: np.random.Generator, num_nodes: int) -> list[int]:
    """Parents of a random tree, each before its children; the root is its own parent."""
    return [0] + [int(rng.integers(0, node)) for node in range(1, num_nodes)]


def depths_of(parents: list[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def ancestors_of(node: int, parents: list[int]) -> list[int]:
    """From the root down to the node, both included."""
    line = [node]
    while line[0] != 0:
        line.insert(0, parents[line[0]])
    return line


def same_for_all_rows(params: SamplingParams, num_rows: int, seed: int = 0) -> RowSampling:
    """One setting, many independent rows."""
    return jax.tree.map(jnp.asarray, RowSampling.stack([params] * num_rows, seed_keys(seed, num_rows)))


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of ``counts`` under ``probabilities``; cells that expect fewer than 5 are pooled.

    A count where the probability is 0 gives 0.0.
    """
    counts, probabilities = np.asarray(counts, float).ravel(), np.asarray(probabilities, float).ravel()
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    cells = list(zip(counts[~rare], expected[~rare]))
    if expected[rare].sum() > 0:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    if len(cells) < 2:
        return 1.0
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    return float(scipy.stats.chi2.sf(statistic, len(cells) - 1))


class PeakBytes:
    """``with PeakBytes() as peak``: afterwards ``peak.bytes`` is the most memory it took, looked at every 5 ms."""

    STATUS = Path("/proc/self/status")
    bytes = 0

    @classmethod
    def can_be_read(cls) -> bool:
        return cls.STATUS.exists()

    def now(self) -> int:
        """Of the process. Mapped files do not count: the kernel may drop them."""
        with self.STATUS.open() as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, self.now() - self.before)

    def __enter__(self) -> PeakBytes:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again, unseen
        self.before, self.done = self.now(), threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def __exit__(self, *error) -> None:
        last = self.now() - self.before  # a watcher that got no turn has seen nothing
        self.done.set()
        self.watcher.join()
        self.bytes = max(self.bytes, last)


class no_compilation:
    """Fails if XLA compiles anything inside the block, or a program of this name."""

    def __init__(self, name: str | None = None) -> None:
        self.wanted, self.names = name, list[str]()

    def __enter__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and self.wanted in (None, fun_name):
            self.names.append(f"{fun_name} {seconds:.1f} s")

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        assert not self.names, self.names
