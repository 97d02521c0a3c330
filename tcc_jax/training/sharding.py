"""Where arrays lie: a mesh of data x fsdp x tensor devices, and rules from a parameter's path to its place on it.

The rows of a batch are spread over data x fsdp. The tensor axis cuts heads, hidden width and vocabulary (Megatron-LM,
Shoeybi et al. 2019); the fsdp axis cuts the largest dimension that is left and divisible (ZeRO, Rajbhandari et al.
2020). XLA adds the communication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tcc_jax.config import Config
from tcc_jax.terminal import UserError
from tcc_jax.training.optimizer import parameter_path

_AXES = ("data", "fsdp", "tensor")
_ROWS = ("data", "fsdp")
# Path of a parameter -> the dimension the tensor axis cuts. Optimizer states hold trees of the same paths.
_TENSOR_RULES = (
    (re.compile(r"(query|key|value|expand)/kernel$"), 1),
    (re.compile(r"(attention/output|contract)/kernel$"), 0),
    (re.compile(r"(^|/)(embedding|output_bias)$"), 0),
)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a run, with the axes `data`, `fsdp` and `tensor`.

    Args:
        config: the run.
        devices: to choose from, such as those of a topology that is not here; None takes the ones of this process.

    Raises:
        UserError: more devices asked for than there are, or a model or batch that cannot be spread evenly.
    """
    devices = list(jax.devices() if devices is None else devices)
    layout, model, training = config.mesh, config.model, config.training
    inner = layout.fsdp * layout.tensor
    data = max(1, len(devices) // inner) if layout.data == -1 else layout.data
    if layout.data == -1 and len(devices) % inner and inner < len(devices):
        raise UserError(
            f"mesh.fsdp x tensor = {layout.fsdp} x {layout.tensor}: does not divide the {len(devices)} "
            f"{devices[0].platform} devices; set mesh.data too to leave some out"
        )
    if data * inner > len(devices):
        raise UserError(
            f"mesh.data x fsdp x tensor = {data} x {layout.fsdp} x {layout.tensor}: "
            f"only {len(devices)} {devices[0].platform} devices are here"
        )
    rows = "training.batch_rows" + (" / training.microbatches" if training.microbatches > 1 else "")
    divided = {
        rows: (training.batch_rows // training.microbatches, ("data", "fsdp")),
        "model.num_heads": (model.num_heads, ("tensor",)),
        "model.hidden_width": (model.hidden_width or 4 * model.width, ("tensor",)),
        # The vocabulary is padded to a multiple of this.
        "128": (128, ("tensor",)),
    }
    sizes = {"data": data, "fsdp": layout.fsdp, "tensor": layout.tensor}
    for name, (value, axes) in divided.items():
        parts = math.prod(sizes[axis] for axis in axes)
        if value % parts:
            where = " x ".join(f"mesh.{axis}" for axis in axes if sizes[axis] > 1)
            raise UserError(f"{name} = {value}: must be a multiple of the {parts} devices of {where}")
    shape = (data, layout.fsdp, layout.tensor)
    chosen = devices[: math.prod(shape)]
    if {device.process_index for device in chosen} != {device.process_index for device in devices}:
        raise UserError(
            f"mesh.data x fsdp x tensor = {data} x {layout.fsdp} x {layout.tensor}: leaves out a whole process; take "
            f"all {len(devices)} devices"
        )
    mesh = jax.make_mesh(shape, _AXES, axis_types=(AxisType.Auto,) * len(_AXES), devices=chosen)
    if len({device.process_index for device in chosen}) == 1:
        return mesh
    # By topology alone the rows of a process would not be one block of the batch, as its loader gives them.
    by_process = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    return Mesh(np.array(by_process, dtype=object).reshape(shape), _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of scalars and metrics: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_devices(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array with one entry for each device."""
    return NamedSharding(mesh, PartitionSpec(_AXES))


def over_rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis, the rows, over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(_ROWS))


def place_state(abstract: Any, mesh: Mesh) -> Any:
    """Return a tree of `jax.ShapeDtypeStruct` with the sharding of each array, by its path and shape."""
    return jax.tree.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition(parameter_path(path), leaf.shape, mesh))
        ),
        abstract,
    )


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how a parameter is cut.

    Args:
        path: its place in the tree, such as `blocks/0/attention/query/kernel`; a prefix does not matter.
        shape: its shape.
        mesh: the devices.
    """
    axes: list[str | None] = [None] * len(shape)
    if mesh.shape["tensor"] > 1:
        for rule, dimension in _TENSOR_RULES:
            if shape and rule.search(path):
                axes[dimension] = "tensor"
    # Vectors stay whole: what they save is less than a gather of their own costs.
    free = [d for d, axis in enumerate(axes) if axis is None and shape[d] % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and len(shape) > 1 and free:
        axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*axes)


def rows_here(mesh: Mesh, batch_rows: int) -> tuple[int, int]:
    """Return which part of a batch's rows this process loads: (parts, part).

    Processes that a row's devices are spread over load the same part.

    Raises:
        UserError: the rows of this process are not one block of the batch.
    """
    slices = over_rows(mesh).addressable_devices_indices_map((batch_rows,)).values()
    rows = np.unique(np.concatenate([np.arange(batch_rows)[index] for index in slices]))
    if rows[-1] - rows[0] + 1 != len(rows) or batch_rows % len(rows) or rows[0] % len(rows):
        raise UserError(
            "the devices of this process do not hold one block of rows; choose mesh.data x mesh.fsdp a multiple of the "
            "number of processes"
        )
    return batch_rows // len(rows), int(rows[0]) // len(rows)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on its devices; together they form the global batch."""
    return {name: jax.make_array_from_process_local_data(over_rows(mesh), array) for name, array in batch.items()}


def spread_heads(attend: Callable, mesh: Mesh) -> Callable:
    """Return an attention function that runs on each device's own rows and heads, as kernels must."""
    heads, rows = PartitionSpec(_ROWS, None, "tensor", None), PartitionSpec(_ROWS)
    return jax.shard_map(attend, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
