import itertools
import math

import jax
import numpy as np
import optax
import pytest

from tcc_jax.baselines import autoencoder
from tcc_jax.completion.ranker import rank
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import FAMILY, make_corpus

STEPS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("autoencoder") / "corpus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(corpus, folder):
    return autoencoder.Autoencoder(corpus, folder, STEPS)


def test_it_finds_the_family_and_is_trained_once(corpus, folder, trained, monkeypatch):
    visible = [np.arange(start, start + 4, dtype=np.int32) + NUM_SPECIAL for start in (0, 20, 40)]
    ids, _ = rank(trained, visible, [16] * 3)
    for family, drawn in enumerate(ids):
        assert ((drawn - NUM_SPECIAL) // FAMILY == family).mean() > 0.9
    monkeypatch.setattr(autoencoder, "_fit", None)
    again = autoencoder.Autoencoder(corpus, folder, STEPS)(visible)
    np.testing.assert_array_equal(trained(visible), again)


def test_the_seed_decides(corpus, tmp_path):
    visible = [np.array([20, 30], np.int32)]
    first, same, other = (
        autoencoder.Autoencoder(corpus, tmp_path / name, 3, seed)(visible)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_the_network_is_that_of_gsfm(corpus, folder, trained):
    with np.load(next(iter(folder.glob("autoencoder-*.npz"))), allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files if name != "settings"}
        weights = {name: file[name].astype(np.float64) for name in shapes}
    size = corpus.vocabulary.size
    layers = [(size, 512), (512, 256), (256, 256), (256, size)]
    assert shapes == {f"weight{n}": shape for n, shape in enumerate(layers)} | {
        f"bias{n}": shape[1:] for n, shape in enumerate(layers)
    }
    visible = [np.array([17, 40, 41], np.int32), np.empty(0, np.int32), np.array([30], np.int32)]
    x = np.zeros((3, size))
    for row, ids in zip(x, visible, strict=True):
        row[ids] = 1
    for layer in range(3):
        x = x @ weights[f"weight{layer}"] + weights[f"bias{layer}"]
        # The bottleneck is linear.
        x = x if layer == 1 else np.maximum(x, 0)
    expected = x @ weights["weight3"] + weights["bias3"]
    np.testing.assert_allclose(trained(visible), expected, rtol=1e-4, atol=1e-4)


def test_the_output_starts_at_the_log_odds_of_each_gene(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder.optax, "adam", lambda rate: optax.sgd(0.0))
    autoencoder.Autoencoder(corpus, tmp_path, 1)
    with np.load(next(tmp_path.iterdir()), allow_pickle=False) as file:
        bias = file["bias3"]
    share = corpus.vocabulary.counts[NUM_SPECIAL:] / len(corpus.indices("train"))
    np.testing.assert_allclose(bias[NUM_SPECIAL:], np.log(share / (1 - share)), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_binary_cross_entropy(corpus):
    params = autoencoder._initial(corpus, 0)
    rng = np.random.default_rng(0)
    sets = [NUM_SPECIAL + rng.choice(60, length, replace=False).astype(np.int32) for length in (1, 9, 30)]
    visible, hidden = [one[:3] for one in sets], [one[3:] for one in sets]
    size = corpus.vocabulary.size
    target = np.zeros((3, size), np.float32)
    for row, ids in enumerate(hidden):
        target[row, ids] = 1

    def loss(params):
        logits = autoencoder._logits(params, autoencoder._flat(visible), 3)
        return optax.sigmoid_binary_cross_entropy(logits, target).sum() / 3

    expected = jax.grad(loss)(params)
    found = autoencoder._gradients(params, autoencoder._flat(visible), autoencoder._flat(hidden), 3, None)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_every_set_is_seen_once_in_a_pass(corpus, monkeypatch):
    monkeypatch.setattr(autoencoder, "_BATCH", 9)
    batches = autoencoder._batches(corpus, np.random.default_rng(0))
    train = sorted(sorted(corpus.genes(int(index)).tolist()) for index in corpus.indices("train"))
    for _ in range(2):
        seen = []
        for visible, hidden in itertools.islice(batches, len(train) // 9):
            for row in range(9):
                parts = [one.ids_P[(one.rows_P == row) & (one.ids_P != 0)] for one in (visible, hidden)]
                assert len(parts[0]) == max(1, round(0.2 * sum(map(len, parts))))
                seen.append(sorted(np.concatenate(parts).tolist()))
        assert sorted(seen) == train


def test_untrained_it_projects_onto_principal_components(corpus, monkeypatch):
    monkeypatch.setattr(autoencoder, "_COMPONENTS", 20)
    sets = [corpus.genes(int(index)).astype(int) for index in corpus.indices("train")]
    rows = np.zeros((len(sets), corpus.vocabulary.size))
    for row, genes in zip(rows, sets, strict=True):
        row[genes] = len(genes) ** -0.5
    vectors = np.linalg.svd(rows)[2][:20]
    params = autoencoder._initial(corpus, 0)
    visible = np.array([17, 40, 41], np.int32)
    expected = autoencoder._GAIN * vectors[:, visible].sum(1) @ vectors + np.asarray(params["bias3"])
    scores = np.asarray(autoencoder._logits(params, autoencoder._flat([visible]), 1))[0]
    # But for the noise of the other weights.
    np.testing.assert_allclose(scores[NUM_SPECIAL:], expected[NUM_SPECIAL:], atol=0.5)
    assert np.ptp(expected[NUM_SPECIAL:]) > 5


def test_a_small_corpus_is_seen_at_most_fifty_times(corpus, tmp_path):
    scorer = autoencoder.Autoencoder(corpus, tmp_path)
    assert scorer.steps == math.ceil(50 * 54 / 512) and 50 <= scorer.passes < 60
