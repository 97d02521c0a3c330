"""One step: the same on any number of devices, and it learns."""

import jax
import numpy as np
import pytest

from tcc_jax.config import OptimizerConfig
from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL
from tcc_jax.model.decoder import abstract_params
from tcc_jax.terminal import UserError
from tcc_jax.training.optimizer import decay_mask, learning_rate, make_optimizer, parameter_path
from tcc_jax.training.sharding import make_mesh, shard_batch
from tcc_jax.training.state import abstract_state, create_state, frequency_bias
from tcc_jax.training.step import make_eval_step, make_train_step
from tests.model.rows import pack, random_rows
from tests.training.runs import small_config

SIZE = 50


def take_steps(config, num_devices, num_steps, rows=None):
    mesh = make_mesh(num_devices, config.training.batch_rows)
    state = create_state(config, SIZE, None, mesh)
    train_step = make_train_step(config, SIZE, mesh)
    metrics = []
    for step in range(num_steps):
        batch = pack(rows or random_rows(step, 8, 32, SIZE), 32, 6)
        state, values = train_step(state, shard_batch(batch, mesh))
        metrics.append(jax.device_get(values))
    return state, metrics


def test_eight_devices_do_what_one_does():
    # Cut points and dropout are on: their randomness must not depend on the mesh either.
    config = small_config()
    (one, one_metrics), (eight, eight_metrics) = take_steps(config, 1, 3), take_steps(config, 8, 3)
    assert len(eight.params["embedding"].sharding.device_set) == 8
    for expected, metrics in zip(one_metrics, eight_metrics, strict=True):
        assert metrics["scored"] == expected["scored"] > 0
        for name in ("loss_sum", "gradient_norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    # Adam divides by the size of the gradient, so rounding shows as a share of the learning rate, 0.01.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one.params, eight.params)


def test_the_state_is_made_as_described():
    config = small_config()
    mesh = make_mesh(2, 8)
    state, abstract = create_state(config, SIZE, None, mesh), abstract_state(config, SIZE, mesh)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)


@pytest.mark.parametrize("kind", ["remaining-set", "next-gene"])
def test_a_small_model_learns_its_sets_by_heart(kind):
    sets = [[list(range(16 + 8 * s, 24 + 8 * s))] for s in range(4)] * 2
    objective = {"kind": kind, "cut_points": 0}
    model = {"dropout": 0.0, "position": "none" if kind == "remaining-set" else "rope"}
    config = small_config(objective=objective, model=model, training={"steps": 60}, optimizer={"learning_rate": 0.03})
    _, metrics = take_steps(config, 1, 60, sets)
    losses = [values["loss_sum"] / values["scored"] for values in metrics]
    # What is left is the choice of the set from <start>, and for the remaining-set loss of the gene within it.
    floor = np.log(4) / 9
    if kind == "remaining-set":
        floor += np.sum(np.log(np.arange(1, 9))) / 9
    assert losses[0] > 3
    assert floor - 1e-3 < losses[-1] < floor + 0.2


def test_evaluation_has_no_dropout_and_the_same_cut_points_each_time():
    config = small_config()
    mesh = make_mesh(1, 8)
    params = create_state(config, SIZE, None, mesh).params
    batch = shard_batch(pack(random_rows(0, 8, 32, SIZE), 32, 6), mesh)
    eval_step = make_eval_step(config, SIZE, mesh)
    first, again, other = (float(eval_step(params, batch, np.int32(index))[0]) for index in (0, 0, 1))
    assert first == again != other


def test_decay_is_for_matrices_only():
    params = abstract_params(small_config(model={"position": "learned"}).model, SIZE, 32)
    marks = {parameter_path(path): mark for path, mark in jax.tree.leaves_with_path(decay_mask(params))}
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
    state = create_state(config, len(counts_V), bias_V, make_mesh(1, 8))
    np.testing.assert_array_equal(state.params["output_bias"][: len(counts_V)], bias_V)


@pytest.mark.parametrize(("num_data", "rows", "words"), [(9, 9, "mesh.data = 9: only 8"), (3, 8, "batch_rows = 8")])
def test_a_mesh_that_cannot_be_is_refused(num_data, rows, words):
    with pytest.raises(UserError, match=words):
        make_mesh(num_data, rows)
