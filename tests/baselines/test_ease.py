from pathlib import Path

import numpy as np
import pytest

from tcc_jax.baselines import ease
from tcc_jax.baselines.ease import Ease
from tcc_jax.completion.ranker import rank
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.terminal import UserError
from tests.completion.tiny import FAMILY, NUM_GENES, make_corpus


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")


def closed_form(corpus, num_genes, penalty):
    train = corpus.indices("train")
    x = np.zeros((len(train), num_genes))
    for row, index in enumerate(train):
        genes = corpus.genes(int(index)).astype(int) - NUM_SPECIAL
        x[row, genes[genes < num_genes]] = len(genes) ** -0.5
    p = np.linalg.inv(x.T @ x + penalty * np.eye(num_genes))
    b = np.eye(num_genes) - p / np.diag(p)
    np.testing.assert_allclose(np.diag(b), 0, atol=1e-12)
    return b


@pytest.mark.parametrize(("num_genes", "penalty"), [(1000, 20.0), (25, 0.5)])
def test_scores_equal_the_closed_form(corpus, tmp_path, num_genes, penalty):
    scorer = Ease(corpus, tmp_path, num_genes, penalty)
    fitted = min(num_genes, NUM_GENES)
    assert scorer.num_genes == fitted
    b = closed_form(corpus, fitted, penalty)
    rng = np.random.default_rng(0)
    visible = [NUM_SPECIAL + rng.choice(NUM_GENES, 6, replace=False).astype(np.int32) for _ in range(20)]
    scores = scorer(visible)
    for row, ids in enumerate(visible):
        known = ids[ids < NUM_SPECIAL + fitted] - NUM_SPECIAL
        expected = b[known].sum(0)
        np.testing.assert_allclose(scores[row, NUM_SPECIAL : NUM_SPECIAL + fitted], expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("penalty", [1e-45, 1e-30])
def test_a_penalty_out_of_range_is_told(corpus, tmp_path, penalty):
    with pytest.raises(UserError, match=f"--ease-penalty {penalty:g}: no weights"):
        Ease(corpus, tmp_path / "cache", penalty=penalty)
    assert not (tmp_path / "cache").exists()


def test_more_genes_than_a_block(corpus, tmp_path, monkeypatch):
    expected = Ease(corpus, tmp_path / "whole")([np.array([16, 30], np.int32)])
    monkeypatch.setattr("tcc_jax.baselines.ease._GENES_AT_ONCE", 7)
    np.testing.assert_allclose(Ease(corpus, tmp_path / "blocks")([np.array([16, 30], np.int32)]), expected, rtol=1e-5)


def test_other_genes_come_last_by_popularity(corpus, tmp_path):
    scorer = Ease(corpus, tmp_path, num_genes=20)
    visible = [np.array([NUM_SPECIAL, NUM_SPECIAL + 50], np.int32), np.array([NUM_SPECIAL + 59], np.int32)]
    ids, _ = rank(scorer, visible, [NUM_GENES, NUM_GENES])
    assert (ids[0][:19] < NUM_SPECIAL + 20).all()
    assert ids[0][19:].tolist() == [id_ for id_ in range(NUM_SPECIAL + 20, NUM_SPECIAL + 60) if id_ != NUM_SPECIAL + 50]
    # Nothing is known of a prompt outside the fitted genes: popularity decides alone.
    assert ids[1].tolist() == list(range(NUM_SPECIAL, NUM_SPECIAL + 59))


def test_ease_finds_the_family_and_is_fitted_once(corpus, tmp_path, monkeypatch):
    visible = [np.arange(NUM_SPECIAL, NUM_SPECIAL + 4, dtype=np.int32)]
    ids, _ = rank(Ease(corpus, tmp_path), visible, [16])
    assert (ids[0] < NUM_SPECIAL + FAMILY).all()
    monkeypatch.setattr("tcc_jax.baselines.ease._fit_ease", None)
    again, _ = rank(Ease(corpus, tmp_path), visible, [16])
    assert again[0].tolist() == ids[0].tolist()


def test_no_more_genes_are_fitted_than_memory_has_room_for(corpus, tmp_path, monkeypatch):
    assert ease._room_for() > 1000 and not Ease(corpus, tmp_path / "all").limited
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "MemTotal: 9 kB\nMemAvailable: 12 kB\n")
    scorer = Ease(corpus, tmp_path / "few")
    assert scorer.num_genes == 32 and scorer.limited
    few = Ease(corpus, tmp_path / "asked for", num_genes=20)
    assert few.num_genes == 20 and not few.limited
    # What is kept takes less than to fit it.
    assert Ease(corpus, tmp_path / "all").num_genes == NUM_GENES
    monkeypatch.undo()
    visible = [np.array([16, 30], np.int32)]
    np.testing.assert_array_equal(scorer(visible), Ease(corpus, tmp_path, num_genes=32)(visible))


def test_too_little_memory_after_all_is_told(corpus, tmp_path, monkeypatch):
    def fit(*_):
        raise MemoryError

    monkeypatch.setattr(ease, "_fit_ease", fit)
    with pytest.raises(UserError, match=r"--ease-genes 50: not enough memory for 50 genes; give fewer"):
        Ease(corpus, tmp_path, num_genes=50)
