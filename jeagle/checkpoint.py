"""Converted checkpoints on disk: one directory, written once and never changed.

::

    config.json             our config (jeagle/config.py), nothing else
    params/                 one Orbax checkpoint (OCDBT, zarr3): {"blocks": {"0": {"qkv": {"kernel": ...}}}, ...};
                            of dtype fp8, FP8 matrices and beside each its scales, {"kernel_scale": ...}
    source.json             format_version, family, dtype, source and the SHA-256 of every file it was made from
    tokenizer.json, ...     the tokenizer's files, chat template and generation_config.json, as the source had them

``jeagle/checkpoint_writer.py`` makes one, and ``load`` restores it into an NNX module, each part of an array straight
onto its device. Knows nothing of foreign formats and nothing of tokenizers: their files are bytes here.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore as ts
from flax import nnx

from jeagle.config import BlockConfig, ConfigError, EagleConfig, LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.llama4 import Llama4, Llama4EagleHead
from jeagle.llama4_config import Llama4Config, Llama4EagleConfig
from jeagle.placement import Part, Placement, filled, placements, repeat_kv_heads, variables
from jeagle.sharding import Layout, MeshError
from jeagle.weights import Fp8, dtype_of, dtype_of_name, scale_of

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "CheckpointError",
    "abstract",
    "is_checkpoint",
    "load",
    "load_config",
    "load_eagle",
    "load_head",
    "load_llama",
    "ocdbt",
    "read_source",
]

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "fp8")
READ_BYTES = 1 << 30  # what may wait in host memory for its device while a checkpoint is loaded

# Every kind of model by its family: its description and its module.
FAMILIES: dict[str, tuple[Any, Any]] = {
    config.family: (config, module)
    for config, module in (
        (LlamaConfig, Llama),
        (Llama4Config, Llama4),
        (EagleConfig, EagleHead),
        (Llama4EagleConfig, Llama4EagleHead),
    )
}


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
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{directory / 'config.json'} says family {family!r}, which this jeagle does not know; convert the model "
            "again"
        )
    try:
        return FAMILIES[family][0].from_json(data)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} is damaged ({error}); convert the model again") from error


def abstract(config: BlockConfig, dtype: Any = jnp.float32) -> Any:
    """The module that ``config`` describes, with shapes in place of weights. dtype: "fp8", or of all weights."""
    module = FAMILIES[config.family][1]
    return nnx.eval_shape(lambda: module(config, dtype=dtype_of_name(dtype), rngs=nnx.Rngs(0)))


def load_llama(directory: str | Path, dtype: str = "auto", *, layout: Layout | None = None) -> Llama:
    """The target stored in ``directory``."""
    config = load_config(directory)
    if not isinstance(config, LlamaConfig):
        raise CheckpointError(f"{directory} holds an EAGLE head, not a target model; give it as the head")
    return _restore(Path(directory), config, dtype, layout)


def load_eagle(directory: str | Path, dtype: str = "auto", *, layout: Layout | None = None) -> EagleHead:
    """The EAGLE head stored in ``directory``."""
    config = load_config(directory)
    if not isinstance(config, EagleConfig):
        raise CheckpointError(f"{directory} holds a target model, not an EAGLE head; give it as the model")
    return _restore(Path(directory), config, dtype, layout)


def load_head(directory: str | Path, target: Llama, *, layout: Layout | None = None) -> EagleHead:
    """The head in ``directory`` as it goes with ``target``: in the dtype that computes, as they share embeddings and
    features; in FP8 where both are."""
    both = isinstance(dtype_of(target), Fp8) and read_source(Path(directory))["dtype"] == "fp8"
    return load_eagle(directory, "fp8" if both else target.compute_dtype.name, layout=layout)


def load(directory: str | Path, dtype: str = "auto", *, layout: Layout | None = None) -> Llama | EagleHead:
    """Whatever model is stored in ``directory``.

    Args:
      dtype: of the weights in memory: "float32", "bfloat16", or "auto" for what is stored. Integers are never cast.
        "fp8" takes a checkpoint that was converted so; in another dtype its numbers come multiplied with their scales.
      layout: over which devices; each is given, and reads, its own part. None is the default device.
    """
    eagle = isinstance(load_config(directory), EagleConfig)
    return (load_eagle if eagle else load_llama)(directory, dtype, layout=layout)


def _restore(directory: Path, config: Any, dtype: str, layout: Layout | None) -> Any:
    """Build the module without weights, read each array into its place, and put the two together."""
    stored_dtype = read_source(directory)["dtype"]
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    dtype = stored_dtype if dtype == "auto" else dtype
    if dtype == "fp8" and stored_dtype != "fp8":
        raise CheckpointError(
            f"{directory} holds {stored_dtype} weights, which are not loaded as {dtype}; convert its source again with "
            f"--dtype {dtype}"
        )
    wanted = dtype_of_name(dtype)
    read_as = Fp8(wanted) if stored_dtype == "fp8" and dtype != "fp8" else wanted
    laid_out = config if layout is None else repeat_kv_heads(config, layout)
    module = abstract(laid_out, read_as)
    try:
        arrays = _read_arrays(directory, placements(abstract(config, read_as), module, layout))
    except ValueError as error:  # all that tensorstore raises
        if isinstance(error, (CheckpointError, MeshError)):
            raise
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{directory / 'params'} is damaged; convert the model again ({reason})") from error
    if read_as != wanted:
        arrays, module = _widened(arrays, module, wanted), abstract(laid_out, wanted)
    return filled(module, arrays)


def _widened(arrays: Mapping[str, jax.Array], module: nnx.Module, dtype: Any) -> dict[str, jax.Array]:
    """The weights of ``module``, which is FP8, by dotted path: numbers times scales in ``dtype``, and no scales."""

    @partial(jax.jit, static_argnums=2)
    def multiply(number: jax.Array, scale: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
        return (number.astype(jnp.float32) * jnp.expand_dims(scale, contracted)).astype(dtype)

    described, arrays = variables(module), dict(arrays)
    for path in [path for path in arrays if scale_of(path) in arrays]:
        contracted = described[path].get_metadata()["contracted"]
        arrays[path] = multiply(arrays[path], arrays.pop(scale_of(path)), contracted)
    return arrays


def _read_arrays(directory: Path, wanted: Mapping[str, Placement]) -> dict[str, jax.Array]:
    """Every array onto its devices, each part read once. At most READ_BYTES wait in host memory."""
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
    reading: deque[tuple[str, list[tuple[list[jax.Device], Part, list[ts.Future]]], int]] = deque()
    waiting = 0

    def place_next() -> int:
        path, parts, size = reading.popleft()
        placement = wanted[path]
        on_devices = []
        for devices, part, futures in parts:
            value = part.join([future.result() for future in futures])
            on_devices += [jax.device_put(value, device) for device in devices]
        arrays[path] = jax.make_array_from_single_device_arrays(placement.shape, placement.sharding, on_devices)
        return size

    for path, placement in wanted.items():
        store = ts.cast(stores[path], placement.dtype.name)
        parts = [(devices, placement.part(index)) for index, devices in _devices_by_index(placement).items()]
        size = placement.dtype.itemsize * sum(part.size for _, part in parts)
        while reading and waiting + size > READ_BYTES:
            waiting -= place_next()
        futures = [(devices, part, [store[slices].read() for slices in part.slices]) for devices, part in parts]
        reading.append((path, futures, size))
        waiting += size
    while reading:
        place_next()
    return arrays


def _devices_by_index(placement: Placement) -> dict[tuple[slice, ...], list[jax.Device]]:
    """Which of this process's devices hold which part; replicas share one read."""
    parts: dict[tuple[slice, ...], list[jax.Device]] = {}
    for device, index in placement.sharding.addressable_devices_indices_map(placement.shape).items():
        assert index is not None
        parts.setdefault(index, []).append(device)
    return parts


def _check_shapes(directory: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Placement]) -> None:
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found:
            problem = f"lacks tensor {path}"
        elif path not in wanted:
            problem = f"holds tensor {path}, which its config.json does not speak of"
        elif tuple(found[path]) != wanted[path].stored:
            problem = f"holds tensor {path} of shape {tuple(found[path])}, its config.json says {wanted[path].stored}"
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
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; of nesting without end
        raise CheckpointError(f"{path} is not valid JSON ({error}); convert the model again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; convert the model again")
    return data


def _read_optional_json(path: Path) -> dict[str, Any]:
    try:
        return _read_json(path)
    except CheckpointError:
        return {}
