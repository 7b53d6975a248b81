"""The mesh and what is split over it: the only place that knows mesh axis names."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["data_mesh", "replicated", "split_rows"]


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices along one axis, ``data``."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows, along ``axis``, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
