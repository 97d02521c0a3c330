"""Where arrays lie: a one-dimensional mesh; the rows of a batch are spread over it, parameters are on every device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from tcc_jax.terminal import UserError


def make_mesh(num_data: int, batch_rows: int) -> Mesh:
    """Return a mesh with the one axis `data`.

    Args:
        num_data: devices along it; -1 takes all.
        batch_rows: rows of a batch over all devices.

    Raises:
        UserError: more devices asked for than there are, or rows that cannot be spread evenly.
    """
    available = jax.device_count()
    size = available if num_data == -1 else num_data
    if size > available:
        raise UserError(f"mesh.data = {num_data}: only {available} {jax.default_backend()} devices are here")
    if batch_rows % size:
        raise UserError(f"training.batch_rows = {batch_rows}: must be a multiple of the {size} devices of mesh.data")
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of parameters, optimizer state and metrics: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis, the rows, over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on its devices; together they form the global batch."""
    return {name: jax.make_array_from_process_local_data(over_rows(mesh), array) for name, array in batch.items()}


def with_sharding(abstract: Any, sharding: Sharding) -> Any:
    """Return a tree of `jax.ShapeDtypeStruct` whose arrays are to be made with `sharding`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
