"""The mesh, and which mesh axis each logical axis is split over: the only place that knows mesh axis names.

Weights, caches and activations name their axes ("kv_heads", "vocab", "rows", ...); ``Rules`` says once what becomes of
each. Matrix products are left to XLA's partitioner, which needs no more than the weights' shardings: a product that
contracts a split axis ends in an all-reduce. What the partitioner cannot see through (kernels, the cache's scatter, a
choice over a split vocabulary) is written for one shard and wrapped by ``split``.

A program is sharded by being traced inside ``use(layout)``. Outside it ``split`` and ``constrain`` do nothing, so one
device runs the very program it would run if this module did not exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
    "Across",
    "Axes",
    "Layout",
    "MeshError",
    "Rules",
    "across",
    "constrain",
    "data_mesh",
    "fetch",
    "is_axes",
    "make_mesh",
    "on_mesh",
    "replicated",
    "rows_first",
    "split",
    "split_axis",
    "split_rows",
    "use",
    "worker_meshes",
]

Axes = tuple[str | None, ...]  # one logical name, or None, per axis of an array
MESH_AXES = ("data", "tensor")
NEVER_SPLIT = ("width", "queries")  # of the residual stream; of a kv head


class MeshError(ValueError):
    """A mesh that cannot be made, or that a model cannot be split over, said in one sentence."""


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis, None for one that every device has whole.

    A head's axes are named apart from the target's ("draft_..."), so that it can be whole on every device.
    """

    rows: str | None = "data"  # requests
    pages: str | None = "data"  # of a cache: each data shard has the pages of its rows
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    experts: str | None = None
    expert_mlp: str | None = "tensor"
    draft_kv_heads: str | None = "tensor"
    draft_mlp: str | None = "tensor"
    draft_vocab: str | None = "tensor"
    draft_features: str | None = "tensor"  # what fc reads: one more all-reduce, and 1/n of the head's largest matrix

    @classmethod
    def choose(cls, *, draft: str = "tensor", experts: str = "mlp") -> Rules:
        """draft: "tensor" splits the head, "replicated" gives it to every device whole. experts: "mlp" splits each
        expert, "experts" deals whole experts out. Raises MeshError for anything else."""
        if draft not in ("tensor", "replicated"):
            raise MeshError(f"draft sharding must be 'tensor' or 'replicated', got {draft!r}")
        if experts not in ("mlp", "experts"):
            raise MeshError(f"expert sharding must be 'mlp' or 'experts', got {experts!r}")
        head = {f.name: "tensor" if draft == "tensor" else None for f in fields(cls) if f.name.startswith("draft_")}
        by_expert = {"experts": "tensor", "expert_mlp": None} if experts == "experts" else {}
        return cls(**head, **by_expert)

    def mesh_axis(self, axis: str | None) -> str | None:
        return None if axis is None or axis in NEVER_SPLIT else getattr(self, axis)

    def spec(self, axes: Axes) -> PartitionSpec:
        return PartitionSpec(*map(self.mesh_axis, axes))


def split_axis(axes: Axes) -> int:
    """The axis of an array that the usual rules split; 0 where they split none."""
    return next((i for i, axis in enumerate(axes) if Rules().mesh_axis(axis)), 0)


@dataclass(frozen=True)
class Layout:
    """A mesh with axes ``data`` and ``tensor``, and the rules that lay arrays out on it."""

    mesh: Mesh
    rules: Rules = Rules()

    def sharding(self, axes: Axes) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(axes))

    def parts(self, axis: str | None) -> int:
        """Into how many parts a logical axis is split."""
        mesh_axis = self.rules.mesh_axis(axis)
        return 1 if mesh_axis is None else self.mesh.shape[mesh_axis]

    def put(self, value: Any, axes: Axes) -> jax.Array:
        """A host array that every process has, on the devices: each gets its part."""
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, self.sharding(axes), lambda index: value[index])


def make_mesh(data: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh [data, tensor] over the first ``data * tensor`` devices of all processes (or of ``devices``).

    Raises MeshError when there are fewer, or when a process would be left without one.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in (("data", data), ("tensor", tensor)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise MeshError(f"the {name} axis of a mesh must be a whole number of at least 1, got {size!r}")
    if data * tensor > len(devices):
        raise MeshError(
            f"{data} (data) x {tensor} (tensor) parallel needs {data * tensor} devices, and JAX sees {len(devices)} "
            f"({devices[0].platform})"
        )
    used = devices[: data * tensor]
    if len(used) < len(devices) and {d.process_index for d in used} != {d.process_index for d in devices}:
        raise MeshError(
            f"{data} (data) x {tensor} (tensor) parallel leaves processes without a device: use all {len(devices)}"
        )
    return jax.make_mesh((data, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=used)


def worker_meshes(decoding: Mesh, count: int) -> list[Mesh]:
    """``count`` meshes of devices that ``decoding`` leaves, each [1, tensor] with as many along ``tensor`` as it has.

    Raises MeshError when there are too few, or several processes: arrays go from mesh to mesh within one.
    """
    if count and jax.process_count() > 1:
        raise MeshError("prefill workers serve one process; leave prefill_workers at 0 where several run")
    size, devices = decoding.shape["tensor"], jax.devices()
    left = devices[decoding.size :]
    if count * size > len(left):
        raise MeshError(
            f"{count} prefill workers of {size} devices beside the {decoding.size} that decode need "
            f"{decoding.size + count * size} devices, and JAX sees {len(devices)} ({devices[0].platform})"
        )
    return [make_mesh(1, size, left[i * size : (i + 1) * size]) for i in range(count)]


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices side by side along ``data`` (training)."""
    devices = jax.devices() if devices is None else devices
    return make_mesh(len(devices), 1, devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows, along ``axis``, split over the ``data`` devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def fetch(tree: Any) -> Any:
    """Arrays as numpy on every process, wherever their parts lie. Copies: the arrays may be donated later."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.tree.map(np.array, jax.device_get(tree))  # device_get starts all copies before it waits for one
    return jax.tree.map(
        np.array, multihost_utils.process_allgather(tree, tiled=True)
    )  # it gives what cannot be written


# What is being traced for. A context, not an argument of every function: models and rounds are the same functions on
# one device and on many, and say what their axes are, never where they lie.
_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Trace for ``layout``; None is one device."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def on_mesh() -> bool:
    """Whether the program being traced is laid out over a mesh."""
    return _layout.get() is not None


def rows_first(x: Any) -> Axes:
    """The axes of an array [B, ...] whose rows alone may be split."""
    return ("rows", *(None,) * (x.ndim - 1)) if x.ndim else ()


def constrain(tree: Any, axes: Any) -> Any:
    """``tree`` laid out as ``axes`` (a tree of the same structure with ``Axes`` for arrays) say."""
    layout = _layout.get()
    if layout is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, _over_axes(layout.sharding, axes))


def split(function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """``function``, which sees one shard, as a function of whole arrays.

    inputs: for each argument its ``Axes``, or a tree of them; outputs likewise. A split axis must be a multiple of its
    devices. ``function`` talks to the other shards through ``across``.
    """
    layout = _layout.get()
    if layout is None:
        return function
    specs = [_over_axes(layout.rules.spec, axes) for axes in (inputs, outputs)]
    # Kernels do not say over which mesh axes their results vary: check_vma would refuse them.
    return jax.shard_map(function, mesh=layout.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def _over_axes(function: Callable[[Axes], Any], tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=is_axes)


def is_axes(x: Any) -> bool:
    """Whether a node of a tree is one array's ``Axes``."""
    return type(x) is tuple and all(isinstance(axis, str) or axis is None for axis in x)


@dataclass(frozen=True)
class Across:
    """What one shard of a logical axis asks of the others. Where the axis is whole, every answer is its own."""

    mesh_axis: str | None

    @property
    def whole(self) -> bool:
        return self.mesh_axis is None

    def index(self) -> jax.Array:
        """Which part this is, int32 []."""
        return jnp.int32(0) if self.mesh_axis is None else jax.lax.axis_index(self.mesh_axis)

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.mesh_axis is None else jax.lax.pmax(x, self.mesh_axis)

    def sum(self, x: jax.Array) -> jax.Array:
        return x if self.mesh_axis is None else jax.lax.psum(x, self.mesh_axis)

    def gather(self, x: jax.Array) -> jax.Array:
        """Everyone's ``x`` side by side along the last axis, in order."""
        if self.mesh_axis is None:
            return x
        return jax.lax.all_gather(x, self.mesh_axis, axis=x.ndim - 1, tiled=True)


def across(axis: str) -> Across:
    """The shards of ``axis`` in the program being traced. Asked outside the function given to ``split``."""
    layout = _layout.get()
    return Across(None if layout is None or layout.parts(axis) == 1 else layout.rules.mesh_axis(axis))
