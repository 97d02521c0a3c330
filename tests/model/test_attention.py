"""Every attention backend against a float64 loop, in outputs and gradients; what cannot run here is lowered for it."""

import importlib.util
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tcc_jax.model.kernels import (
    BACKENDS,
    KERNELS_OF,
    choose_backend,
    make_attend,
    segment_slots,
    tracing_for_absent_gpu,
)
from tcc_jax.terminal import UserError
from tcc_jax.training.ahead import H200

# Three blocks of 128 for the kernels, with segments over their borders.
LENGTH, NUM_HEADS = 384, 2
ON_CPU = ("xla", "pallas", "splash")
PLATFORMS = {"pallas": "cuda", "cudnn": "cuda", "splash": "tpu"}
DEVICES = {
    "pallas": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
    "splash": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
}


def rows_of(*lengths):
    """One row of segments 1, 2, ... of these lengths, then padding."""
    segments_T = np.zeros(LENGTH, np.int32)
    segments_T[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return segments_T


# Padding after segments of one token and across blocks; no padding; one segment; padding alone; ids in any order.
SEGMENTS_BT = np.stack(
    [
        rows_of(1, 100, 90, 1, 1, 120),
        rows_of(3, 125, 128, 127, 1),
        rows_of(LENGTH),
        rows_of(),
        np.random.default_rng(1).integers(0, 4, LENGTH).astype(np.int32),
    ]
)


def random_inputs(head_size, dtype):
    random = np.random.default_rng(0)
    shape = (len(SEGMENTS_BT), LENGTH, NUM_HEADS, head_size)
    q, k, v, cotangent = (random.normal(size=shape).astype(dtype) for _ in range(4))
    # Padding holds what no other segment may see, large enough to show in any sum that it entered; nobody reads it.
    q[SEGMENTS_BT == 0], k[SEGMENTS_BT == 0], v[SEGMENTS_BT == 0], cotangent[SEGMENTS_BT == 0] = 50, 50, 1000, 0
    return q, k, v, cotangent


def reference(q_BTNH, k_BTNH, v_BTNH, cotangent_BTNH, segments_BT):
    """Outputs and gradients for q, k, v in float64, query by query; and how far one rounding of each result and of what
    it is summed from (weights, their derivatives, outputs) can move them, in units of that rounding."""
    q_BTNH, k_BTNH, v_BTNH, cotangent_BTNH = (x.astype(np.float64) for x in (q_BTNH, k_BTNH, v_BTNH, cotangent_BTNH))
    results = [np.zeros_like(q_BTNH) for _ in range(4)]
    moved = [np.zeros_like(q_BTNH) for _ in range(4)]
    scale = q_BTNH.shape[3] ** -0.5
    for row, t in np.ndindex(segments_BT.shape):
        seen = np.flatnonzero(segments_BT[row, : t + 1] == segments_BT[row, t])
        for head in range(q_BTNH.shape[2]):
            q_H, d_H = q_BTNH[row, t, head], cotangent_BTNH[row, t, head]
            k_SH, v_SH = k_BTNH[row, seen, head], v_BTNH[row, seen, head]
            scores_S = k_SH @ q_H * scale
            p_S = np.exp(scores_S - scores_S.max())
            p_S /= p_S.sum()
            o_H, dp_S = p_S @ v_SH, v_SH @ d_H
            ds_S = p_S * (dp_S - p_S @ dp_S) * scale
            o_moved_H = np.abs(o_H) + p_S @ np.abs(v_SH)
            ds_moved_S = p_S * (np.abs(dp_S) + p_S @ np.abs(dp_S) + o_moved_H @ np.abs(d_H)) * scale + np.abs(ds_S)
            for all_of, o, dq, dk, dv in (
                (results, o_H, ds_S @ k_SH, np.outer(ds_S, q_H), np.outer(p_S, d_H)),
                (
                    moved,
                    o_moved_H,
                    ds_moved_S @ np.abs(k_SH),
                    np.outer(ds_moved_S, np.abs(q_H)),
                    np.outer(p_S, abs(d_H)),
                ),
            ):
                all_of[0][row, t, head], all_of[1][row, t, head] = o, dq
                all_of[2][row, seen, head] += dk
                all_of[3][row, seen, head] += dv
    for all_moved, result in zip(moved[1:], results[1:], strict=True):
        all_moved += np.abs(result)
    return results, moved


def check(found, expected, moved, segments_BT, dtype):
    """Compare outputs and gradients with those of the reference."""
    real_BT = segments_BT > 0
    for number, (result, exact, units) in enumerate(zip(found, expected, moved, strict=True)):
        assert result.dtype == dtype
        result = np.asarray(result, np.float64)
        # Padding gives the mean of its values, here all the same (weights and results are rounded), and no gradient.
        np.testing.assert_allclose(result[~real_BT], 0 if number else 1000, rtol=2.0**-7, atol=0)
        if dtype == "float32":
            # exp() makes the rounding of a score of up to 5 one of 5 in its weight, and sums over 384 positions and 64
            # numbers add their own: 32 roundings of the largest entry, whatever the order of the sums.
            atol = 32 * 2.0**-24 * np.abs(exact[real_BT]).max()
            np.testing.assert_allclose(result[real_BT], exact[real_BT], rtol=0, atol=atol)
        else:
            # bfloat16 keeps 8 bits: each result and what it is summed from is rounded once, and moved no further.
            assert np.all(np.abs(result - exact) <= 2.0**-8 * units)


def results_of(attend, q, k, v, cotangent, segments_BT=SEGMENTS_BT):
    def forward_and_backward(q, k, v, cotangent):
        output, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT), q, k, v)
        return output, *pull_back(cotangent)

    return jax.jit(forward_and_backward)(q, k, v, cotangent)


@pytest.fixture(scope="module", params=[(64, "float32"), (48, "float32"), (64, "bfloat16")], ids=str)
def case(request):
    head_size, dtype = request.param
    inputs = random_inputs(head_size, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    return dtype, inputs, *reference(*inputs, SEGMENTS_BT)


@pytest.mark.parametrize("backend", ON_CPU)
def test_outputs_and_gradients_are_those_of_a_float64_loop(backend, case):
    dtype, inputs, expected, moved = case
    found = results_of(make_attend(backend, segments_per_row=8, interpret=True), *inputs)
    check(found, expected, moved, SEGMENTS_BT, dtype)


@pytest.mark.parametrize("backend", ON_CPU)
def test_padding_is_a_segment_like_any_other(backend):
    inputs = [np.random.default_rng(0).normal(size=(5, LENGTH, NUM_HEADS, 64)).astype(np.float32) for _ in range(4)]
    attend = make_attend(backend, segments_per_row=8, interpret=True)
    renamed_BT = np.where(SEGMENTS_BT == 0, 9, SEGMENTS_BT)
    for found, expected in zip(results_of(attend, *inputs), results_of(attend, *inputs, renamed_BT), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_of_this_device_give_the_results_of_a_float64_loop(backend):
    # TCC_TEST_PLATFORM=cuda or tpu runs this; elsewhere the kernels are interpreted, above.
    if backend not in ("xla", *KERNELS_OF.get(jax.default_backend(), ())) or jax.default_backend() == "cpu":
        pytest.skip(f"{backend} is not for the {jax.default_backend()} devices here")
    inputs = [x[:4] for x in random_inputs(64, ml_dtypes.bfloat16)]
    expected, moved = reference(*inputs, RUNS_BT)
    found = results_of(make_attend(backend, segments_per_row=8), *inputs, segments_BT=RUNS_BT)
    check(found, expected, moved, RUNS_BT, "bfloat16")


def test_float32_products_of_the_plain_backend_keep_all_bits_on_a_tpu():
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.float32)
    attend = make_attend("xla", segments_per_row=1)
    lowered = jax.jit(attend).trace(x, x, x, np.ones((1, 128), np.int32)).lower(lowering_platforms=("tpu",)).as_text()
    precisions = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", lowered)
    assert len(precisions) >= 2
    assert set(precisions) == {("HIGHEST", "HIGHEST")}


def runs_of(segments_T):
    """First column and length of each run of equal ids: the segments of a packed row and its padding."""
    lengths = [len(list(run)) for _, run in itertools.groupby(segments_T)]
    return [(sum(lengths[:slot]), length) for slot, length in enumerate(lengths)]


RUNS_BT = SEGMENTS_BT[:4]
RUNS = [runs_of(segments_T) for segments_T in RUNS_BT]


@pytest.mark.parametrize("slots", [4, 6, 7, 9])
def test_slots_are_the_runs_of_a_row(slots):
    starts_BM, lengths_BM = jax.jit(segment_slots, static_argnums=1)(RUNS_BT, slots)
    for runs, starts_M, lengths_M in zip(RUNS, starts_BM, lengths_BM, strict=True):
        padded = np.array((runs + [(-1, -1)] * slots)[:slots])
        np.testing.assert_array_equal(np.stack([starts_M, lengths_M], axis=1), padded)


def test_cudnn_is_told_where_each_segment_of_a_batch_starts_and_how_long_it_is(monkeypatch):
    # JAX makes one list of a batch, where a segment's start and length must come out side by side.
    from jax._src.cudnn import fused_attention_stablehlo as host

    told = {}

    def record(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert (scale, mask_type) == (64**-0.5, host.MaskType.PADDING_CAUSAL)
        told["lists"] = jax.jit(host._fix_seqlen_offsets)(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
        return q

    monkeypatch.setattr(host, "dot_product_attention", record)
    q = jnp.ones((4, LENGTH, NUM_HEADS, 64))
    output = make_attend("cudnn", segments_per_row=6)(q, q, q, RUNS_BT)
    np.testing.assert_array_equal(output, q)
    q_lengths, kv_lengths, q_starts, kv_starts = (np.asarray(x).ravel().tolist() for x in told["lists"])
    assert (q_lengths, q_starts) == (kv_lengths, kv_starts)
    numbers = NUM_HEADS * 64
    expected = [((row * LENGTH + start) * numbers, size) for row, runs in enumerate(RUNS) for start, size in runs]
    expected += [(q.size, 0)] * (4 * 7 - len(expected))
    assert list(zip(q_starts, q_lengths, strict=False)) == expected


def test_cudnn_refuses_more_than_it_can_count():
    x = jax.ShapeDtypeStruct((2**11, 2**10, 2**4, 2**6), jnp.bfloat16)
    attend = make_attend("cudnn", segments_per_row=2)
    with pytest.raises(UserError, match="32 bits"):
        jax.eval_shape(attend, x, x, x, jax.ShapeDtypeStruct((2**11, 2**10), jnp.int32))


def lower_sharded(backend, mesh, rows):
    """Forward and backward of a backend over rows and heads of a mesh, lowered for its platform."""
    batch = ("data", "fsdp")
    by_head = PartitionSpec(batch, None, "tensor", None)
    local = make_attend(backend, segments_per_row=64)
    attend = jax.shard_map(
        local, mesh=mesh, in_specs=(by_head,) * 3 + (PartitionSpec(batch),), out_specs=by_head, check_vma=False
    )

    def step(q, k, v, cotangent, segments):
        output, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return output, *pull_back(cotangent)

    x = jax.ShapeDtypeStruct((rows, 1024, 12, 64), jnp.bfloat16, sharding=NamedSharding(mesh, by_head))
    segments = jax.ShapeDtypeStruct((rows, 1024), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(batch)))
    with tracing_for_absent_gpu():
        traced = jax.jit(step).trace(x, x, x, x, segments)
    return traced.lower(lowering_platforms=(PLATFORMS[backend],))


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        ("pallas", ["__gpu$xla.gpu.triton"] * 3),
        ("cudnn", ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]),
        ("splash", ["tpu_custom_call"] * 2),
    ],
)
def test_a_kernel_is_what_a_sharded_step_calls(backend, calls):
    axes, auto = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    if backend == "cudnn":  # lowers only for devices that exist, of whatever kind
        mesh = jax.make_mesh((2, 2, 2), axes, axis_types=auto)
    else:
        mesh = AbstractMesh((2, 2, 2), axes, axis_types=auto, abstract_device=DEVICES[backend])
    lowered = lower_sharded(backend, mesh, rows=8).as_text().replace("\\22", '"')
    assert re.findall(r"custom_call @([\w$.]+)\(", lowered) == calls
    if backend == "cudnn":
        assert lowered.count('"max_seg_per_batch": 65') == lowered.count('"mask_type": "PADDING_CAUSAL"') == 2


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# Bytes of score matrices in float32, which no kernel may keep, on one device of the meshes below.
SCORE_BYTES = 8 * 12 * 1024 * 1024 * 4


@pytest.mark.skipif(not installed("libtpu"), reason="compiling for a TPU needs libtpu")
def test_splash_compiles_for_a_tpu():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = topologies.make_mesh(topology, (2, 4, 1), ("data", "fsdp", "tensor"))
    compiled = lower_sharded("splash", mesh, rows=64).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < SCORE_BYTES / 2


@pytest.mark.skipif(not installed("jax_plugins.xla_cuda12"), reason="compiling for a GPU needs jax-cuda12-plugin")
@pytest.mark.parametrize("backend", ["pallas", "cudnn"])
def test_a_gpu_kernel_compiles_for_an_h200(backend):
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        target_config=H200,
        topology="1x1x1",
    )
    mesh = Mesh(np.array(topology.devices).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    compiled = lower_sharded(backend, mesh, rows=8).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < SCORE_BYTES / 2


def choose(requested, platform, compute_capability=None, row_length=1024, head_size=64, dtype="bfloat16", kind=""):
    return choose_backend(
        requested,
        platform=platform,
        compute_capability=compute_capability,
        row_length=row_length,
        head_size=head_size,
        dtype=dtype,
        device_kind=kind,
    )


@pytest.mark.parametrize(
    ("hardware", "backend"),
    [
        ({"platform": "cpu"}, "xla"),
        ({"platform": "tpu"}, "splash"),
        ({"platform": "tpu", "kind": "TPU v3"}, "xla"),
        ({"platform": "tpu", "row_length": 1000}, "xla"),
        ({"platform": "tpu", "dtype": "float32"}, "xla"),
        ({"platform": "gpu", "compute_capability": 9.0}, "cudnn"),
        ({"platform": "cuda", "compute_capability": 10.0}, "cudnn"),
        ({"platform": "gpu", "compute_capability": 9.0, "head_size": 60}, "pallas"),
        ({"platform": "gpu", "compute_capability": 9.0, "dtype": "float32"}, "xla"),
        ({"platform": "gpu", "compute_capability": 8.9}, "pallas"),
        ({"platform": "gpu", "compute_capability": 8.0, "row_length": 1000}, "xla"),
        ({"platform": "gpu", "compute_capability": 7.5}, "xla"),
        ({"platform": "gpu"}, "xla"),
    ],
)
def test_auto_takes_the_fastest_that_can_run(hardware, backend):
    assert choose("auto", **hardware) == backend
    assert choose(backend, **hardware) == backend


@pytest.mark.parametrize(
    ("requested", "hardware", "words"),
    [
        ("flash", {"platform": "gpu"}, "there is no attention backend 'flash'"),
        ("splash", {"platform": "gpu", "compute_capability": 9.0}, "'splash' needs a TPU, and this is gpu"),
        ("splash", {"platform": "tpu", "row_length": 1000}, "'splash' .* multiple of 128, not 1000"),
        ("splash", {"platform": "tpu", "dtype": "float32"}, "'splash' takes bfloat16 .*float32"),
        ("splash", {"platform": "tpu", "kind": "TPU v3"}, "'splash' needs a TPU v4 or newer, not a TPU v3"),
        ("pallas", {"platform": "cpu"}, "'pallas' needs an NVIDIA GPU, and this is cpu"),
        ("pallas", {"platform": "gpu", "compute_capability": 7.5}, "'pallas' .* capability 8.0 or newer, not 7.5"),
        ("pallas", {"platform": "gpu", "compute_capability": 8.0, "head_size": 160}, "'pallas' .* 16 to 128, not 160"),
        (
            "pallas",
            {"platform": "gpu", "compute_capability": 8.0, "row_length": 8},
            "'pallas' .* multiple of 16, not 8",
        ),
        ("pallas", {"platform": "gpu", "compute_capability": 8.0, "dtype": "float32"}, "'pallas' takes bfloat16"),
        ("cudnn", {"platform": "tpu"}, "'cudnn' needs an NVIDIA GPU, and this is tpu"),
        ("cudnn", {"platform": "gpu", "compute_capability": 8.9}, "'cudnn' .* capability 9.0 or newer, not 8.9"),
        ("cudnn", {"platform": "gpu"}, "'cudnn' .* capability 9.0 or newer, not None"),
        ("cudnn", {"platform": "gpu", "compute_capability": 9.0, "head_size": 60}, "'cudnn' .* up to 256, not 60"),
        ("cudnn", {"platform": "gpu", "compute_capability": 9.0, "head_size": 264}, "'cudnn' .* up to 256, not 264"),
        ("cudnn", {"platform": "gpu", "compute_capability": 9.0, "dtype": "float32"}, "'cudnn' takes bfloat16"),
    ],
)
def test_a_backend_that_cannot_do_it_says_so(requested, hardware, words):
    with pytest.raises(UserError, match=words) as refusal:
        choose(requested, **hardware)
    assert "\n" not in str(refusal.value)
