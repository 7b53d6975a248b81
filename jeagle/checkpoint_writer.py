"""Writes converted checkpoints (``jeagle/checkpoint.py`` says what they are and reads them).

Tensor by tensor, so that memory never holds a model, into a temporary sibling that gets its name at the end: whatever
happens before leaves no destination.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import tensorstore as ts
from flax import nnx

from jeagle.checkpoint import FORMAT_VERSION, CheckpointError, abstract, ocdbt
from jeagle.config import BlockConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.placement import axes_of, dotted, variables
from jeagle.sharding import split_axis
from jeagle.weights import FP8, Fp8, dtype_of, quantize, scale_of

__all__ = ["CheckpointWriter", "check_new", "explained", "locked_sibling", "save"]

CHUNK_BYTES = 32 << 20  # most of one zarr chunk
SHARDS = 8  # devices of the largest mesh in use, of which each should read its own chunks alone ..
WORTH_SPLITTING = 1 << 20  # .. of tensors of at least so many bytes
COMMIT_BYTES = 128 << 20  # one OCDBT transaction: small tensors share data files, large ones never pile up


class CheckpointWriter:
    """Writes a checkpoint beside ``destination`` and renames it there in ``finish``; any other end removes it.

    Arrays go to disk through tensorstore and not through Orbax's ``save``, which wants the whole tree in memory (and
    its partial saves a copy of each tensor). What is written is Orbax's own format: stock Orbax restores it (tested).
    """

    def __init__(self, destination: str | Path, *, expected_bytes: int = 0):
        self.destination = Path(destination).absolute()
        self._expected_bytes = expected_bytes
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100 << 20}})
        self._transaction: ts.Transaction | None = None
        self._pending_bytes = 0

    def __enter__(self) -> Self:
        check_new(self.destination)
        with explained(self.destination), contextlib.ExitStack() as stack:
            self._directory = stack.enter_context(locked_sibling(self.destination))
            free = shutil.disk_usage(self.destination.parent).free
            if free < self._expected_bytes:
                raise CheckpointError(
                    f"{self.destination} needs {_gigabytes(self._expected_bytes)} but its disk has "
                    f"{_gigabytes(free)} free; make room or choose another destination"
                )
            self._sibling = stack.pop_all()
        return self

    def add(self, path: str, array: np.ndarray, dtype: Any = None, *, split_axis: int = 0) -> None:
        """Write one tensor under its dotted path, cast to ``dtype`` piece by piece. ``array`` may be any view.

        split_axis: the axis that meshes split. Chunks are cut along it, so that a device reads its part and no more.
        """
        if path in self._shapes:
            raise ValueError(f"{path} was already written")
        dtype = np.dtype(array.dtype if dtype is None else dtype)
        self._shapes[path] = array.shape
        chunk = _chunk_shape(array.shape, dtype.itemsize, split_axis)
        spec = _array_spec(self._directory / "params", path, array.shape, chunk, dtype)
        with explained(self.destination):
            store = self._open(spec, create=True)
            starts = [range(0, length, step) for length, step in zip(array.shape, chunk, strict=True)]
            for corner in itertools.product(*starts):
                index = tuple(
                    slice(start, min(start + step, length))
                    for start, step, length in zip(corner, chunk, array.shape, strict=True)
                )
                piece = array[index].astype(dtype, copy=False)
                if self._pending_bytes + piece.nbytes > COMMIT_BYTES and self._pending_bytes:
                    self._commit()
                    store = self._open(spec)
                # The transaction may keep the piece until it commits: no one writes to converted arrays.
                store[index].write(piece, can_reference_source_data_indefinitely=True).result()
                self._pending_bytes += piece.nbytes
            if array.size * dtype.itemsize > COMMIT_BYTES // 2:
                self._commit()  # a waiting piece would keep the whole array in memory while the next one is made

    def add_weight(self, path: str, array: np.ndarray, variable: nnx.Variable, scale: Any = None) -> None:
        """Write a weight in the dtype that ``variable``, of an abstract module, has.

        An FP8 matrix is written with its scales: ``scale`` where ``array`` is FP8 already, else both are made here.
        """
        wanted, axes = variable.get_value(), axes_of(variable)
        if wanted.dtype == FP8:
            contracted = variable.get_metadata()["contracted"]
            if array.dtype != FP8:
                array, scale = quantize(array, contracted)
            if scale is not None:
                channels = tuple(axis for i, axis in enumerate(axes) if i not in contracted)
                self.add(scale_of(path), scale, split_axis=split_axis(channels))
        self.add(path, array, wanted.dtype, split_axis=split_axis(axes))

    def finish(
        self, config: BlockConfig, source: Mapping[str, Any], extra_files: Mapping[str, bytes | Path] | None = None
    ) -> Path:
        """Complete the checkpoint and give it its name. Raises if another process took the name meanwhile."""
        with explained(self.destination):
            self._commit()
            _write_json(self._directory / "params" / "_METADATA", _orbax_metadata(self._shapes))
            _write_json(self._directory / "config.json", config.to_json())
            for name, content in (extra_files or {}).items():
                if Path(name).name != name:
                    raise ValueError(f"{name!r} is not a plain file name")
                if isinstance(content, Path):
                    shutil.copyfile(content, self._directory / name)
                else:
                    (self._directory / name).write_bytes(content)
            _write_json(self._directory / "source.json", {"format_version": FORMAT_VERSION, **source})
            try:
                self._directory.rename(self.destination)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise CheckpointError(
                        f"{self.destination} was made by another process meanwhile; remove it or choose another "
                        "destination"
                    ) from error
                raise
        return self.destination

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transaction is not None:
            # After an interrupt a commit may still run: wait for it, or it would write into what is being removed.
            self._transaction.abort()
            with contextlib.suppress(Exception):
                self._transaction.commit_async().result()
        self._sibling.close()

    def _open(self, spec: dict[str, Any], *, create: bool = False) -> ts.TensorStore:
        if self._transaction is None:
            self._transaction = ts.Transaction()
        return ts.open(spec, open=True, create=create, context=self._context, transaction=self._transaction).result()

    def _commit(self) -> None:
        if self._transaction is not None:
            self._transaction.commit_async().result()
            self._transaction, self._pending_bytes = None, 0


def save(
    module: Llama | EagleHead,
    destination: str | Path,
    *,
    dtype: str = "float32",
    source: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
) -> Path:
    """A module in memory as a checkpoint: its weights in ``dtype``, its integer tables as they are.

    dtype: "float32", "bfloat16" or "fp8". Raises CheckpointError for FP8 weights in another dtype.
    """
    config = module.config
    if isinstance(dtype_of(module), Fp8) and dtype != "fp8":
        raise CheckpointError(f"{destination} is to hold FP8 weights as {dtype}; save them with dtype fp8")
    described = variables(abstract(config, dtype))
    about = {"family": config.family, "dtype": dtype, **(source or {})}
    with CheckpointWriter(destination) as writer:
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            writer.add_weight(dotted(path), np.asarray(variable.get_value()), described[dotted(path)])
        return writer.finish(config, about, extra_files)


def _chunk_shape(shape: tuple[int, ...], itemsize: int, split_axis: int) -> tuple[int, ...]:
    """Cut along ``split_axis`` as SHARDS devices would, then along the first axis until CHUNK_BYTES are enough.

    Chunks of equal size where there are any: the last one is stored whole, and its padding read on every start.
    """
    chunk = [max(1, n) for n in shape]
    if math.prod(chunk) * itemsize >= WORTH_SPLITTING:
        chunk[split_axis] = math.ceil(chunk[split_axis] / SHARDS)
    pieces = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
    equal = (n for n in range(pieces, 2 * pieces) if chunk[0] % n == 0)
    chunk[0] = math.ceil(chunk[0] / next(equal, pieces))
    return tuple(chunk)


def _array_spec(params: Path, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": ocdbt(params, name),
        "store_data_equal_to_fill_value": True,  # Orbax takes a missing chunk for a damaged checkpoint
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            # Not compressed: weights shrink by little, and reading them is what a start waits for.
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }


def _orbax_metadata(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Orbax's description of the tree, without which it restores nothing. Key type 2 is a dict key."""
    tree = {}
    for path in sorted(shapes):
        keys = tuple(path.split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def check_new(destination: Path) -> None:
    """Raises CheckpointError for a path that exists already, or whose name the disk or tensorstore would not take."""
    name = os.fsdecode(destination)
    if "\0" in name or name.encode(errors="ignore").decode() != name:  # bytes that are not UTF-8 are lone surrogates
        raise CheckpointError(f"{name!r} is no name in UTF-8; choose another destination")
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} already exists; remove it or choose another destination")


@contextlib.contextmanager
def locked_sibling(destination: Path) -> Iterator[Path]:
    """A temporary directory beside ``destination``: in the end it gets that name, or what was made in it does. What is
    left of it goes, and so do the parents made for it where nothing is in them.

    It is locked (flock) for as long as its process lives, so that a later writer can tell what a killed one left behind
    from what another one is still writing.
    """
    made_parents = [parent for parent in destination.parents if not parent.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(destination)
        directory, lock = _make_locked_sibling(destination)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)
    finally:
        with contextlib.suppress(OSError):
            for parent in made_parents:
                parent.rmdir()


def _make_locked_sibling(destination: Path) -> tuple[Path, int]:
    # Until it is locked, another writer may take it for a dead one's and remove it; then the next name is tried.
    while True:
        directory = destination.with_name(f".{destination.name}.tmp-{secrets.token_hex(4)}")
        directory.mkdir(parents=True)  # a failed writer removes the parents that it made
        try:
            lock = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        os.close(lock)


def _remove_stale(destination: Path) -> None:
    """Remove temporary siblings whose writers died. A living writer holds its lock."""
    prefix = f".{destination.name}.tmp-"
    for directory in destination.parent.iterdir():
        if not directory.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(lock)


@contextlib.contextmanager
def explained(destination: Path) -> Iterator[None]:
    """Turn what the disk says, directly or through tensorstore, into one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # tensorstore has no error types: a full disk is a ValueError that quotes the system's text.
        text = f"{error}"
        codes = {errno.ENOSPC: "its disk is full", errno.EDQUOT: "your disk quota is used up"}
        for code, reason in codes.items():
            if (isinstance(error, OSError) and error.errno == code) or os.strerror(code) in text:
                raise CheckpointError(
                    f"cannot write {destination}: {reason}; make room or choose another destination"
                ) from error
        if isinstance(error, OSError):
            text = error.strerror or text
            raise CheckpointError(f"cannot write {destination}: {text}; mend that or choose another place") from error
        raise


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
