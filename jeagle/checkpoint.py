"""Converted checkpoints on disk: one directory, written once and never changed.

::

    config.json             our config (jeagle/config.py), nothing else
    params/                 one Orbax checkpoint (OCDBT, zarr3): {"blocks": {"0": {"qkv": {"kernel": ...}}}, ...}
    source.json             format_version, family, dtype, source and the SHA-256 of every file it was made from
    tokenizer.json, ...     the tokenizer's files, chat template and generation_config.json, as the source had them

``jeagle/checkpoint_writer.py`` makes one, and ``load`` restores it into an NNX module, each array straight into its
sharding. Knows nothing of foreign formats and nothing of tokenizers: their files are bytes here.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore as ts
from flax import nnx

from jeagle.config import ConfigError, EagleConfig, LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "Shardings",
    "is_checkpoint",
    "load",
    "load_config",
    "load_eagle",
    "load_llama",
    "ocdbt",
    "read_source",
]

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16")
READ_BYTES = 1 << 30  # what may wait in host memory for its device while a checkpoint is loaded

Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, said in one sentence that names it and the mend."""


def ocdbt(params: Path, path: str = "") -> dict[str, Any]:
    """The tensorstore spec of the key-value store in ``params``, or of what is under ``path`` in it."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": str(params)}, "path": path}


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a directory of ours, of whatever version."""
    source = _read_optional_json(Path(path) / "source.json")
    config = _read_optional_json(Path(path) / "config.json")
    return "format_version" in source and "family" in config


def load_config(directory: str | Path) -> LlamaConfig | EagleConfig:
    """The model a checkpoint holds. Raises CheckpointError in one sentence when it is not one of ours."""
    directory = Path(directory)
    read_source(directory)
    data = _read_json(directory / "config.json")
    family = data.get("family")
    try:
        if family == "llama":
            return LlamaConfig.from_json(data)
        if family == "eagle":
            return EagleConfig.from_json(data)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} is damaged ({error}); convert the model again") from error
    raise CheckpointError(
        f"{directory / 'config.json'} says family {family!r}, which this jeagle does not know; convert the model again"
    )


def load_llama(directory: str | Path, dtype: str = "auto", *, shardings: Shardings = None) -> Llama:
    """The target stored in ``directory``."""
    config = load_config(directory)
    if not isinstance(config, LlamaConfig):
        raise CheckpointError(f"{directory} holds an EAGLE head, not a target model; give it as the head")
    return _restore(Path(directory), config, Llama, dtype, shardings)


def load_eagle(directory: str | Path, dtype: str = "auto", *, shardings: Shardings = None) -> EagleHead:
    """The EAGLE head stored in ``directory``."""
    config = load_config(directory)
    if not isinstance(config, EagleConfig):
        raise CheckpointError(f"{directory} holds a target model, not an EAGLE head; give it as the model")
    return _restore(Path(directory), config, EagleHead, dtype, shardings)


def load(directory: str | Path, dtype: str = "auto", *, shardings: Shardings = None) -> Llama | EagleHead:
    """Whatever model is stored in ``directory``.

    Args:
      dtype: of the weights in memory: "float32", "bfloat16", or "auto" for what is stored. Integers are never cast.
      shardings: one sharding for all, or one per dotted path; without, all goes to the default device.
    """
    eagle = isinstance(load_config(directory), EagleConfig)
    return (load_eagle if eagle else load_llama)(directory, dtype, shardings=shardings)


def _restore(directory: Path, config: Any, module: Callable[..., Any], dtype: str, shardings: Shardings) -> Any:
    """Build the module without weights, read each array into its place, and put the two together."""
    stored = read_source(directory)["dtype"]
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype must be 'auto', 'float32' or 'bfloat16', got {dtype!r}")
    param_dtype = jnp.dtype(stored if dtype == "auto" else dtype)
    abstract = nnx.eval_shape(lambda: module(config, dtype=param_dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(path: str, value: Any) -> jax.ShapeDtypeStruct:
        sharding = shardings.get(path) if isinstance(shardings, Mapping) else shardings
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding or default)

    wanted = {path: place(path, variable.get_value()) for path, (_, variable) in variables.items()}
    try:
        arrays = _read_arrays(directory, wanted)
    except ValueError as error:  # all that tensorstore raises
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{directory / 'params'} is damaged; convert the model again ({reason})") from error
    filled = [(path, variable.replace(arrays[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _read_arrays(directory: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Every array onto its devices, each device's part read once. At most READ_BYTES wait in host memory."""
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100 << 20}})
    params = (directory / "params").absolute()
    if not (params / "manifest.ocdbt").is_file():
        raise CheckpointError(f"{params} is missing or incomplete; convert the model again")
    keys = ts.KvStore.open(ocdbt(params), context=context).result().list().result()
    found = {key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")}
    opening = {
        path: ts.open({"driver": "zarr3", "kvstore": ocdbt(params, path)}, context=context, read=True)
        for path in sorted(found)
    }
    stores = {path: future.result() for path, future in opening.items()}
    _check_shapes(directory, {path: store.shape for path, store in stores.items()}, wanted)

    arrays: dict[str, jax.Array] = {}
    reading: deque[tuple[str, list[tuple[list[jax.Device], ts.Future]], int]] = deque()
    waiting = 0

    def place_next() -> int:
        path, parts, size = reading.popleft()
        leaf = wanted[path]
        on_devices = [jax.device_put(part.result(), device) for devices, part in parts for device in devices]
        arrays[path] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, on_devices)
        return size

    for path, leaf in wanted.items():
        store = ts.cast(stores[path], leaf.dtype.name)
        parts = _devices_by_part(leaf)
        size = leaf.dtype.itemsize * sum(math.prod(map(len, part)) for part in parts)
        while reading and waiting + size > READ_BYTES:
            waiting -= place_next()
        futures = [
            (devices, store[tuple(slice(axis.start, axis.stop) for axis in part)].read())
            for part, devices in parts.items()
        ]
        reading.append((path, futures, size))
        waiting += size
    while reading:
        place_next()
    return arrays


def _devices_by_part(leaf: jax.ShapeDtypeStruct) -> dict[tuple[range, ...], list[jax.Device]]:
    """Which of this process's devices hold which part; replicas share one read."""
    parts: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        part = tuple(range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        parts.setdefault(part, []).append(device)
    return parts


def _check_shapes(
    directory: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found:
            problem = f"lacks tensor {path}"
        elif path not in wanted:
            problem = f"holds tensor {path}, which its config.json does not speak of"
        elif tuple(found[path]) != wanted[path].shape:
            problem = f"holds tensor {path} of shape {tuple(found[path])}, its config.json says {wanted[path].shape}"
        else:
            continue
        raise CheckpointError(f"{directory} {problem}; convert the model again")


def read_source(directory: Path) -> dict[str, Any]:
    """What a checkpoint was made from (source.json), after everything that can be wrong with it has been asked."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}; give the directory that python -m convert wrote")
    if not (directory / "source.json").is_file():
        raise CheckpointError(
            f"{directory} is not a jeagle checkpoint (no source.json); make one with python -m convert {directory} "
            "DESTINATION"
        )
    source = _read_json(directory / "source.json")
    version = source.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has format_version {version!r}, this jeagle reads {FORMAT_VERSION}; convert the model again"
        )
    if source.get("dtype") not in DTYPES:
        raise CheckpointError(f"{directory / 'source.json'} has dtype {source.get('dtype')!r}; convert the model again")
    return source


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}); convert the model again") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{path} is not valid JSON ({error}); convert the model again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; convert the model again")
    return data


def _read_optional_json(path: Path) -> dict[str, Any]:
    try:
        return _read_json(path)
    except CheckpointError:
        return {}
