"""Converted checkpoints on disk: one directory, written once and never changed.

::

    config.json             our config (jeagle/config.py), nothing else
    params/                 one Orbax checkpoint (OCDBT, zarr3): {"blocks": {"0": {"qkv": {"kernel": ...}}}, ...}
    source.json             format_version, family, dtype, source and the SHA-256 of every file it was made from
    tokenizer.json, ...     the tokenizer's files, chat template and generation_config.json, as the source had them

``CheckpointWriter`` makes one, tensor by tensor, and ``load`` restores it into an NNX module, each array straight into its
sharding. Knows nothing of foreign formats and nothing of tokenizers: their files are bytes here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx

from jeagle.config import BlockConfig, ConfigError, EagleConfig, LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "CheckpointWriter",
    "Shardings",
    "is_checkpoint",
    "load",
    "load_config",
    "load_eagle",
    "load_llama",
]

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16")
CHUNK_BYTES = 32 << 20  # one zarr chunk: what a device of a mesh reads beyond its own rows at most
COMMIT_BYTES = 128 << 20  # one OCDBT transaction: small tensors share data files, large ones never pile up
RESTORE_GB = 4  # host buffers while restoring; Orbax's default of 96 would hold a whole second copy

Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, said in one sentence that names it and the mend."""


# ------------------------------------------------------------------------------------------------------------ writing


class CheckpointWriter:
    """Writes a checkpoint beside ``destination`` and renames it there in ``finish``; any other end removes it.

    Arrays go to disk through tensorstore and not through Orbax's ``save``, which wants the whole tree in memory (and its
    partial saves a copy of each tensor). What is written is Orbax's own format, and the tests restore it with stock
    Orbax.

    The temporary sibling is locked (flock) for as long as its process lives, so that a later writer can tell what a
    killed one left behind from what another one is still writing.
    """

    def __init__(self, destination: str | Path, *, expected_bytes: int = 0):
        self.destination = Path(destination).absolute()
        self._expected_bytes = expected_bytes
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100 << 20}})
        self._transaction: ts.Transaction | None = None
        self._pending_bytes = 0

    def __enter__(self) -> Self:
        if os.path.lexists(self.destination):
            raise CheckpointError(f"{self.destination} already exists; remove it or choose another destination")
        self._made_parents = [p for p in (self.destination.parent, *self.destination.parent.parents) if not p.exists()]
        with _explained(self.destination):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.destination)
            free = shutil.disk_usage(self.destination.parent).free
            if free < self._expected_bytes:
                self._remove_parents()
                raise CheckpointError(
                    f"{self.destination} needs {_gigabytes(self._expected_bytes)} but its disk has "
                    f"{_gigabytes(free)} free; make room or choose another destination"
                )
            self._directory, self._lock = _make_locked_sibling(self.destination)
            (self._directory / "params").mkdir()
        return self

    def add(self, path: str, array: np.ndarray, dtype: Any = None) -> None:
        """Write one tensor under its dotted path, cast to ``dtype`` piece by piece. ``array`` may be any view."""
        if path in self._shapes:
            raise ValueError(f"{path} was already written")
        dtype = np.dtype(array.dtype if dtype is None else dtype)
        self._shapes[path] = array.shape
        row_bytes = max(1, math.prod(array.shape[1:]) * dtype.itemsize)
        rows = min(max(1, CHUNK_BYTES // row_bytes), max(1, len(array)))
        spec = _array_spec(self._directory / "params", path, array.shape, (rows, *array.shape[1:]), dtype)
        with _explained(self.destination):
            store = self._open(spec, create=True)
            for start in range(0, len(array), rows):
                piece = array[start : start + rows].astype(dtype, copy=False)
                if self._pending_bytes + piece.nbytes > COMMIT_BYTES and self._pending_bytes:
                    self._commit()
                    store = self._open(spec)
                # The transaction may keep the piece until it commits: no one writes to converted arrays.
                store[start : start + rows].write(piece, can_reference_source_data_indefinitely=True).result()
                self._pending_bytes += piece.nbytes

    def finish(
        self, config: BlockConfig, source: Mapping[str, Any], extra_files: Mapping[str, bytes | Path] | None = None
    ) -> Path:
        """Complete the checkpoint and give it its name. Raises if another process took the name meanwhile."""
        with _explained(self.destination):
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
        self._made_parents = []
        return self.destination

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transaction is not None:
            # After an interrupt a commit may still run: wait for it, or it would write into what is being removed.
            self._transaction.abort()
            with contextlib.suppress(Exception):
                self._transaction.commit_async().result()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)
        self._remove_parents()

    def _remove_parents(self) -> None:
        with contextlib.suppress(OSError):
            for parent in self._made_parents:
                parent.rmdir()

    def _open(self, spec: dict[str, Any], *, create: bool = False) -> ts.TensorStore:
        if self._transaction is None:
            self._transaction = ts.Transaction()
        return ts.open(spec, open=True, create=create, context=self._context, transaction=self._transaction).result()

    def _commit(self) -> None:
        if self._transaction is not None:
            self._transaction.commit_async().result()
            self._transaction, self._pending_bytes = None, 0


def _array_spec(params: Path, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": str(params)}, "path": name},
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


def _make_locked_sibling(destination: Path) -> tuple[Path, int]:
    while True:
        directory = destination.with_name(f".{destination.name}.tmp-{secrets.token_hex(4)}")
        directory.mkdir()
        lock = os.open(directory, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Between mkdir and flock a cleaner may have taken it for a dead one's; then it is gone, and the next is tried.
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
def _explained(destination: Path) -> Iterator[None]:
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
            raise CheckpointError(f"cannot write {destination}: {error.strerror or error}") from error
        raise


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------------------ reading


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a directory of ours, of whatever version."""
    source = _read_optional_json(Path(path) / "source.json")
    config = _read_optional_json(Path(path) / "config.json")
    return "format_version" in source and "family" in config


def load_config(directory: str | Path) -> LlamaConfig | EagleConfig:
    """The model a checkpoint holds. Raises CheckpointError in one sentence when it is not one of ours."""
    directory = Path(directory)
    _read_source(directory)
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
    import orbax.checkpoint as ocp

    stored = _read_source(directory)["dtype"]
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype must be 'auto', 'float32' or 'bfloat16', got {dtype!r}")
    param_dtype = jnp.dtype(stored if dtype == "auto" else dtype)
    abstract = nnx.eval_shape(lambda: module(config, dtype=param_dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(path: str, variable: Any) -> jax.ShapeDtypeStruct:
        sharding = shardings.get(path) if isinstance(shardings, Mapping) else shardings
        value = variable.get_value()
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding or default)

    wanted = {path: place(path, variable) for path, variable in variables.items()}
    params = (directory / "params").absolute()
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_buffer_gb(wanted))
    with _quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        try:
            _check_tree(directory, wanted, checkpointer.metadata(params).item_metadata.tree)
            tree = _nest(wanted)
            restored = checkpointer.restore(
                params,
                args=ocp.args.PyTreeRestore(
                    item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
                ),
            )
        except CheckpointError:
            raise
        except (ValueError, KeyError, OSError) as error:  # all that Orbax and tensorstore make of damaged files
            reason = (str(error).splitlines() or [""])[0][:200]
            raise CheckpointError(f"{params} is missing or damaged; convert the model again ({reason})") from error
    arrays = dict(_walk(restored))
    filled = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _check_tree(directory: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], tree: Any) -> None:
    found = {path: tuple(leaf.shape) for path, leaf in _walk(tree)}
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found:
            problem = f"lacks tensor {path}"
        elif path not in wanted:
            problem = f"holds tensor {path}, which its config.json does not speak of"
        elif found[path] != wanted[path].shape:
            problem = f"holds tensor {path} of shape {found[path]}, its config.json says {wanted[path].shape}"
        else:
            continue
        raise CheckpointError(f"{directory} {problem}; convert the model again")


def _buffer_gb(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Orbax refuses to restore an array larger than its buffers, so the largest one must fit with room to spare."""
    # The stored dtype may be twice as wide as the wanted one.
    largest = max(math.prod(leaf.shape) * 4 for leaf in wanted.values())
    return max(RESTORE_GB, largest // 10**9 + 2)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Inverse of ``_nest``."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_source(directory: Path) -> dict[str, Any]:
    """source.json, after everything that can be wrong with a directory has been asked."""
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
        raise CheckpointError(
            f"{directory / 'source.json'} has dtype {source.get('dtype')!r}; convert the model again"
        )
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


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs its progress as absl warnings; hide them for one call, and no one else's."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
