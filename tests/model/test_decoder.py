"""What one position may see of another: only its own segment, only up to itself, in values and in gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcc_jax.config import ModelConfig
from tcc_jax.model.attention import segment_offsets
from tcc_jax.model.decoder import (
    NUM_SPECIAL,
    Execution,
    abstract_params,
    count_parameters,
    initial_params,
    merge,
    padded_vocabulary_size,
    start_from_vectors,
)
from tcc_jax.model.objective import remaining_set_loss
from tests.model.rows import pack, random_rows

SIZE, LENGTH = 40, 24
POSITIONS = ("none", "learned", "rope")
SETS = [[20, 21, 22, 23, 24], [25, 20, 26], [30]]


def model(position="none", **changes):
    return ModelConfig(num_layers=2, width=16, num_heads=2, position=position, matmul_dtype="float32", **changes)


def params_of(config):
    # Larger than the real initialisation, so that attention is far from uniform and a leak would show.
    params = initial_params(config, SIZE, LENGTH, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, params)


def hidden(config, params, tokens_BT, segments_BT):
    return jax.jit(lambda params, *batch: merge(config, SIZE, LENGTH, params)(*batch))(params, tokens_BT, segments_BT)


def loss_sum(config, params, batch):
    decoder = merge(config, SIZE, LENGTH, params)
    h_BTD = decoder(batch["tokens"], batch["segments"])
    return remaining_set_loss(decoder, h_BTD, batch["tokens"], batch["segments"])[0]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_packed_row_equals_its_sets_alone(position):
    config = model(position)
    params = params_of(config)
    # Empty rows below the packed one: arrays of one shape compile once.
    packed, alone = pack([SETS, [], []], LENGTH, 3), pack([[genes] for genes in SETS], LENGTH, 3)
    h_BTD = hidden(config, params, packed["tokens"], packed["segments"])
    alone_BTD = hidden(config, params, alone["tokens"], alone["segments"])
    for row, (genes, start) in enumerate(zip(SETS, packed["starts"][0], strict=True)):
        span = len(genes) + 2
        np.testing.assert_allclose(h_BTD[0, start : start + span], alone_BTD[row, :span], rtol=1e-5, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda params, batch: loss_sum(config, params, batch)))
    packed_gradient, alone_gradient = gradient(params, packed), gradient(params, alone)
    for leaf, expected in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(alone_gradient), strict=True):
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_position_sees_only_its_segment_up_to_itself(position):
    config = model(position)
    params = params_of(config)
    batch = pack([SETS], LENGTH, 3)
    tokens_BT, segments_BT = batch["tokens"], batch["segments"]
    x_BTD = params["embedding"][tokens_BT]

    def hidden_from_inputs(x_BTD):
        # A vocabulary of its own for every column, so that a gradient by embedding is one by position.
        columns = {**params, "embedding": x_BTD[0]}
        return merge(config, SIZE, LENGTH, columns)(np.arange(LENGTH)[None], segments_BT)[0]

    jacobian_TDSE = jax.jit(jax.jacrev(hidden_from_inputs))(x_BTD)[:, :, 0]
    influence_TS = np.abs(jacobian_TDSE).max(axis=(1, 3)) > 0
    expected_TS = (segments_BT[0][:, None] == segments_BT[0][None, :]) & np.tri(LENGTH, dtype=bool)
    np.testing.assert_array_equal(influence_TS, expected_TS)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("position", POSITIONS)
def test_positions_asked_for_are_those_of_a_pass_over_all(position, num_layers):
    config = dataclasses.replace(model(position), num_layers=num_layers)
    params = params_of(config)
    batch = pack([SETS, SETS[1:]], LENGTH, 3)
    # Real positions in any order, one of them twice.
    positions_BC = np.array([[9, 2, 3, 0, 2], [4, 6, 1, 0, 7]], np.int32)
    assert np.take_along_axis(batch["segments"], positions_BC, axis=1).all()

    def weighed(params, execution):
        decoder = merge(config, SIZE, LENGTH, params)
        if execution is None:
            h_BTD = decoder(batch["tokens"], batch["segments"])
            h_BCD = jnp.take_along_axis(h_BTD, positions_BC[:, :, None], axis=1)
        else:
            h_BCD = decoder(batch["tokens"], batch["segments"], None, execution, positions_BC)
        return jnp.sum(jnp.sin(h_BCD) * jnp.arange(5.0)[None, :, None]), h_BCD

    run = jax.jit(jax.value_and_grad(weighed, has_aux=True), static_argnums=1)
    (_, expected_BCD), expected_gradient = run(params, None)
    for execution in (Execution(), Execution(scan_layers=True, remat="full")):
        (_, h_BCD), gradient = run(params, execution)
        np.testing.assert_allclose(h_BCD, expected_BCD, rtol=1e-5, atol=1e-5)
        for leaf, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


def test_padding_has_no_influence():
    config = model("learned", dropout=0.0)
    params = params_of(config)
    batch = pack([SETS[:2], SETS[2:]], LENGTH, 3)
    filled = {**batch, "tokens": np.where(batch["segments"] == 0, 33, batch["tokens"]).astype(np.int32)}
    value_and_gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss_sum(config, params, batch)))
    (loss, gradient), (filled_loss, filled_gradient) = (value_and_gradient(params, b) for b in (batch, filled))
    assert float(loss) == float(filled_loss)
    jax.tree.map(np.testing.assert_array_equal, gradient, filled_gradient)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_one_layer_without_a_position_code_ignores_the_order_of_the_genes_before():
    # One layer only: a deeper one can tell the order, because each of the genes before saw another prefix.
    config = dataclasses.replace(model(), num_layers=1)
    params = params_of(config)
    batch = pack([[[20, 21, 22, 23]], [[22, 20, 21, 23]]], LENGTH, 1)
    h_BTD = hidden(config, params, batch["tokens"], batch["segments"])
    np.testing.assert_allclose(h_BTD[0, 4], h_BTD[1, 4], rtol=1e-5, atol=1e-5)
    for position in ("learned", "rope"):
        config = dataclasses.replace(model(position), num_layers=1)
        coded = hidden(config, params_of(config), batch["tokens"], batch["segments"])
        assert np.abs(coded[0, 4] - coded[1, 4]).max() > 1e-3


def test_offsets_restart_in_each_segment():
    segments_BT = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(segment_offsets(segments_BT), expected)


def test_dropout_is_a_function_of_its_key_and_off_without_one():
    config = model(dropout=0.5)
    decoder = merge(config, SIZE, LENGTH, params_of(config))
    batch = pack([SETS], LENGTH, 3)
    arguments = (batch["tokens"], batch["segments"])
    one, same, other = (decoder(*arguments, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    still = merge(dataclasses.replace(config, dropout=0.0), SIZE, LENGTH, params_of(config))
    np.testing.assert_array_equal(decoder(*arguments), still(*arguments, jax.random.key(1)))


def test_bfloat16_products_keep_float32_states_and_parameters():
    config = dataclasses.replace(model("rope"), matmul_dtype="bfloat16")
    params = params_of(config)
    batch = pack(random_rows(0, 2, LENGTH, SIZE), LENGTH, 6)
    decoder = merge(config, SIZE, LENGTH, params)
    h_BTD = decoder(batch["tokens"], batch["segments"])
    assert h_BTD.dtype == decoder.logits(h_BTD).dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    exact = hidden(model("rope"), params, batch["tokens"], batch["segments"])
    assert 0 < np.abs(h_BTD - exact).max() < 0.2


@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_residual_stream_lies_between_blocks_in_its_own_type(matmul_dtype, scan_layers):
    params = params_of(model())
    batch = pack(random_rows(0, 2, LENGTH, SIZE), LENGTH, 6)
    h_BTD, streams = {}, []

    def place(x_BTD):
        streams.append(x_BTD.dtype)
        return x_BTD

    for residual_dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(model(), matmul_dtype=matmul_dtype, residual_dtype=residual_dtype)
        decoder = merge(config, SIZE, LENGTH, params)
        execution = Execution(place=place, scan_layers=scan_layers)
        h_BTD[residual_dtype] = decoder(batch["tokens"], batch["segments"], None, execution)
        assert h_BTD[residual_dtype].dtype == jnp.float32
        assert set(streams) == {jnp.dtype(residual_dtype)}
        streams.clear()
    # The stream is rounded at the start and by each of four branches, and the final norm brings it to length 1.
    apart_BTD = np.abs(h_BTD["bfloat16"] - h_BTD["float32"])
    assert 0 < apart_BTD.max() < 0.1


def test_initialisation_and_parameter_count():
    config = ModelConfig(num_layers=3, width=64, num_heads=4, position="learned", hidden_width=96)
    params = initial_params(config, 300, 32, jax.random.key(1))
    assert padded_vocabulary_size(300) == 384
    assert padded_vocabulary_size(384) == 384
    expected = 384 * 64 + 384 + 32 * 64 + 3 * (4 * 64 * 64 + 2 * 64 * 96 + 2 * 64) + 64
    assert count_parameters(params) == count_parameters(abstract_params(config, 300, 32)) == expected
    assert float(params["embedding"].std()) == pytest.approx(0.02, rel=0.02)
    block = params["blocks"][2]
    assert float(block["attention"]["query"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
    for branch in (block["attention"]["output"], block["feed_forward"]["contract"]):
        assert float(branch["kernel"].std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)


# Learned positions add random vectors as long as the embeddings.
@pytest.mark.parametrize("position", ["none", "rope"])
def test_started_from_vectors_it_finds_the_genes_in_the_direction_of_the_prompt(position):
    config = ModelConfig(num_layers=2, width=32, num_heads=2, position=position, matmul_dtype="float32")
    vectors_VD = np.random.default_rng(0).normal(size=(SIZE, 32)).astype(np.float32)
    vectors_VD /= np.linalg.norm(vectors_VD, axis=1, keepdims=True)
    # Special ids, and a gene that no training set holds, keep their random start.
    vectors_VD[:NUM_SPECIAL] = vectors_VD[20] = 0
    random = initial_params(config, SIZE, LENGTH, jax.random.key(0))
    params = start_from_vectors(random, jnp.asarray(vectors_VD))
    assert jax.tree.structure(params) == jax.tree.structure(random)
    unknown = [*range(NUM_SPECIAL), 20]
    np.testing.assert_array_equal(params["embedding"][jnp.array(unknown)], random["embedding"][jnp.array(unknown)])
    genes = [25, 26, 27, 28]
    batch = pack([[genes]], LENGTH, 1)
    decoder = merge(config, SIZE, LENGTH, params)
    logits_V = decoder.logits(decoder(batch["tokens"], batch["segments"])[0, len(genes)])[NUM_SPECIAL:SIZE]
    cosines_V = (vectors_VD @ vectors_VD[genes].mean(0))[NUM_SPECIAL:]
    assert np.corrcoef(logits_V, cosines_V)[0, 1] > 0.8
    # Spread like cosines times ten, so that a few genes can outweigh all others.
    assert 5 < float(logits_V.max()) < 11
