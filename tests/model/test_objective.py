"""Both losses against references that loop over segments or hold a dense target, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tcc_jax.config import ModelConfig
from tcc_jax.corpus import vocabulary
from tcc_jax.model import decoder as decoder_module
from tcc_jax.model.attention import MASKED
from tcc_jax.model.decoder import NUM_SPECIAL, initial_params, merge, proposable_ids, take_positions
from tcc_jax.model.objective import (
    LOSSES,
    Beyond,
    cut_positions,
    remaining_set_loss,
    weighted_logsumexp,
    with_false_genes,
)
from tests.model.rows import pack, random_rows

SIZE, LENGTH, WIDTH, SLOTS = 50, 23, 16, 6
MODEL = ModelConfig(num_layers=1, width=WIDTH, num_heads=2, matmul_dtype="float32")


@pytest.fixture(scope="module")
def case():
    batch = pack(random_rows(3, 4, LENGTH, SIZE), LENGTH, SLOTS)
    params = initial_params(MODEL, SIZE, LENGTH, jax.random.key(0))
    random = np.random.default_rng(1)
    params["embedding"] = jnp.asarray(random.normal(size=params["embedding"].shape), jnp.float32)
    params["output_bias"] = jnp.asarray(random.normal(size=params["output_bias"].shape), jnp.float32)
    h_BTD = jnp.asarray(random.normal(size=(4, LENGTH, WIDTH)), jnp.float32)
    return params, h_BTD, batch


def target_at(kind, tokens_T, segments_T, position):
    """Return the target's ids at one position, by looking at the tokens that follow it in its segment."""
    if segments_T[position] == 0:
        return []
    after = [int(tokens_T[t]) for t in range(position + 1, len(tokens_T)) if segments_T[t] == segments_T[position]]
    if kind == "next-gene":
        return after[:1]
    return [token for token in after if token >= NUM_SPECIAL] or after[:1]


def reference_targets(kind, batch, positions_BC=None, weights_BC=None):
    """Return dense targets [B, T, V_padded]: what each position is scored against, summed over its cut points."""
    tokens_BT, segments_BT = batch["tokens"], batch["segments"]
    rows, length = tokens_BT.shape
    targets = np.zeros((rows, length, 128))
    for row in range(rows):
        positions = range(length) if positions_BC is None else positions_BC[row]
        weights = np.ones(length) if weights_BC is None else weights_BC[row]
        for position, weight in zip(positions, weights, strict=True):
            ids = target_at(kind, tokens_BT[row], segments_BT[row], position)
            for token in ids:
                targets[row, position, token] += weight / len(ids)
    return targets


def reference_loss(embedding_VD, bias_V, h_BTD, targets_BTV):
    logits = np.where(proposable_ids(SIZE), h_BTD @ embedding_VD.T + bias_V, -np.inf)
    largest = logits.max(-1, keepdims=True)
    log_softmax = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    return -np.sum(targets_BTV * np.where(targets_BTV > 0, log_softmax, 0)), targets_BTV.sum()


def cuts(batch, num_cuts=3, low=0.0, high=1.0, seed=0):
    drawn = cut_positions(
        jax.random.key(seed), batch["tokens"], batch["starts"], batch["gene_counts"], num_cuts, low, high
    )
    return [np.asarray(array).reshape(len(batch["tokens"]), -1) for array in drawn]


@pytest.mark.parametrize("with_cuts", [False, True])
@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("tile", [0, 4 * 5, 1])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_loss_and_gradient_equal_a_float64_reference(case, kind, with_cuts, tile, platform, monkeypatch):
    # The form of other devices, such as the gradient of the embedding, is right when it runs on a CPU.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
    params, h_BTD, batch = case
    scored = cuts(batch) if with_cuts else []

    def loss(params, h_BTD):
        decoder = merge(MODEL, SIZE, LENGTH, params)
        h_BCD = take_positions(h_BTD, scored[0] if scored else None)
        return LOSSES[kind](decoder, h_BCD, batch["tokens"], batch["segments"], *(scored or (None, None)), tile=tile)

    value_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, count), (by_params, by_h) = value_and_gradient(params, h_BTD)
    targets = reference_targets(kind, batch, *scored)
    arrays = [np.asarray(array, np.float64) for array in (params["embedding"], params["output_bias"], h_BTD)]
    expected, expected_count = reference_loss(*arrays, targets)
    assert total.dtype == count.dtype == jnp.float32
    assert count == round(expected_count)
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    # Without a gradient the sum is taken along another path.
    np.testing.assert_allclose(jax.jit(loss)(params, h_BTD)[0], expected, rtol=2e-6)

    with jax.enable_x64(True):
        expected_gradients = jax.grad(dense_loss, argnums=(0, 1, 2))(*map(jnp.asarray, arrays), jnp.asarray(targets))
    gradients = (by_params["embedding"], by_params["output_bias"], by_h)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=2e-5)


def test_replaced_genes_are_shown_as_others_and_stay_to_be_found(case):
    _, _, batch = case
    tokens, segments = batch["tokens"], batch["segments"]
    shown, replaced = map(np.asarray, with_false_genes(jax.random.key(0), tokens, segments, 0.8, SIZE))
    assert 0.1 < replaced[tokens >= NUM_SPECIAL].mean() < 0.7
    assert not replaced[tokens < NUM_SPECIAL].any()
    np.testing.assert_array_equal(shown[~replaced], tokens[~replaced])
    assert ((shown >= NUM_SPECIAL) & (shown < SIZE))[replaced].all()
    # Every segment draws a share of its own.
    many = np.tile(np.arange(1, 5), (1000, 50))[:, np.argsort(np.tile(np.arange(4), 50), kind="stable")]
    _, replaced = with_false_genes(jax.random.key(1), np.full(many.shape, 20), many, 0.8, SIZE)
    shares = np.asarray(replaced).reshape(1000, 4, 50).mean(-1)
    # Uniform between 0 and 0.8, whose standard deviation is 0.8 / sqrt(12); and independent in a row.
    assert shares.mean() == pytest.approx(0.4, abs=0.02)
    assert shares.std() == pytest.approx(np.sqrt(0.8**2 / 12 + (0.4 - 0.8**2 / 3) / 50), abs=0.01)
    assert np.abs(np.corrcoef(shares.T) - np.eye(4)).max() < 0.12


def test_the_target_of_a_prefix_with_replaced_genes_holds_them(case):
    params, h_BTD, _ = case
    decoder = merge(MODEL, SIZE, LENGTH, params)
    batch = pack([[[20, 30, 40, 45]]], LENGTH, 1)
    replaced = np.zeros((1, LENGTH), bool)
    replaced[0, 1] = True
    position = np.array([[2]], np.int32), np.ones((1, 1), np.float32)
    rows = (take_positions(h_BTD[:1], position[0]), batch["tokens"], batch["segments"], *position)
    total, _ = LOSSES["remaining-set"](decoder, *rows, replaced)
    # Shown after <start>: a false gene in the place of 20, and 30. To come: 20, 40 and 45.
    log_softmax = jax.nn.log_softmax(decoder.logits(h_BTD[0, 2]))
    assert float(total) == pytest.approx(-float(log_softmax[np.array([20, 40, 45])].mean()), rel=1e-5)


def dense_loss(embedding_VD, bias_V, h_BTD, targets_BTV):
    logits = jnp.where(proposable_ids(SIZE), h_BTD @ embedding_VD.T + bias_V, -1e30)
    return -jnp.sum(targets_BTV * jax.nn.log_softmax(logits))


@pytest.mark.parametrize("kind", list(LOSSES))
def test_bfloat16_loss_and_gradient_are_close_to_the_float32_ones(case, kind):
    params, h_BTD, batch = case

    def loss(params, h_BTD, dtype):
        model = ModelConfig(num_layers=1, width=WIDTH, num_heads=2, matmul_dtype=dtype)
        decoder = merge(model, SIZE, LENGTH, params)
        return LOSSES[kind](decoder, h_BTD, batch["tokens"], batch["segments"])[0]

    (total, gradients), (expected, expected_gradients) = (
        jax.value_and_grad(loss, argnums=(0, 1))(params, h_BTD, dtype) for dtype in ("bfloat16", "float32")
    )
    # Eight bits of mantissa on logits of about 4, averaged over some 80 positions.
    assert total == pytest.approx(float(expected), rel=5e-3)
    for gradient, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        # Operands, logits and softmax are each rounded to 2^-8, a logit of 4 to 2^-7: errors add up to a few per cent.
        assert np.linalg.norm(gradient - exact) <= 0.03 * np.linalg.norm(exact)


def test_remaining_set_loss_is_the_mean_of_next_gene_losses_over_orders(case):
    params, h_BTD, _ = case
    decoder = merge(MODEL, SIZE, LENGTH, params)
    genes = [20, 30, 40]
    position = np.array([[1]], np.int32), np.ones((1, 1), np.float32)

    def loss_at_one(kind, order):
        batch = pack([[order]], LENGTH, 1)
        h_BCD = take_positions(h_BTD[:1], position[0])
        return float(LOSSES[kind](decoder, h_BCD, batch["tokens"], batch["segments"], *position)[0])

    orders = ([20, 30, 40], [20, 40, 30])
    next_gene = np.mean([loss_at_one("next-gene", order) for order in orders])
    assert loss_at_one("remaining-set", genes) == pytest.approx(next_gene, rel=1e-5)
    assert loss_at_one("remaining-set", orders[0]) == pytest.approx(loss_at_one("remaining-set", orders[1]), rel=1e-6)


def test_ids_that_cannot_be_proposed_get_no_probability_and_no_gradient(case):
    params, h_BTD, batch = case

    def loss(params):
        decoder = merge(MODEL, SIZE, LENGTH, params)
        return LOSSES["remaining-set"](decoder, h_BTD, batch["tokens"], batch["segments"])[0]

    gradient = jax.grad(loss)(params)
    never = ~proposable_ids(SIZE)
    assert never.sum() == 128 - SIZE + NUM_SPECIAL - 1
    assert not np.any(gradient["embedding"][never])
    assert not np.any(gradient["output_bias"][never])
    probabilities = jax.nn.softmax(merge(MODEL, SIZE, LENGTH, params).logits(h_BTD))
    assert not np.any(probabilities[..., never])
    assert np.all(probabilities[..., ~never] > 0)


@pytest.mark.parametrize("shift", [0, -200, 200])
def test_the_normalizer_holds_where_biases_and_ids_that_cannot_be_proposed_are_far_apart(case, shift):
    # Its bound is not the largest logit; the gene with the largest logit has the smallest bias here.
    params, h_BTD, _ = case
    random = np.random.default_rng(2)
    never = ~proposable_ids(SIZE)
    embedding_VD = np.asarray(params["embedding"]).copy()
    embedding_VD[never] *= 1e4
    bias_V = np.where(never, MASKED, random.uniform(-60, 0, never.size)).astype(np.float32)
    # Logits that are all far below or above 0.
    h_BTD, embedding_VD[:, 0] = np.asarray(h_BTD).copy(), shift
    h_BTD[:, :, 0] = 1
    weights_BT = random.uniform(size=h_BTD.shape[:2]).astype(np.float32)

    arrays = [jnp.asarray(array) for array in (h_BTD, embedding_VD, bias_V)]
    total, gradients = jax.jit(
        jax.value_and_grad(lambda *arrays: weighted_logsumexp(*arrays, weights_BT, "float32", 7), argnums=(0, 1, 2))
    )(*arrays)
    logits_BTV = np.where(never, -np.inf, h_BTD.astype(np.float64) @ embedding_VD.T.astype(np.float64) + bias_V)
    normalizer_BT = scipy.special.logsumexp(logits_BTV, axis=-1)
    np.testing.assert_allclose(total, np.sum(weights_BT * normalizer_BT), rtol=2e-6)
    weighted_BTV = weights_BT[:, :, None] * np.exp(logits_BTV - normalizer_BT[:, :, None])
    expected = (
        weighted_BTV @ np.where(never[:, None], 0, embedding_VD),
        np.einsum("BTV,BTD->VD", weighted_BTV, h_BTD),
        weighted_BTV.sum((0, 1)),
    )
    # A float32 logit of 200 is known to 1.5e-5, and so is what is multiplied with e to its power.
    error = 2e-4 if shift else 2e-5
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=error, atol=error)


def test_cut_points_lie_where_they_should():
    rows = [[list(range(16, 16 + n)) for n in (1, 5, 8)], [list(range(16, 26)), tuple(range(16, 24))]]
    batch = pack(rows, 30, 4)
    drawn = jax.jit(cut_positions, static_argnums=(4, 5, 6))
    seen: dict[tuple, set] = {}
    for low, high in ((0.0, 1.0), (0.2, 0.6), (0.95, 1.0), (0.2, 0.2001)):
        for seed in range(60):
            arguments = (batch["tokens"], batch["starts"], batch["gene_counts"], 2, low, high)
            positions, weights = drawn(jax.random.key(seed), *arguments)
            assert positions.shape == weights.shape == (2, 4, 2)
            np.testing.assert_array_equal(weights[..., 0], batch["gene_counts"] > 0)
            visible = np.asarray(positions) - batch["starts"][:, :, None]
            for row, slot in np.argwhere(batch["gene_counts"] > 0):
                seen.setdefault((low, high, row, slot), set()).update(visible[row, slot].tolist())
    # With the end in reach, every prefix turns up, the whole set only where it has its <end>.
    assert [seen[0.0, 1.0, 0, slot] for slot in range(3)] == [set(range(n + 1)) for n in (1, 5, 8)]
    assert seen[0.0, 1.0, 1, 0] == set(range(11))
    assert seen[0.0, 1.0, 1, 1] == set(range(8))
    assert [seen[0.2, 0.6, 0, slot] for slot in range(3)] == [{0}, {1, 2, 3}, {2, 3, 4}]
    assert seen[0.2, 0.6, 1, 0] == {2, 3, 4, 5, 6}
    assert seen[0.95, 1.0, 1, 1] == {7}
    assert [seen[0.2, 0.2001, 0, slot] for slot in range(3)] == [{0}, {1}, {2}]


def test_the_model_knows_the_special_ids_of_the_vocabulary():
    for name in ("END", "NUM_SPECIAL"):
        assert getattr(decoder_module, name) == getattr(vocabulary, name)


def prompts_case(seed=5, slots=4, targets=3):
    """Return a batch of prompts, the genes beyond each of them [B][M], and the sample of them that is given."""
    random = np.random.default_rng(seed)
    rows, beyond = [], []
    for _ in range(4):
        prompts, others = [], []
        for _ in range(slots - 1):
            genes = random.permutation(np.arange(NUM_SPECIAL, SIZE))
            shown, left = int(random.integers(1, 5)), int(random.integers(1, 8))
            prompts.append(tuple(genes[:shown].tolist()))
            others.append(genes[shown : shown + left])
        rows.append(prompts)
        beyond.append(others)
    batch = pack(rows, LENGTH, slots)
    sample = np.zeros((4, slots, targets), np.int32)
    counts = np.zeros((4, slots), np.int32)
    for row, others in enumerate(beyond):
        for slot, genes in enumerate(others):
            sample[row, slot, : len(genes)] = genes[:targets]
            counts[row, slot] = len(genes)
    return batch, beyond, Beyond(sample, counts)


def prompt_cuts(batch, beyond, high=0.9):
    sizes = batch["gene_counts"] + beyond.counts_BM
    drawn = cut_positions(
        jax.random.key(0), batch["tokens"], batch["starts"], batch["gene_counts"], 3, 0.0, high, sizes
    )
    return [np.asarray(array).reshape(len(batch["tokens"]), -1) for array in drawn]


def prompt_loss(params, h_BTD, batch, beyond, scored):
    decoder = merge(MODEL, SIZE, LENGTH, params)
    h_BCD = take_positions(h_BTD, scored[0])
    return remaining_set_loss(decoder, h_BCD, batch["tokens"], batch["segments"], *scored, beyond=beyond)


def test_genes_beyond_the_row_are_targets_like_those_in_it(case):
    params, h_BTD, _ = case
    batch, others, beyond = prompts_case()
    scored = prompt_cuts(batch, beyond)
    targets = np.zeros((4, LENGTH, 128))
    for row, (positions, weights) in enumerate(zip(*scored, strict=True)):
        for position, weight in zip(positions, weights, strict=True):
            if not weight:
                continue
            slot = batch["segments"][row, position] - 1
            start, shown = batch["starts"][row, slot], batch["gene_counts"][row, slot]
            after = batch["tokens"][row, position + 1 : start + shown + 1]
            sample = beyond.genes_BMR[row, slot]
            sample, left = sample[sample > 0], len(others[row][slot])
            remaining = len(after) + left
            targets[row, position, after] += 1 / remaining
            targets[row, position, sample] += left / len(sample) / remaining
    arrays = [np.asarray(array, np.float64) for array in (params["embedding"], params["output_bias"], h_BTD)]
    expected, count = reference_loss(*arrays, targets)
    value_and_gradient = jax.jit(jax.value_and_grad(prompt_loss, argnums=(0, 1), has_aux=True))
    (total, scored_count), (by_params, by_h) = value_and_gradient(params, h_BTD, batch, beyond, scored)
    assert scored_count == round(count) == 4 * 3 * 3
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    with jax.enable_x64(True):
        expected_gradients = jax.grad(dense_loss, argnums=(0, 1, 2))(*map(jnp.asarray, arrays), jnp.asarray(targets))
    for gradient, wanted in zip(
        (by_params["embedding"], by_params["output_bias"], by_h), expected_gradients, strict=True
    ):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=2e-5)


def test_a_sample_of_the_genes_beyond_leaves_the_loss_unbiased(case):
    params, h_BTD, _ = case
    batch, others, beyond = prompts_case(targets=7)
    assert 1 < max(len(genes) for row in others for genes in row) <= 7
    scored = prompt_cuts(batch, beyond)
    loss = jax.jit(prompt_loss)
    whole = loss(params, h_BTD, batch, beyond, scored)[0]
    # Every gene of each set stands for the others in turn: the mean over these samples of one is over all of them.
    turns = []
    for turn in range(np.lcm.reduce([len(genes) for row in others for genes in row])):
        one = np.zeros((4, 4, 1), np.int32)
        for row, slots in enumerate(others):
            for slot, genes in enumerate(slots):
                one[row, slot] = genes[turn % len(genes)]
        turns.append(one)
    losses = [loss(params, h_BTD, batch, Beyond(one, beyond.counts_BM), scored)[0] for one in turns]
    np.testing.assert_allclose(np.mean(losses), whole, rtol=1e-6)
    assert np.std(losses) > 0.01


def test_cut_points_of_prompts_are_shares_of_the_whole_set():
    # A set of 20 genes shows 6: between 0.1 and 0.9 of it lie 2 to 18, of which the prompt allows 2 to 6.
    batch = pack([[tuple(range(20, 26))]], LENGTH, 2)
    sizes = np.array([[20, 0]])
    seen = set()
    for seed in range(200):
        positions, weights = cut_positions(
            jax.random.key(seed), batch["tokens"], batch["starts"], batch["gene_counts"], 2, 0.1, 0.9, sizes
        )
        assert weights.tolist() == [[[1, 1], [0, 0]]]
        seen |= set(np.asarray(positions)[0, 0].tolist())
    assert seen == {2, 3, 4, 5, 6}
