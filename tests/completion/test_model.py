import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tcc_jax
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, START
from tcc_jax.model.decoder import merge
from tcc_jax.terminal import UserError
from tests.completion.tiny import STEP, make_corpus, make_run

ROW_LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_run(folder / "run", make_corpus(folder / "corpus"), ROW_LENGTH)
    return tcc_jax.load(folder / "run")


def scores_alone(model, prompt):
    checkpoint = model.checkpoint

    @jax.jit
    def last(params, tokens_BT):
        decoder = merge(checkpoint.config.model, model.vocabulary.size, ROW_LENGTH, params)
        return decoder.logits(decoder(tokens_BT, jnp.ones_like(tokens_BT))[0, -1])

    logits_V = last(checkpoint.params, jnp.array([[START, *prompt]], jnp.int32))
    return np.array(logits_V[: model.vocabulary.size])


def test_scores_equal_an_unpadded_forward_pass_in_any_batch(model):
    rng = np.random.default_rng(0)
    lengths = [1, 31, 0, 15, 16, 16, *rng.integers(1, 32, 90)]
    prompts = [NUM_SPECIAL + rng.choice(60, length, replace=False).astype(np.int32) for length in lengths]
    scores = np.asarray(model.score(prompts))
    assert scores.shape == (len(prompts), model.vocabulary.size) and model.checkpoint.step == STEP
    for row in (1, 2, 3, 5):
        np.testing.assert_allclose(scores[row], scores_alone(model, prompts[row]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores[-5:], model.score(prompts[-5:]), rtol=1e-5, atol=1e-5)


def test_a_prompt_longer_than_a_row_shows_a_seeded_subset(model):
    prompt = np.arange(NUM_SPECIAL, NUM_SPECIAL + 50, dtype=np.int32)
    assert model.prompt_limit == ROW_LENGTH - 1
    first, again = (np.asarray(model.score([prompt])) for _ in range(2))
    assert (first == again).all()
    genes = [model.vocabulary.symbols[id_] for id_ in prompt]
    assert not {one.symbol for one in model.complete(genes)} & set(genes)


def test_complete_returns_records(model):
    proposals = model.complete(["G3", "G1", "G3"], number=5)
    logits = scores_alone(model, [NUM_SPECIAL + 3, NUM_SPECIAL + 1])[NUM_SPECIAL:]
    logits[[1, 3]] = -np.inf
    shares = np.exp(logits - np.logaddexp.reduce(logits))
    best = np.argsort(-shares, kind="stable")[:5]
    assert [one.rank for one in proposals] == [1, 2, 3, 4, 5]
    assert [one.symbol for one in proposals] == [f"G{gene}" for gene in best]
    np.testing.assert_allclose([one.probability for one in proposals], shares[best], rtol=1e-3)


def test_lists_of_lists_and_arrays_batch(model):
    both = model.complete([["G1"], ["G2", "G5"]], number=4)
    assert [one.symbol for one in both[1]] == [one.symbol for one in model.complete(["G2", "G5"], number=4)]
    for alone, together in zip(model.complete(np.array(["G1"]), number=4), both[0], strict=True):
        assert (alone.rank, alone.symbol) == (together.rank, together.symbol)
        # Another number of rows may change the last bits of a product, and no more.
        np.testing.assert_allclose(alone.probability, together.probability, rtol=1e-5)


def test_all_genes_known_leaves_nothing_to_propose(model):
    assert model.complete([f"G{index}" for index in range(60)]) == []
    assert len(model.complete(["G0"], number=1000)) == 59


@pytest.mark.parametrize(
    ("genes", "number", "message"),
    [
        (["G1", "g2"], 5, "g2: not in the vocabulary; the nearest: G2"),
        (["XXXXXXX"], 5, "XXXXXXX: not in the vocabulary"),
        ([], 5, "no gene"),
        ([["G1"], []], 5, "no gene"),
        ("G1", 5, "pass a list"),
        (["G1"], 0, "number = 0"),
    ],
)
def test_bad_input(model, genes, number, message):
    with pytest.raises(UserError, match=message):
        model.complete(genes, number)


def test_unknown_genes_can_be_skipped(model):
    assert model.complete(["G1", "XX"], skip_unknown=True) == model.complete(["G1"])
    with pytest.raises(UserError, match="XX"):
        model.complete(["XX"], skip_unknown=True)
