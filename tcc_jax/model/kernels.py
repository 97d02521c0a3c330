"""Attention kernels for packed rows: which of them a device can run, and each one behind the meaning of `attend`."""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tcc_jax.model.attention import attend
from tcc_jax.terminal import UserError

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

BACKENDS = ("xla", "pallas", "cudnn", "splash")
# What "auto" tries on a platform, in this order, before plain XLA.
KERNELS_OF = {"tpu": ("splash",), "gpu": ("cudnn", "pallas"), "cuda": ("cudnn", "pallas")}


def choose_backend(
    requested: str,
    *,
    platform: str,
    compute_capability: float | None,
    row_length: int,
    head_size: int,
    dtype: str,
    device_kind: str = "",
) -> str:
    """Return the attention backend to use: "xla", "pallas", "cudnn" or "splash".

    Takes values and no devices, so that hardware which is not here can be compiled for. The numbers of rows and heads
    have a bound in the cudnn backend, which `make_attend`'s function checks when it is traced.

    Args:
        requested: one of `BACKENDS`, or "auto" for the fastest that can run.
        platform: of the devices, as JAX names it: "cpu", "gpu" (or "cuda") or "tpu".
        compute_capability: of an NVIDIA GPU, 9.0 for Hopper; None for anything else.
        row_length: tokens in a row.
        head_size: numbers in a head.
        dtype: name of the type of queries, keys and values.
        device_kind: of the devices, as JAX names it, such as "TPU v3".

    Raises:
        UserError: the requested backend does not exist or cannot run this; nothing else is taken in its place.
    """

    def refusal(backend: str) -> str | None:
        if backend == "xla":
            return None
        if backend not in KERNELS_OF.get(platform, ()):
            return f"needs {'a TPU' if backend == 'splash' else 'an NVIDIA GPU'}, and this is {platform}"
        if dtype != "bfloat16":
            return f"takes bfloat16 (it has no {dtype} products that keep all bits)"
        if backend == "splash" and device_kind in ("TPU v2", "TPU v3"):
            return f"needs a TPU v4 or newer, not a {device_kind}"
        if backend == "splash":
            return None if row_length % 128 == 0 else f"needs a row length that is a multiple of 128, not {row_length}"
        oldest = 9.0 if backend == "cudnn" else 8.0
        if compute_capability is None or compute_capability < oldest:
            return f"needs compute capability {oldest} or newer, not {compute_capability}"
        if backend == "cudnn" and (head_size % 8 or head_size > 256):
            return f"needs a head size that is a multiple of 8, up to 256, not {head_size}"
        if backend == "pallas" and not 16 <= head_size <= 128:
            return f"needs a head size from 16 to 128, not {head_size}"
        if backend == "pallas" and row_length % 16:
            return f"needs a row length that is a multiple of 16, not {row_length}"
        return None

    if requested == "auto":
        return next((backend for backend in KERNELS_OF.get(platform, ()) if refusal(backend) is None), "xla")
    if requested not in BACKENDS:
        raise UserError(f"there is no attention backend {requested!r}: use auto, {', '.join(BACKENDS)}")
    if reason := refusal(requested):
        raise UserError(f"attention backend {requested!r} {reason}; use auto or xla")
    return requested


def make_attend(backend: str, *, segments_per_row: int, interpret: bool = False) -> Attend:
    """Return a function with the arguments, the result and the meaning of `attend`, computed by a backend.

    It works on local arrays: inside a mesh, wrap it in `jax.shard_map(..., check_vma=False)` over rows and heads.
    Scores and softmax are float32. One more rounding than in `attend`: splash scales the queries in their own type,
    which is exact only where the head size is a power of four.

    Args:
        backend: what `choose_backend` returned.
        segments_per_row: most segments in a row, padding not counted: the cudnn backend has offsets for so many, and
            leaves undefined what is beyond. It also takes each run of equal segment ids as a segment of its own.
        interpret: run the pallas and splash kernels as plain JAX, on any device: slow, for tests.
    """
    if backend == "xla":
        return attend
    kernels: dict[str, Attend] = {
        "pallas": functools.partial(_pallas, interpret=interpret),
        "splash": functools.partial(_splash, interpret=interpret),
        "cudnn": functools.partial(_cudnn, slots=segments_per_row + 1),
    }
    return kernels[backend]


def _pallas(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segments_BT: jax.Array, *, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    # Triton's blocks are powers of two, and the backward kernel does not check that its own divide a row.
    block = min(128, _largest_power_of_two_in(q_BTNH.shape[1]))
    small = min(32, block)
    return mha(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        segments_BT,
        sm_scale=q_BTNH.shape[3] ** -0.5,
        causal=True,
        block_sizes=BlockSizes(block, block, small, small, small, small),
        interpret=interpret,
    )


def _largest_power_of_two_in(number: int) -> int:
    return number & -number


def _splash(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segments_BT: jax.Array, *, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, length, num_heads, head_size = q_BTNH.shape
    kernel = jax.vmap(_splash_kernel(num_heads, length, interpret))
    q_BNTH, k_BNSH, v_BNSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH * head_size**-0.5, k_BSNH, v_BSNH))
    return jnp.swapaxes(kernel(q_BNTH, k_BNSH, v_BNSH, SegmentIds(segments_BT, segments_BT)), 1, 2)


@functools.cache
def _splash_kernel(num_heads: int, length: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    block = min(512, _largest_power_of_two_in(length))
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * num_heads)
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    # Kept between traces, so its arrays must belong to none of them.
    with jax.ensure_compile_time_eval():
        kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    return jax.tree.map(np.asarray, kernel)


def _cudnn(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segments_BT: jax.Array, *, slots: int) -> jax.Array:
    if q_BTNH.size >= 2**31:
        raise UserError(
            f"attention backend 'cudnn' counts in 32 bits: {q_BTNH.shape} (rows, tokens, heads, head size) on one "
            "device are too many numbers; use smaller microbatches or another backend"
        )
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError as error:
        raise UserError(
            f"attention backend 'cudnn': JAX {jax.__version__} no longer has its private kernel for packed rows "
            "where 0.10 to 0.12 have it; use pallas or xla"
        ) from error
    starts_BM, lengths_BM = segment_slots(segments_BT, slots)
    # Offsets are those of the first tokens alone: the column after the last slot is never a segment's end.
    starts_BM = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    return dot_product_attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM,
        kv_offsets=starts_BM,
        scale=q_BTNH.shape[3] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )


@contextlib.contextmanager
def tracing_for_absent_gpu() -> Iterator[None]:
    """Let the cudnn backend be traced where there is no GPU, to compile for one ahead of time.

    JAX asks the GPU and the cuDNN of the tracing host what they can run; `choose_backend` has asked for the target.
    """
    from jax._src.cudnn import fused_attention_stablehlo as host

    with unittest.mock.patch.multiple(
        host,
        check_cudnn_version=lambda: 90600,  # 9.6, the first with packed rows
        check_compute_capability=lambda _: True,
        is_cuda_compute_capability_equal=lambda _: False,
    ):
        yield


def segment_slots(segments_BT: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Describe each row as runs of equal segment ids, padding being such a run, as the cudnn kernel wants them.

    Args:
        segments_BT: int32 segment ids.
        slots: runs to make room for, M.

    Returns:
        The first column of each run and its length, both BM int32 with -1 in slots that are not used. Of a row with
        more runs the last ones are left out.
    """
    length = segments_BT.shape[1]
    is_first_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    find = jax.vmap(lambda is_first_T: jnp.nonzero(is_first_T, size=slots + 1, fill_value=length)[0])
    bounds_BM = find(is_first_BT).astype(jnp.int32)
    starts_BM, ends_BM = bounds_BM[:, :-1], bounds_BM[:, 1:]
    used_BM = starts_BM < length
    return jnp.where(used_BM, starts_BM, -1), jnp.where(used_BM, ends_BM - starts_BM, -1)
