"""Weight files as ``Source``s: safetensors by memory map, and PyTorch pickles through torch.

Nothing is copied here: ``read`` gives views of the file, so a tensor costs memory only while a rule fuses it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.table import ConversionError

__all__ = ["SafetensorsSource", "TorchSource"]

DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,  # for convert/fp8.py to multiply out
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 100 << 20  # the format's own limit


class SafetensorsSource:
    """The tensors of one or more safetensors files.

    The format is 8 bytes of header length, a JSON header, then raw little-endian data; it is read here because the
    library's numpy side knows no bfloat16. Every header is checked against its file before anything is mapped.
    """

    def __init__(self, files: Iterable[Path], weight_map: Mapping[str, Path] | None = None):
        """``weight_map`` (the index) says which file a tensor of several files is taken from."""
        self._tensors: dict[str, tuple[Path, np.dtype, tuple[int, ...], int]] = {}
        self._maps: dict[Path, np.memmap] = {}
        for path in files:
            for name, where in _read_header(path).items():
                if (weight_map or {}).get(name, path) == path:
                    self._tensors[name] = (path, *where)
        _check_index(weight_map, self._tensors)

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name][1]

    def read(self, name: str) -> np.ndarray:
        path, dtype, shape, start = self._tensors[name]
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, mode="r")
        data = self._maps[path][start : start + math.prod(shape) * dtype.itemsize]
        if start % dtype.itemsize:  # the format allows it, numpy's views do not
            data = data.copy()
        return np.asarray(data).view(dtype).reshape(shape)


def _check_index(weight_map: Mapping[str, Path] | None, found: Mapping[str, object]) -> None:
    for name, path in (weight_map or {}).items():
        if name not in found:
            raise ConversionError(f"the index says that {path} holds tensor {name}, which it lacks; fetch it again")


def _read_header(path: Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """{name: (dtype, shape, offset in the file)}."""
    damaged = f"{path} is damaged or not a safetensors file"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ConversionError(f"{damaged} (its header cannot be {length} bytes); fetch it again")
            header = json.loads(file.read(length), object_pairs_hook=_distinct)
    except OSError as error:
        raise ConversionError(f"cannot read {path} ({error.strerror}); fetch it again") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = "is not JSON" if isinstance(error, RecursionError | UnicodeError | json.JSONDecodeError) else error
        raise ConversionError(f"{damaged} (its header {reason}); fetch it again") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{damaged} (its header is not a JSON object); fetch it again")
    header.pop("__metadata__", None)
    tensors, spans, data = {}, [], 8 + length
    for name, entry in header.items():
        try:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            sane = isinstance(kind, str) and all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{damaged} (its header's entry for {name}); fetch it again") from error
        if sane and kind not in DTYPES:
            raise ConversionError(
                f"tensor {name} in {path} is stored as {kind}, which does not convert; use a checkpoint of "
                "float32, float16 or bfloat16 weights"
            )
        if not sane or end - begin != math.prod(shape) * (dtype := np.dtype(DTYPES[kind])).itemsize:
            raise ConversionError(f"{damaged} (its header's entry for {name}); fetch it again")
        if data + end > size:
            raise ConversionError(f"{path} is truncated ({size} bytes of at least {data + end}); fetch it again")
        tensors[name] = (dtype, shape, data + begin)
        spans += [(begin, end, name)] if begin < end else []
    for (_, before, first), (begin, _, second) in pairwise(sorted(spans)):
        if begin < before:
            raise ConversionError(f"{damaged} (its header puts {first} and {second} in one place); fetch it again")
    return tensors


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: json keeps the last of those that do not."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"names {twice} twice")
    return made


class TorchSource:
    """The tensors of ``pytorch_model*.bin``: pickles, so only through torch's weights-only loader, memory-mapped."""

    def __init__(self, files: Iterable[Path], weight_map: Mapping[str, Path] | None = None):
        files = list(files)
        try:
            import torch
        except ImportError as error:
            raise ConversionError(
                f"{files[0]} is a PyTorch pickle, which only torch reads; pip install torch, or use safetensors"
            ) from error
        self._tensors: dict[str, Any] = {}
        for path in files:
            try:
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files older than PyTorch 1.6 are no zip archives and cannot be mapped
                    state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # pickle, zip and torch errors of many kinds; all mean an unusable file
                kind = type(error).__name__
                raise ConversionError(f"torch cannot load {path} as plain weights ({kind}); fetch it again") from error
            if not isinstance(state, dict) or not all(
                isinstance(n, str) and isinstance(x, torch.Tensor) for n, x in state.items()
            ):
                raise ConversionError(f"{path} does not hold a dictionary of tensors; use the model's state_dict")
            self._tensors |= {n: t for n, t in state.items() if (weight_map or {}).get(n, path) == path}
        for name, tensor in self._tensors.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not dense or kind not in (*(np.dtype(d).name for d in DTYPES.values()),):
                how = tensor.dtype if dense else f"{tensor.layout} on {tensor.device}"  # sparse, or meta's of none
                raise ConversionError(
                    f"tensor {name} is stored as {how}, which does not convert; use a checkpoint of float32, float16 "
                    "or bfloat16 weights"
                )
        _check_index(weight_map, self._tensors)

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(str(self._tensors[name].dtype).removeprefix("torch."))  # ml_dtypes has named its own to numpy

    def read(self, name: str) -> np.ndarray:
        import torch

        # As integers of the size, since torch gives numpy neither bfloat16 nor FP8.
        dtype, tensor = self.dtype(name), self._tensors[name].detach().resolve_neg().contiguous()
        return tensor.view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy().view(dtype)
