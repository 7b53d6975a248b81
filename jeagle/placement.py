"""Where the arrays of a checkpoint go on a mesh, and which parts of them each device needs.

Most arrays are cut where their logical axes say. Two axes are not what they are on disk:

* ``vocab`` (and ``draft_vocab``) is padded with zeros to a multiple of the devices; ``layers.lm_head`` gives padding
  the logit -inf.
* ``kv_heads`` fewer than devices, or no multiple of them, are repeated: K heads of G queries become K*r heads of G/r
  queries, the r copies of a head beside each other. It is the same model (``repeat_kv_heads`` says its config); each
  device still computes N/n query heads, and keeps a copy of the keys they read, as the cache then has K*r heads.

A ``Part`` says which slices of the stored array make up what a device holds, so that restoring reads only those.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jeagle.config import BlockConfig
from jeagle.sharding import Axes, Layout, MeshError
from jeagle.weights import dtype_of

__all__ = [
    "Part",
    "Placement",
    "axes_of",
    "copied",
    "dotted",
    "filled",
    "place",
    "placements",
    "repeat_kv_heads",
    "variables",
]

Slices = tuple[slice, ...]


def repeat_kv_heads[Config: BlockConfig](config: Config, layout: Layout) -> Config:
    """``config`` with its kv heads repeated the fewest times that let ``layout`` split them.

    Raises MeshError where no number of copies does, as the query heads of a kv head must be dealt out evenly.
    """
    devices = layout.parts(config.kv_axis)
    copies = config.kv_copies(devices)
    if copies is None:
        whose = "the draft head's " if config.axis_prefix else ""
        raise MeshError(
            f"a tensor axis of {devices} devices does not divide {whose}{config.num_heads} query heads on "
            f"{config.num_kv_heads} kv heads; choose a tensor_parallel_size that divides {config.num_heads}"
            f"{_instead(config.kv_axis)}"
        )
    return dataclasses.replace(config, num_kv_heads=config.num_kv_heads * copies)


def _instead(axis: str | None) -> str:
    """What would leave such an axis whole."""
    if axis is not None and axis.startswith("draft_"):
        return ", or draft_sharding='replicated'"
    return ", or expert_sharding='mlp'" if axis == "experts" else ""


@dataclass(frozen=True)
class Part:
    """What one device holds of an array: slices of the stored array, and how they are put together."""

    slices: tuple[Slices, ...]
    join: Callable[[list[np.ndarray]], np.ndarray]

    @property
    def size(self) -> int:
        """Numbers to read."""
        return sum(math.prod(s.stop - s.start for s in slices) for slices in self.slices)


@dataclass(frozen=True)
class Placement:
    """One array: as it is stored, as it is laid out, and where."""

    stored: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding
    axes: Axes
    copies: int = 1  # of each kv head

    def part(self, index: Slices) -> Part:
        """What is at ``index`` of the laid-out array."""
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        if self.copies > 1 and any(map(_is_kv_heads, self.axes)):
            return self._repeated(bounds)
        # Padding beyond the stored size is not read, but made.
        kept = tuple(slice(start, min(stop, n)) for (start, stop), n in zip(bounds, self.stored, strict=True))
        kept = tuple(slice(min(s.start, s.stop), s.stop) for s in kept)
        missing = [(0, stop - start - (s.stop - s.start)) for (start, stop), s in zip(bounds, kept, strict=True)]
        return Part((kept,), lambda arrays: np.pad(arrays[0], missing) if any(map(any, missing)) else arrays[0])

    def _repeated(self, bounds: list[tuple[int, int]]) -> Part:
        """Laid-out kv head j is stored head j // r with its queries of number j % r; keys and values come last."""
        heads = next(i for i, axis in enumerate(self.axes) if _is_kv_heads(axis))
        whole = [slice(start, stop) for start, stop in bounds]
        if heads + 1 == len(self.axes) or self.axes[heads + 1] != "queries":
            raise ValueError(f"an axis of kv heads must be followed by that of their queries, got {self.axes}")
        shared = self._shared
        queries = (self.stored[heads + 1] - shared) // self.copies
        slices: list[Slices] = []
        for j in range(*bounds[heads]):
            head, number = slice(j // self.copies, j // self.copies + 1), j % self.copies
            own = slice(number * queries, (number + 1) * queries)
            last = slice(self.stored[heads + 1] - shared, self.stored[heads + 1])
            for group in (own, last) if shared else (own,):
                slices.append((*whole[:heads], head, group, *whole[heads + 2 :]))

        def join(arrays: list[np.ndarray]) -> np.ndarray:
            each = [np.concatenate(pair, axis=heads + 1) for pair in itertools.batched(arrays, 2 if shared else 1)]
            return np.concatenate(each, axis=heads)

        return Part(tuple(slices), join)

    @property
    def _shared(self) -> int:
        """How many of the "queries" axis are no queries but the head's key and value, which every copy needs."""
        heads = next(i for i, axis in enumerate(self.axes) if _is_kv_heads(axis))
        laid, stored = self.shape[heads + 1], self.stored[heads + 1]
        return (laid * self.copies - stored) // (self.copies - 1)


def _is_kv_heads(axis: str | None) -> bool:
    return axis is not None and axis.endswith("kv_heads")


def axes_of(variable: nnx.Variable) -> Axes:
    """The logical axes a weight was made with."""
    return variable.get_metadata()["axes"]


def placements(stored: nnx.Module, laid_out: nnx.Module, layout: Layout | None) -> dict[str, Placement]:
    """A placement per dotted path of ``laid_out``: the same model as ``stored``, after ``repeat_kv_heads``.

    Both may be abstract. layout None is this process's first device. Raises MeshError where an axis is not divided by
    its devices.
    """
    alone = SingleDeviceSharding(jax.local_devices()[0])
    before, after = variables(stored), variables(laid_out)
    copies = laid_out.config.num_kv_heads // stored.config.num_kv_heads
    found = {}
    for path, variable in after.items():
        stored_value, axes = before[path].get_value(), axes_of(variable)
        shape = list(variable.get_value().shape)
        for i, axis in enumerate(axes):
            parts = 1 if layout is None else layout.parts(axis)
            if axis is not None and axis.endswith("vocab"):
                shape[i] = -(-shape[i] // parts) * parts
            elif shape[i] % parts:
                raise MeshError(
                    f"a tensor axis of {parts} devices does not divide the {shape[i]} of {axis!r} in {path}; choose a "
                    f"tensor_parallel_size that does{_instead(axis)}"
                )
        sharding = alone if layout is None else layout.sharding(axes)
        dtype = np.dtype(stored_value.dtype)
        found[path] = Placement(stored_value.shape, tuple(shape), dtype, sharding, axes, copies)
    return found


def place(module: Any, layout: Layout) -> Any:
    """A module in memory, laid out: a new module, of the config that ``repeat_kv_heads`` gives."""
    config = repeat_kv_heads(module.config, layout)
    abstract = nnx.eval_shape(lambda: type(module)(config, dtype=dtype_of(module), rngs=nnx.Rngs(0)))
    arrays, weights = {}, variables(module)
    for path, placement in placements(module, abstract, layout).items():
        arrays[path] = jax.make_array_from_callback(
            placement.shape, placement.sharding, partial(_cut, np.asarray(weights[path].get_value()), placement)
        )
    return _as_named(filled(abstract, arrays), module)


def copied(module: Any, layout: Layout) -> Any:
    """A module laid out on one mesh, on another with as many devices along ``tensor``: from device to device."""
    abstract = nnx.eval_shape(lambda: type(module)(module.config, dtype=dtype_of(module), rngs=nnx.Rngs(0)))
    weights = variables(module)
    arrays = {path: jax.device_put(w.get_value(), layout.sharding(axes_of(w))) for path, w in weights.items()}
    return _as_named(filled(abstract, arrays), module)


def _as_named(new: Any, old: Any) -> Any:
    """``new`` with the implementations that were named in ``old``, which no config knows."""
    for of_new, of_old in zip(new.blocks, old.blocks, strict=True):
        if (experts := getattr(of_old, "experts", None)) is not None:
            of_new.experts.implementation = experts.implementation
    return new


def _cut(value: np.ndarray, placement: Placement, index: Slices | None) -> np.ndarray:
    assert index is not None
    part = placement.part(index)
    return part.join([value[slices] for slices in part.slices])


def filled(module: Any, arrays: Mapping[str, Any]) -> Any:
    """An abstract module with its arrays, or shapes of them, by dotted path."""
    graph, state = nnx.split(module)
    flat = [(path, variable.replace(arrays[dotted(path)])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """A module's weights by dotted path, as checkpoints name them."""
    return {dotted(path): variable for path, variable in nnx.to_flat_state(nnx.split(module)[1])}
