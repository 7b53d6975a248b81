"""What is to be converted, opened: an HF directory, a hub name, or a GGUF file.

``open_source`` reads configs and headers only, so that everything wrong with a source is said before a weight is
read. Nothing outside the directory is opened: names in an index are plain file names, or refused.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from convert.fields import read_json
from convert.fp8 import FP8, Dequantized
from convert.table import ConversionError, TypedSource
from convert.tensors import SafetensorsSource, TorchSource

__all__ = ["CARRIED_FILES", "OpenSource", "open_config", "open_source"]

# Carried over as they are.
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class OpenSource:
    """Everything the converter needs to know of a source."""

    name: str  # for source.json: a hub name, or the last part of a path (no one's home directory)
    config: dict[str, Any]  # config.json; for GGUF one made from its metadata
    generation: dict[str, Any]  # generation_config.json, or {}
    tensors: TypedSource
    files: tuple[Path, ...]  # what the checkpoint is made from, to be hashed
    carried: dict[str, bytes]  # tokenizer files, chat template, generation_config.json
    notes: tuple[str, ...] = field(default=())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.tensors.shape(name) for name in self.tensors.names()}

    @property
    def dtype(self) -> str:
        """The float type that most elements have; integers do not count."""
        sizes: Counter[str] = Counter()
        for name in self.tensors.names():
            kind = self.tensors.dtype(name)
            if kind.kind not in "iub":
                sizes[kind.name] += prod(self.tensors.shape(name))
        return sizes.most_common(1)[0][0] if sizes else "float32"


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """Turn what the disk says of any file of ``source`` into one sentence."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"cannot read {error.filename or source} ({error.strerror or error}); check its name, and who may read it"
        ) from error


def open_source(source: str | Path) -> OpenSource:
    """Open a directory, a .gguf file, or (when no such path exists) a hub name."""
    path = Path(source)
    with _readable(source):
        if path.is_dir():
            return _open_directory(path, path.resolve().name)
        if path.is_file():
            if path.suffix.lower() == ".gguf":
                from convert.gguf_file import open_gguf

                return open_gguf(path)
            raise ConversionError(f"{path} is a file; give the directory that holds config.json, or a .gguf file")
        if HUB_NAME.fullmatch(str(source)):
            return _open_directory(_download(str(source)), str(source))
    raise ConversionError(f"{source} does not exist; give a model directory, a .gguf file or a hub name (org/name)")


def open_config(source: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json alone: of a target that a head is only checked against."""
    path = Path(source)
    with _readable(source):
        if not path.exists() and HUB_NAME.fullmatch(str(source)):
            path = _download(str(source), weights=False)
        if path.is_dir():
            return _read_configs(path)
    opened = open_source(path)
    return opened.config, opened.generation


def _read_configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config_file, generation_file = directory / "config.json", directory / "generation_config.json"
    if not config_file.is_file():
        raise ConversionError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint")
    return read_json(config_file), read_json(generation_file) if generation_file.is_file() else {}


def _open_directory(directory: Path, name: str) -> OpenSource:
    config, generation = _read_configs(directory)
    if "family" in config and (directory / "source.json").is_file():
        raise ConversionError(f"{directory} is a converted checkpoint already; use it as it is")
    tensors, weight_files = _open_weights(directory)
    if any(tensors.dtype(name) == FP8 for name in tensors.names()):
        tensors = Dequantized(tensors)
    return OpenSource(
        name=name,
        config=config,
        generation=generation,
        tensors=tensors,
        files=(directory / "config.json", *weight_files),
        carried={file: (directory / file).read_bytes() for file in CARRIED_FILES if (directory / file).is_file()},
    )


def _open_weights(directory: Path) -> tuple[TypedSource, tuple[Path, ...]]:
    """safetensors before pickles, one file before an index, as transformers looks for them."""
    for stem, suffix, reader in (("model", "safetensors", SafetensorsSource), ("pytorch_model", "bin", TorchSource)):
        single, index = directory / f"{stem}.{suffix}", directory / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return reader([single]), (single,)
        if index.is_file():
            weight_map = _weight_map(index, f".{suffix}")
            files = tuple(sorted(set(weight_map.values())))
            return reader(files, weight_map), (index, *files)
    raise ConversionError(
        f"{directory} has no model.safetensors, pytorch_model.bin or index of either; fetch the weights too"
    )


def _weight_map(index: Path, suffix: str) -> dict[str, Path]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ConversionError(f"{index} has no weight_map; fetch it again")
    for name in sorted(set(map(str, entries.values()))):
        # Plain names only: a path could lead out of the directory.
        if Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise ConversionError(f"{index} names {name!r}, which is not a plain *{suffix} file name; correct it")
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index} names {name}, which is missing; fetch it too")
    return {tensor: index.parent / str(name) for tensor, name in entries.items()}


def _download(name: str, *, weights: bool = True) -> Path:
    """A hub snapshot: safetensors where there are any, pickles otherwise. Only files at its top."""
    from huggingface_hub import errors, snapshot_download

    def fetch(patterns: Iterable[str]) -> Path:
        # "*" also matches "/" here, and Meta's repositories keep a second copy in original/.
        return Path(
            snapshot_download(name, allow_patterns=["config.json", *CARRIED_FILES, *patterns], ignore_patterns=["*/*"])
        )

    try:
        if not weights:
            return fetch([])
        directory = fetch(["*.safetensors", "*.safetensors.index.json"])
        if not any(directory.glob("*.safetensors")):
            directory = fetch(["*.bin", "*.bin.index.json"])
        return directory
    except errors.GatedRepoError as error:
        raise ConversionError(f"{name} is gated; accept its licence on the hub, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise ConversionError(
            f"{name} is neither a local path nor a hub repository; check the name (private ones need hf auth login)"
        ) from error
    except Exception as error:  # the client's errors are of many kinds and libraries; all mean that nothing came
        raise ConversionError(
            f"{name} is not a local path, and it cannot be fetched from the hub ({type(error).__name__}); check the "
            "path or the network"
        ) from error
