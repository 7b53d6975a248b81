"""Foreign checkpoints to ours: ``convert(SOURCE, DESTINATION)``, or ``python -m convert``.

The only place that knows foreign names and layouts. A conversion first reads configs and headers and refuses what it
cannot convert; then it streams one tensor at a time; at the end the finished directory gets its name.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from flax import nnx
from tqdm import tqdm

from convert import llama, llama4
from convert.fp8 import FP8, Dequantized
from convert.source import OpenSource, open_config, open_source
from convert.table import ConversionError, Description, Rule, TypedSource, fill
from jeagle.checkpoint import abstract, is_checkpoint, load_config
from jeagle.checkpoint_writer import CheckpointWriter, check_new
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.placement import variables

__all__ = ["ConversionError", "convert", "read_target"]

DTYPES = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "fp8": "fp8"}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "auto",
    kind: str = "auto",
    target: str | Path | None = None,
    taps: Literal["input", "output"] | None = None,
    progress: bool = True,
) -> Path:
    """Convert ``source`` into the new directory ``destination`` and return its path.

    Args:
      source: an HF directory, a hub name (org/name), or a .gguf file.
      dtype: float32 (f32), bfloat16 (bf16), fp8 (matrices of 8 bits: ``jeagle/weights.py``), or auto: the source's own.
        float16 becomes float32, which loses nothing.
      kind: what the source is: llama, eagle, or auto, which looks.
      target: for an EAGLE head, its target (converted, HF or GGUF), against which it is checked.
      taps: for an EAGLE head, whether its tap ids name block inputs or outputs, where the source is ambiguous.
      progress: print what was found and a progress bar (on a terminal).

    Raises:
      ConversionError, CheckpointError: one sentence. Nothing is left behind.
    """
    _check_choice("dtype", dtype, ("auto", *DTYPES))
    _check_choice("kind", kind, ("auto", "llama", "eagle"))
    _check_choice("taps", taps, (None, "input", "output"))
    destination = Path(destination)
    check_new(destination)  # the writer asks again; this spares opening, or downloading, the source
    opened = open_source(source)
    description = _describe(opened, kind, None if target is None else read_target(target), taps)
    stored, dtype_note = _choose_dtype(dtype, opened.dtype)
    if progress:
        print(*opened.notes, *description.notes, *dtype_note, sep="\n")

    elements = sum(prod(shape) for rule in description.rules for shape in rule.source_shapes)
    itemsize = {"float32": 4, "bfloat16": 2, "fp8": 1}[stored]
    # Before the module of a config that the tensors belie is made, and the disk asked for room for it.
    tensors = fill(description.rules, opened.tensors, ignore=description.ignore)
    weights = variables(abstract(description.config, stored))
    scales = _keep_scales(opened.tensors, description.rules, weights)
    with (
        _Hashes(opened.files) as hashes,
        CheckpointWriter(destination, expected_bytes=elements * itemsize) as writer,
        # disable=None: no bar where stderr is not a terminal
        tqdm(total=elements * itemsize, unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for path, array in tensors:
            writer.add_weight(path, array, weights[path], scales[path]() if path in scales else None)
            bar.update(array.size * itemsize)
            del array  # the next one is made before the loop variable changes
        about = {"family": description.config.family, "dtype": stored, "source": opened.name, "sha256": hashes.result()}
        return writer.finish(description.config, about, opened.carried)


def _keep_scales(
    source: TypedSource, rules: list[Rule], weights: Mapping[str, nnx.Variable]
) -> dict[str, Callable[[], np.ndarray]]:
    """By path, how to make the scales of the matrices that are FP8 in the source and stay as they are."""
    if not isinstance(source, Dequantized):
        return {}
    wanted = {path: v.get_metadata()["contracted"] for path, v in weights.items() if v.get_value().dtype == FP8}
    kept = source.keep(rules, wanted)
    return {r.target: partial(source.scale, r, wanted[r.target]) for r in rules if r.target in kept}


def _describe(
    opened: OpenSource, kind: str, target: LlamaConfig | None, taps: Literal["input", "output"] | None
) -> Description:
    from convert import eagle

    if kind == "eagle" or (kind == "auto" and eagle.is_eagle(opened.config, opened.shapes)):
        description = eagle.describe(opened.config, opened.shapes, target=target, taps=taps)
        assert isinstance(description.config, EagleConfig)
        eagle.check_token_maps(opened.tensors, description.config)
        return description
    if target is not None or taps is not None:
        raise ConversionError(f"{opened.name} is a target model; --target and --taps belong to EAGLE heads, drop them")
    return _family(opened.config).describe(opened.config, opened.shapes, generation=opened.generation)


def read_target(target: str | Path) -> LlamaConfig:
    """The config of a target, converted or not, without its weights. Raises ConversionError, CheckpointError."""
    if not is_checkpoint(target):
        config, generation = open_config(target)
        return _family(config).read_config(config, generation=generation)
    ours = load_config(target)
    if not isinstance(ours, LlamaConfig):
        raise ConversionError(f"{target} holds an EAGLE head; give its target model as --target")
    return ours


def _family(config: Mapping[str, Any]) -> ModuleType:
    """The module that knows this family of targets."""
    return llama4 if llama4.is_llama4(config) else llama


def _choose_dtype(asked: str, found: str) -> tuple[str, tuple[str, ...]]:
    if asked != "auto":
        return DTYPES[asked], ()
    if found in DTYPES:
        return found, (f"dtype: {found}, as the source",)
    return "float32", (f"dtype: float32, which holds {found} exactly; --dtype bfloat16 takes half the space",)


def _check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ConversionError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


class _Hashes:
    """SHA-256 of files, made beside the conversion: hashing a large checkpoint takes as long as converting it."""

    def __init__(self, files: Iterable[Path]):
        self._files = list(files)
        self._stop = threading.Event()

    def __enter__(self) -> _Hashes:
        self._pool = ThreadPoolExecutor(1)
        self._futures = {file.name: self._pool.submit(self._hash, file) for file in self._files}
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def result(self) -> dict[str, str]:
        return {name: future.result() for name, future in self._futures.items()}

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._stop.is_set() and (block := file.read(1 << 20)):
                digest.update(block)
        return digest.hexdigest()
