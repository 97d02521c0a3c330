"""Compiling the training step for hardware that is not here, to learn whether it fits.

XLA's compilers for TPUs and GPUs run on any machine, given a description of the devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from tcc_jax.config import MOST_ROWS, Config
from tcc_jax.model.kernels import tracing_for_absent_gpu
from tcc_jax.terminal import UserError
from tcc_jax.training.sharding import make_mesh, over_rows
from tcc_jax.training.state import abstract_state
from tcc_jax.training.step import attention_in_words, make_train_step

GIB = 2**30
# GiB a program may use of a device, as libtpu's out-of-memory errors put it; it keeps the rest for itself. A tpu7x chip
# is two devices.
TPU_MEMORY = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
# Of a GPU's memory, the share JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75
_DEVICE_MEMORY = re.compile(r"\bdevice_memory_size:\s*(\d+)")
# What XLA asks about an H200 (stream_executor.GpuTargetConfigProto), from NVIDIA's data sheet and its tuning guide.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        devices: of the topology; they have a kind and a place, and run nothing.
        memory_bytes: what a program may use on each.
    """

    name: str
    devices: list[jax.Device]
    memory_bytes: int


@dataclass(frozen=True)
class Compiled:
    """What compiling a step told.

    Attributes:
        batch_rows: rows of the global batch.
        state_bytes: parameters, optimizer state and batch on each device.
        temporary_bytes: what the step needs besides, on each device; None if the compiler found no way to fit it.
        seconds: of tracing and compilation.
        fits: whether both together fit.
        reason: the compiler's words if it gave up, or where `triton` is false what it said before.
        triton: whether Triton may make matrix products, as in a run; false where the compiler gave up with it.
        failed: whether the compiler gave up for something else than memory.
        attention: the kernel that was chosen, and where, as `attention_in_words` has it.
    """

    batch_rows: int
    state_bytes: int
    temporary_bytes: int | None
    seconds: float
    fits: bool
    reason: str = ""
    triton: bool = True
    failed: bool = False
    attention: str = ""

    @property
    def total_bytes(self) -> int:
        """State and temporaries on each device."""
        return self.state_bytes + (self.temporary_bytes or 0)


def find_target(topology: str, target_config: str | None = None) -> Target:
    """Return the devices of a topology.

    Args:
        topology: GENERATION:SHAPE for TPUs (`v5e:2x4`; v4, v5e, v5p, v6e or tpu7x), or `h200` or `h200:COUNT`.
        target_config: path of a GPU's description, a text-format GpuTargetConfigProto, in place of the H200's.

    Raises:
        UserError: a name that is not known, or the compiler for it is not installed.
    """
    generation, _, shape = topology.partition(":")
    if generation in TPU_MEMORY:
        try:
            # The two cores of a v4 chip are one device, as JAX has them; of itself libtpu takes them for two.
            cores = {"chip_config_name": "megacore"} if generation == "v4" else {}
            description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **cores)
        except Exception as error:
            raise UserError(
                f"--topology {topology}: {_first_line(error)}; the compiler for TPUs comes with "
                'pip install "tcc-jax[tpu]", shapes look like v5e:2x4, v4:2x2x1'
            ) from None
        return Target(topology, list(description.devices), int(TPU_MEMORY[generation] * GIB))
    if generation != "h200" or not (shape or "1").isdecimal():
        raise UserError(
            f"--topology {topology}: must be one of {', '.join(TPU_MEMORY)} with a shape, such as v5e:2x4, or h200:8"
        )
    text = H200 if target_config is None else _description(target_config)
    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", target_config=text, topology=f"1x1x{shape or 1}"
        )
    except Exception as error:
        raise UserError(
            f"{target_config or f'--topology {topology}'}: {_first_line(error)}; the compiler for GPUs comes with "
            'pip install "tcc-jax[aot-gpu]"'
        ) from None
    memory = max(map(int, _DEVICE_MEMORY.findall(text)))
    return Target(topology, list(description.devices), int(GPU_SHARE * memory))


def compile_step(config: Config, vocabulary_size: int, target: Target) -> Compiled:
    """Compile the training step of a run for a target.

    Raises:
        UserError: a mesh, model or batch that cannot be spread over the devices.
    """
    mesh = make_mesh(config, target.devices)
    if mesh.size < len(target.devices):
        # Of a slice libtpu compiles for all or dies.
        raise UserError(f"mesh: takes {mesh.size} of the {len(target.devices)} devices of {target.name}; take all")
    state = abstract_state(config, vocabulary_size, mesh)
    batch = abstract_batch(config, mesh)
    state_bytes = sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves((state, batch)))
    began = time.monotonic()
    platform = {"gpu": "cuda"}.get(target.devices[0].platform, target.devices[0].platform)
    with tracing_for_absent_gpu() if platform == "cuda" else contextlib.nullcontext():
        traced = make_train_step(config, vocabulary_size, mesh).trace(state, batch)
    attempt = try_compiler(traced.lower(lowering_platforms=(platform,)), platform)
    seconds, rows = time.monotonic() - began, config.training.batch_rows
    told = (attempt.reason, attempt.triton, attempt.failed, attention_in_words(config, mesh))
    if attempt.memory is None:
        return Compiled(rows, state_bytes, None, seconds, False, *told)
    # The state's memory is reused for the new one; what the compiler counts as arguments includes padding.
    memory = attempt.memory
    arguments = max(state_bytes, memory.argument_size_in_bytes)
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    fits = arguments + temporary <= target.memory_bytes
    return Compiled(rows, arguments, temporary, seconds, fits, *told)


class Attempt(NamedTuple):
    """What the compiler made of a step: its memory, or None, and `reason`, `triton` and `failed` as in `Compiled`."""

    memory: Any
    reason: str
    triton: bool
    failed: bool


def try_compiler(lowered: Any, platform: str) -> Attempt:
    """Compile a lowered step.

    On a GPU, XLA times several tilings of a product and drops those it cannot compile. Ahead of time it takes one, and
    that of JAX 0.10.2 was seen to fail (12 transposed positions of a row in tiles of 16): then it is asked once more,
    with products from cuBLAS alone.
    """
    reason, triton, failed = "", True, False
    for triton in (True, False) if platform == "cuda" else (True,):
        try:
            memory = lowered.compile(None if triton else {"xla_gpu_enable_triton_gemm": False}).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            reason, failed = _first_line(error), "RESOURCE_EXHAUSTED" not in str(error)
            if not failed:
                break
        else:
            return Attempt(memory, reason, triton, failed=False)
    return Attempt(None, reason, triton, failed)


def largest_batch(
    config: Config, vocabulary_size: int, target: Target, report: Callable[[Compiled], None]
) -> Compiled | None:
    """Find the largest batch whose step fits: rows double until they don't, then the gap is closed.

    Memory grows about evenly with the rows, so the gap is tried where a line through the two largest that fit reaches
    the limit, and in its middle, by turns.

    Args:
        config: the run; its `training.batch_rows` is not used.
        vocabulary_size: V.
        target: the devices.
        report: called with each attempt.

    Returns:
        The largest that fits, up to the most `training.batch_rows` may be, or None if one row on each device does not.
    """
    layout = config.mesh
    data = len(target.devices) // (layout.fsdp * layout.tensor) if layout.data == -1 else layout.data
    unit = max(1, data) * layout.fsdp * config.training.microbatches

    def attempt(units: int) -> Compiled:
        training = dataclasses.replace(config.training, batch_rows=units * unit)
        try:
            compiled = compile_step(dataclasses.replace(config, training=training), vocabulary_size, target)
        except UserError as error:
            if units == 1:
                raise
            # A kernel that cannot count so far.
            compiled = Compiled(units * unit, 0, None, 0.0, False, str(error))
        report(compiled)
        return compiled

    found: list[tuple[int, Compiled]] = []
    high, most = 1, max(1, MOST_ROWS // unit)
    while (not found or found[-1][0] < most) and (compiled := attempt(high)).fits:
        found.append((high, compiled))
        high = min(2 * high, most)
    halve = False
    while found and high - (low := found[-1][0]) > 1:
        middle = (low + high) // 2 if halve else _where_full(found, target.memory_bytes)
        middle, halve = min(max(middle, low + 1), high - 1), not halve
        if (compiled := attempt(middle)).fits:
            found.append((middle, compiled))
        else:
            high = middle
    return found[-1][1] if found else None


def _where_full(found: list[tuple[int, Compiled]], memory_bytes: int) -> int:
    if len(found) < 2:
        return 0
    (less, before), (more, after) = found[-2:]
    grown = (after.total_bytes - before.total_bytes) / (more - less)
    return more + int((memory_bytes - after.total_bytes) / grown) if grown > 0 else more


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and shardings of a batch, as the loader makes them."""
    training = config.training
    row, segments = (training.row_length,), (training.segments_per_row,)
    shapes: dict[str, tuple[int, ...]] = {"tokens": row, "segments": row, "starts": segments, "gene_counts": segments}
    if config.objective.prompt_genes:
        shapes |= {"set_sizes": segments, "targets": (*segments, config.objective.target_genes)}
    return {
        name: jax.ShapeDtypeStruct((training.batch_rows, *shape), jnp.int32, sharding=over_rows(mesh))
        for name, shape in shapes.items()
    }


def _description(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = ""
    if not _DEVICE_MEMORY.search(text):
        raise UserError(f"--target-config {path}: not a text-format GpuTargetConfigProto with a device_memory_size")
    return text


def _bytes_on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def _first_line(error: Exception) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0][:300]
    return type(error).__name__
