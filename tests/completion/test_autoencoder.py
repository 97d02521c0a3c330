import numpy as np
import optax
import pytest

from tcc_jax.completion import autoencoder
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


def test_it_finds_the_family_and_is_trained_once(corpus, folder, monkeypatch):
    visible = [np.arange(start, start + 4, dtype=np.int32) + NUM_SPECIAL for start in (0, 20, 40)]
    scorer = autoencoder.Autoencoder(corpus, folder, STEPS)
    ids, _ = rank(scorer, visible, [16] * 3)
    for family, drawn in enumerate(ids):
        assert ((drawn - NUM_SPECIAL) // FAMILY == family).mean() > 0.9
    monkeypatch.setattr(autoencoder, "_fit", None)
    again = autoencoder.Autoencoder(corpus, folder, STEPS)(visible)
    np.testing.assert_array_equal(scorer(visible), again)


def test_the_seed_decides(corpus, tmp_path):
    visible = [np.array([20, 30], np.int32)]
    first, same, other = (
        autoencoder.Autoencoder(corpus, tmp_path / name, 3, seed)(visible)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_the_network_is_that_of_gsfm(corpus, folder):
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
        x = np.maximum(x @ weights[f"weight{layer}"] + weights[f"bias{layer}"], 0)
    expected = x @ weights["weight3"] + weights["bias3"]
    scores = autoencoder.Autoencoder(corpus, folder, STEPS)(visible)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_the_output_starts_at_the_log_odds_of_each_gene(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder.optax, "adam", lambda rate: optax.sgd(0.0))
    autoencoder.Autoencoder(corpus, tmp_path, 1)
    with np.load(next(tmp_path.iterdir()), allow_pickle=False) as file:
        bias = file["bias3"]
    share = corpus.vocabulary.counts[NUM_SPECIAL:] / len(corpus.indices("train"))
    np.testing.assert_allclose(bias[NUM_SPECIAL:], np.log(share / (1 - share)), rtol=1e-5, atol=1e-6)
