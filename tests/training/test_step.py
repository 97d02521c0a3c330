"""One step: the same on any number of devices, and it learns."""

import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tcc_jax.config import OptimizerConfig, from_dict
from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL
from tcc_jax.model.decoder import abstract_params
from tcc_jax.terminal import UserError
from tcc_jax.training.ahead import abstract_batch
from tcc_jax.training.optimizer import decay_mask, learning_rate, make_optimizer, muon_labels, parameter_path
from tcc_jax.training.sharding import make_mesh, partition, rows_here, shard_batch
from tcc_jax.training.state import abstract_state, create_state, frequency_bias
from tcc_jax.training.step import attention_in_words, make_eval_step, make_train_step
from tests.model.rows import pack, random_rows
from tests.training.runs import small_config, small_mesh

SIZE = 50


def take_steps(config, num_steps, rows=None):
    mesh = make_mesh(config)
    state = create_state(config, SIZE, None, mesh)
    train_step = make_train_step(config, SIZE, mesh)
    metrics = []
    for step in range(num_steps):
        batch = pack(rows or random_rows(step, 8, 32, SIZE), 32, 6)
        state, values = train_step(state, shard_batch(batch, mesh))
        metrics.append(jax.device_get(values))
    return state, metrics


def eight_heads(**sections):
    return small_config(model={"num_heads": 8, "width": 32}, **sections)


def assert_same_numbers(run, expected_run):
    (state, metrics), (expected_state, expected_metrics) = run, expected_run
    for values, expected in zip(metrics, expected_metrics, strict=True):
        for name in ("scored", "tokens", "keys", "sets"):
            assert values[name] == expected[name] > 0
        for name in ("loss_sum", "gradient_norm"):
            assert values[name] == pytest.approx(expected[name], rel=1e-5)
    # Adam divides by the size of the gradient, so rounding shows as a share of the learning rate, 0.01.
    for name in ("params", "average"):
        leaves, expected_leaves = (jax.device_get(getattr(s, name)) for s in (state, expected_state))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), leaves, expected_leaves)


@pytest.fixture(scope="module")
def one_device():
    return take_steps(eight_heads(), 3)


SHAPES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_eight_devices_in_any_layout_do_what_one_does(one_device, shape):
    # Cut points and dropout are on: their randomness must not depend on the mesh either.
    data, fsdp, tensor = shape
    run = take_steps(eight_heads(mesh={"data": data, "fsdp": fsdp, "tensor": tensor}), 3)
    embedding = run[0].params["embedding"]
    assert len(embedding.sharding.device_set) == 8
    assert embedding.addressable_shards[0].data.size == embedding.size // fsdp // tensor
    assert_same_numbers(run, one_device)


def test_parameters_and_their_moments_are_cut_alike_by_rule():
    mesh = small_mesh(data=2, fsdp=2, tensor=2)
    cases = {
        "blocks/0/attention/query/kernel": ((48, 32), (None, "tensor"), ("fsdp", "tensor")),
        "blocks/11/attention/output/kernel": ((32, 48), ("tensor", None), ("tensor", "fsdp")),
        "0/mu/blocks/0/feed_forward/expand/kernel": ((16, 64), (None, "tensor"), ("fsdp", "tensor")),
        "1/nu/blocks/0/feed_forward/contract/kernel": ((64, 16), ("tensor", None), ("tensor", "fsdp")),
        "embedding": ((128, 16), ("tensor", None), ("tensor", "fsdp")),
        # The largest dimension that is divisible; one that is not is left alone.
        "position_embedding": ((33, 16), (None, None), (None, "fsdp")),
        "0/count": ((), (), ()),
        "output_bias": ((128,), ("tensor",), ("tensor",)),
        "final_norm/scale": ((16,), (None,), (None,)),
    }
    for path, (shape, by_tensor, by_both) in cases.items():
        assert tuple(partition(path, shape, mesh)) == by_both, path
        assert tuple(partition(path, shape, small_mesh(data=4, tensor=2))) == by_tensor, path
        assert not any(partition(path, shape, small_mesh(data=8))), path


@pytest.mark.parametrize(
    "sections",
    [
        {"compute": {"scan_layers": True}},
        {"compute": {"remat": "dots"}},
        {"compute": {"remat": "full", "scan_layers": True}},
        {"compute": {"logits_tile": 16}},
        {"compute": {"remat": "full", "scan_layers": True}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(sections):
    model = {"num_layers": 3, "num_heads": 2}
    expected = take_steps(small_config(model=model), 2)
    assert_same_numbers(take_steps(small_config(model=model, **sections), 2), expected)


def traced(**sections):
    """Return a step as JAX traced it, as text, and the most numbers that an array in it has."""
    config = small_config(model={"num_layers": 3}, objective={"cut_points": 0}, **sections)
    mesh = make_mesh(config)
    step = make_train_step(config, SIZE, mesh).trace(abstract_state(config, SIZE, mesh), abstract_batch(config, mesh))
    shapes = re.findall(r"\[([0-9,]+)\]", text := str(step.jaxpr))
    return text, max(math.prod(map(int, shape.split(","))) for shape in shapes if "," in shape)


def test_a_step_is_computed_as_asked():
    plain, most = traced()
    assert "remat" not in plain
    dots, full = (traced(compute={"remat": remat})[0] for remat in ("dots", "full"))
    assert "policy=None" in full and "policy=None" not in dots and "remat" in dots
    assert traced(compute={"scan_layers": True})[0].count("scan[") == plain.count("scan[") + 2
    # Logits of all positions, or of 16 at a time.
    assert most == 8 * 32 * 128
    assert traced(compute={"logits_tile": 16})[1] < most


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_float32_products_keep_all_their_bits_on_accelerators(platform):
    prompts = {"cut_points": 2, "prompt_genes": 7, "cut_high": 0.6, "target_genes": 4}
    for objective in ({"cut_points": 0}, prompts):
        config = small_config(objective=objective, compute={"attention": "xla"})
        mesh = make_mesh(config)
        step = make_train_step(config, SIZE, mesh).trace(
            abstract_state(config, SIZE, mesh), abstract_batch(config, mesh)
        )
        lines = step.lower(lowering_platforms=(platform,)).as_text().splitlines()
        products = [line for line in lines if "stablehlo.dot_general" in line and "xf32>, tensor" in line]
        assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_step_takes_the_memory_of_the_state_it_is_given():
    config = small_config()
    mesh = make_mesh(config)
    state = create_state(config, SIZE, None, mesh)
    make_train_step(config, SIZE, mesh)(state, shard_batch(pack(random_rows(0, 8, 32, SIZE), 32, 6), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer)))


@pytest.mark.parametrize(
    ("parts", "mesh"), [(2, {}), (4, {}), (8, {}), (4, {"data": 2}), (4, {"fsdp": 2, "tensor": 2})], ids=str
)
def test_microbatches_take_the_mean_over_the_whole_batch(parts, mesh):
    # Without randomness: each part draws its own. Rows hold different numbers of scored positions.
    plain = {"model": {"dropout": 0.0, "num_heads": 2}, "objective": {"cut_points": 0}}
    expected = take_steps(small_config(**plain), 3)
    config = small_config(**plain, training={"microbatches": parts}, mesh={"data": 1} | mesh)
    assert_same_numbers(take_steps(config, 3), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_microbatch_draws_its_own_randomness(dropout):
    # The same two rows in every part: without dropout all parts have one loss, and any number of them has its mean.
    rows = random_rows(0, 2, 32, SIZE)
    means = []
    for parts in (2, 4):
        model, objective = {"dropout": dropout}, {"cut_points": 0}
        config = small_config(model=model, objective=objective, training={"microbatches": parts}, mesh={"data": 1})
        # A part takes every second, or fourth, row.
        _, (metrics,) = take_steps(config, 1, [row for row in rows for _ in range(parts)])
        means.append(metrics["loss_sum"] / metrics["scored"])
    assert (abs(means[0] - means[1]) > 1e-5 * means[0]) == (dropout > 0)


def test_the_average_follows_the_parameters():
    config = small_config(optimizer={"ema_decay": 0.5})
    mesh = make_mesh(config)
    state, train_step = create_state(config, SIZE, None, mesh), make_train_step(config, SIZE, mesh)
    average = before = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.evaluated), before)
    for num_steps in (1, 2, 3):
        state, _ = train_step(state, shard_batch(pack(random_rows(num_steps, 8, 32, SIZE), 32, 6), mesh))
        decay = min(0.5, num_steps / (9 + num_steps))
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(state.evaluated), average)
    plain, _ = take_steps(small_config(), 1)
    assert plain.average == {}
    assert plain.evaluated is plain.params


def test_the_state_is_made_as_described():
    config = small_config()
    mesh = small_mesh(2)
    state, abstract = create_state(config, SIZE, None, mesh), abstract_state(config, SIZE, mesh)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("remaining-set", "adamw"), ("next-gene", "adamw"), ("remaining-set", "muon")]
)
def test_a_small_model_learns_its_sets_by_heart(kind, optimizer):
    sets = [[list(range(16 + 8 * s, 24 + 8 * s))] for s in range(4)] * 2
    objective = {"kind": kind, "cut_points": 0}
    model = {"dropout": 0.0, "position": "none" if kind == "remaining-set" else "rope"}
    optimizer = {"kind": optimizer, "learning_rate": 0.03}
    config = small_config(objective=objective, model=model, training={"steps": 60}, optimizer=optimizer)
    _, metrics = take_steps(config, 60, sets)
    losses = [values["loss_sum"] / values["scored"] for values in metrics]
    # What is left is the choice of the set from <start>, and for the remaining-set loss of the gene within it.
    floor = np.log(4) / 9
    if kind == "remaining-set":
        floor += np.sum(np.log(np.arange(1, 9))) / 9
    assert losses[0] > 3
    assert floor - 1e-3 < losses[-1] < floor + 0.2


def test_evaluation_has_no_dropout_and_the_same_cut_points_each_time():
    config = small_config()
    mesh = small_mesh(1)
    params = create_state(config, SIZE, None, mesh).params
    batch = shard_batch(pack(random_rows(0, 8, 32, SIZE), 32, 6), mesh)
    eval_step = make_eval_step(config, SIZE, mesh)
    first, again, other = (float(eval_step(params, batch, np.int32(index))[0]) for index in (0, 0, 1))
    assert first == again != other


def marks_by_path(rule):
    params = abstract_params(small_config(model={"position": "learned"}).model, SIZE, 32)
    return {parameter_path(path): mark for path, mark in jax.tree.leaves_with_path(rule(params))}


def test_decay_is_for_matrices_only():
    marks = marks_by_path(decay_mask)
    assert sorted(path for path, decays in marks.items() if not decays) == [
        "blocks/0/attention_norm/scale",
        "blocks/0/feed_forward_norm/scale",
        "final_norm/scale",
        "output_bias",
    ]
    assert sorted(path for path, decays in marks.items() if decays) == [
        *(f"blocks/0/attention/{name}/kernel" for name in ("key", "output", "query", "value")),
        *(f"blocks/0/feed_forward/{name}/kernel" for name in ("contract", "expand")),
        "embedding",
        "position_embedding",
    ]


def test_muon_moves_the_kernels_of_the_blocks_and_nothing_else():
    names = [path for path, label in marks_by_path(muon_labels).items() if label == "muon"]
    assert len(names) == 6
    assert all(name.startswith("blocks/0/") and name.endswith("kernel") for name in names)


def test_a_muon_update_is_orthogonal_and_scaled_like_adamws():
    config = OptimizerConfig(kind="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.0, final_fraction=1.0)
    noise = np.random.default_rng(0)
    params = {
        "blocks": {"0": {"query": {"kernel": np.zeros((24, 16), np.float32)}}},
        "embedding": np.zeros((9, 4), np.float32),
    }
    gradient = jax.tree.map(lambda leaf: noise.standard_normal(leaf.shape).astype(np.float32), params)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    left, _, right = np.linalg.svd(gradient["blocks"]["0"]["query"]["kernel"], full_matrices=False)
    # Newton-Schulz leaves singular values between about 0.7 and 1.2, times 0.1 x 0.2 x sqrt(24).
    by_svd = left.T @ np.asarray(updates["blocks"]["0"]["query"]["kernel"]) @ right.T / (0.02 * 24**0.5)
    assert np.all((-np.diag(by_svd) > 0.6) & (-np.diag(by_svd) < 1.3))
    np.testing.assert_allclose(by_svd - np.diag(np.diag(by_svd)), 0, atol=0.02)
    np.testing.assert_allclose(updates["embedding"], -0.1 * np.sign(gradient["embedding"]), rtol=1e-3)


def test_muon_does_the_same_on_any_mesh():
    muon = {"kind": "muon"}
    eight = take_steps(small_config(optimizer=muon, mesh={"data": 2, "fsdp": 2, "tensor": 2}), 3)
    assert_same_numbers(eight, take_steps(small_config(optimizer=muon), 3))


def test_stable_decay_is_constant_and_then_linear():
    config = OptimizerConfig(
        schedule="stable-decay", learning_rate=0.5, warmup_steps=10, decay_share=0.25, final_fraction=0.2
    )
    rates = [float(learning_rate(config, 100, step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rates[9:75], 0.5, rtol=1e-6)
    np.testing.assert_allclose(rates[74:], np.linspace(0.5, 0.1, 26), rtol=1e-5)


def test_learning_rate_climbs_to_its_peak_and_falls_along_a_cosine():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=10, final_fraction=0.2)
    rates = [float(learning_rate(config, 110, step)) for step in range(110)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-6)
    assert rates[59] == pytest.approx(0.3, rel=1e-5)
    assert rates[-1] == pytest.approx(0.1, rel=1e-5)
    assert np.all(np.diff(rates[9:]) < 0)
    assert float(learning_rate(OptimizerConfig(warmup_steps=100), 5, 4)) == pytest.approx(5e-5)


def test_clipping_bounds_the_gradient_that_adam_sees():
    gradient = {"embedding": np.full(4, 100.0, np.float32)}
    for clip, expected in ((1.0, 0.5), (0.0, 100.0)):
        optimizer = make_optimizer(OptimizerConfig(gradient_clip=clip, beta1=0.0), 10)
        state = optimizer.update(gradient, optimizer.init(gradient), gradient)[1]
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
        np.testing.assert_allclose(moments[0], expected, rtol=1e-5)


def test_frequency_bias_is_the_share_of_each_gene_among_all_targets():
    counts_V = np.zeros(NUM_SPECIAL + 3, np.int64)
    counts_V[NUM_SPECIAL:] = [30, 10, 0]
    bias_V = frequency_bias(counts_V, num_sets=8)
    assert bias_V.dtype == np.float32
    assert np.count_nonzero(bias_V) == 4
    np.testing.assert_allclose(np.exp(bias_V[[END, -3, -2, -1]]), np.array([8.5, 30.5, 10.5, 0.5]) / 50, rtol=1e-6)
    config = small_config()
    state = create_state(config, len(counts_V), bias_V, small_mesh(1))
    np.testing.assert_array_equal(state.params["output_bias"][: len(counts_V)], bias_V)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"mesh": {"data": 9}}, "data x fsdp x tensor = 9 x 1 x 1: only 8"),
        ({"mesh": {"data": -1, "fsdp": 3}}, "fsdp x tensor = 3 x 1: does not divide the 8 cpu devices"),
        ({"mesh": {"data": 3}}, "batch_rows = 8: must be a multiple of the 3 devices of mesh.data$"),
        ({"mesh": {"data": 4}, "training": {"microbatches": 4}}, "microbatches = 2: must be a multiple of the 4"),
        ({"mesh": {"tensor": 4}}, "model.num_heads = 2: must be a multiple of the 4 devices of mesh.tensor"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sections, words):
    with pytest.raises(UserError, match=words):
        make_mesh(small_config(**sections))


class Chip:
    platform = "tpu"

    def __init__(self, process_index):
        self.process_index = process_index


def test_the_rows_of_a_process_are_one_block_whatever_the_topology(monkeypatch):
    chips = [Chip(process) for process in (0, 0, 1, 1, 1, 1, 0, 0)]

    def by_topology(shape, axes, *, axis_types, devices):
        return Mesh(np.array(devices, dtype=object).reshape(shape), axes, axis_types=axis_types)

    monkeypatch.setattr(jax, "make_mesh", by_topology)
    mesh = make_mesh(small_config(mesh={"data": -1, "tensor": 2}), chips)
    assert [chip.process_index for chip in mesh.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match="leaves out a whole process; take all 8"):
        make_mesh(small_config(mesh={"data": 2}), chips)


def test_all_devices_are_taken_unless_told_otherwise():
    assert dict(make_mesh(small_config(mesh={"data": -1, "tensor": 2})).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert rows_here(small_mesh(2, 2, 2), 8) == (1, 0)


def prompt_batch(seed):
    """Return a packed batch of prompts with four targets beyond each."""
    random = np.random.default_rng(seed)
    batch = pack([[tuple(s) for s in row] for row in random_rows(seed, 8, 32, SIZE)], 32, 6)
    used = batch["gene_counts"] > 0
    batch["set_sizes"] = batch["gene_counts"] + used * random.integers(4, 9, used.shape).astype(np.int32)
    batch["targets"] = random.integers(NUM_SPECIAL, SIZE, (*used.shape, 4)).astype(np.int32) * used[:, :, None]
    return batch


def test_prompts_train_alike_on_eight_devices():
    objective = {"prompt_genes": 7, "cut_high": 0.6, "target_genes": 4}
    runs = []
    for mesh in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        config = eight_heads(mesh=mesh, objective=objective)
        mesh, metrics = make_mesh(config), []
        state, train_step = create_state(config, SIZE, None, mesh), make_train_step(config, SIZE, mesh)
        for step in range(3):
            state, values = train_step(state, shard_batch(prompt_batch(step), mesh))
            metrics.append(jax.device_get(values))
        runs.append((state, metrics))
    assert_same_numbers(*runs)


def test_the_attention_is_told_with_the_blocks_that_do_without():
    device = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")
    mesh = SimpleNamespace(devices=np.array([device]))

    def told(layers, cuts, asked):
        model = {"num_layers": layers, "width": 64, "num_heads": 1, "matmul_dtype": "bfloat16"}
        sections = {"objective": {"cut_points": cuts}, "compute": {"attention": asked}, "training": {"row_length": 128}}
        return attention_in_words(from_dict({"model": model, **sections}), mesh)

    assert told(2, 0, "auto") == "cudnn"
    assert told(2, 2, "pallas") == "pallas in 1 of 2 blocks, xla in the last, which asks from few positions"
    assert told(2, 2, "xla") == told(1, 2, "auto") == "xla"
    with pytest.raises(UserError, match=r"compute\.attention = cudnn: no block can use it"):
        told(1, 2, "cudnn")
