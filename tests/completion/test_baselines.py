import dataclasses
import itertools

import numpy as np
import pytest

from tcc_jax.completion import baselines
from tcc_jax.completion.baselines import Ease
from tcc_jax.completion.index import TrainingIndex
from tcc_jax.completion.protocol import genes_of, mask_sets
from tcc_jax.completion.ranker import rank
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.terminal import UserError
from tests.completion.tiny import FAMILY, NUM_GENES, make_corpus


def test_popularity_draws_the_most_frequent_hidden_genes(tmp_path):
    vocabulary = make_corpus(tmp_path / "corpus").vocabulary
    genes = range(NUM_SPECIAL, vocabulary.size)
    order = sorted(genes, key=lambda id_: (-vocabulary.counts[id_], id_))
    visible = np.array([order[0], order[3]], np.int32)
    ids, _ = rank(baselines.popularity(vocabulary), [visible, visible[:1]], [10, 5])
    assert ids[0].tolist() == [id_ for id_ in order if id_ not in visible][:10]
    assert ids[1].tolist() == order[1:6]


def test_random_genes_depend_on_the_seed_and_the_set_alone(tmp_path):
    vocabulary = make_corpus(tmp_path / "corpus").vocabulary
    one, two = np.array([16, 20], np.int32), np.array([30], np.int32)
    scores = baselines.random_genes(vocabulary, seed=4)
    together, apart = scores([one, two]), scores([two])
    assert together.shape == (2, vocabulary.size)
    assert (together[1] == apart[0]).all() and (together[0] != together[1]).any()
    assert (baselines.random_genes(vocabulary, seed=5)([two]) != apart).any()


def brute_force_neighbours(corpus, visible, neighbours, power):
    train = [set(corpus.genes(index).tolist()) for index in corpus.indices("train")]
    idf = {id_: np.log(len(train) / max(1, sum(id_ in one for one in train))) for id_ in range(corpus.vocabulary.size)}
    norm = {index: np.sqrt(sum(idf[id_] ** 2 for id_ in one)) for index, one in enumerate([*train, set(visible)])}
    similarity = [
        sum(idf[id_] ** 2 for id_ in one & set(visible)) / norm[index] / norm[len(train)]
        for index, one in enumerate(train)
    ]
    nearest = sorted(range(len(train)), key=lambda index: -similarity[index])[:neighbours]
    scores = np.zeros(corpus.vocabulary.size)
    for index in nearest:
        scores[list(train[index])] += similarity[index] ** power
    return scores


# Of these sets the fifth and sixth nearest are never equally near.
@pytest.mark.parametrize("neighbours", [500, 5])
def test_set_neighbours_equal_brute_force(tmp_path, neighbours):
    corpus = make_corpus(tmp_path / "corpus")
    rng = np.random.default_rng(0)
    visible = [rng.choice(60, rng.integers(1, 9), replace=False).astype(np.int32) + NUM_SPECIAL for _ in range(40)]
    scores = baselines.SetNeighbours(TrainingIndex(corpus), neighbours)(visible)
    for row, ids in enumerate(visible):
        expected = brute_force_neighbours(corpus, ids.tolist(), neighbours, 3)
        np.testing.assert_allclose(scores[row], expected, rtol=1e-4, atol=1e-6)


def test_nearest_sets_alone_count(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [corpus.genes(int(index))[:4].astype(np.int32) for index in corpus.indices("test")[:5]]
    scores = baselines.SetNeighbours(TrainingIndex(corpus), neighbours=1)(visible)
    held = [set(corpus.genes(int(index)).tolist()) for index in corpus.indices("train")]
    for row in scores:
        assert set(np.flatnonzero(row).tolist()) in held


def test_nothing_visible_leaves_all_genes_tied(tmp_path):
    scores = baselines.SetNeighbours(TrainingIndex(make_corpus(tmp_path / "corpus")))(
        [np.array([16], np.int32), np.empty(0, np.int32)]
    )
    assert (scores[1] == 0).all() and (scores[0] > 0).any()


def slow_recall(corpus, scorer, masked):
    ids, _ = rank(scorer, [one.visible for one in masked], [len(one.hidden) for one in masked])
    return np.mean([np.isin(drawn, one.hidden).mean() for drawn, one in zip(ids, masked, strict=True)])


def test_tuning_takes_the_best_on_the_validation_split(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    tuned = baselines.tuned_neighbours(TrainingIndex(corpus), tmp_path / "cache")
    masked, _ = mask_sets(sets_from_corpus(corpus, "validation"), genes_of(corpus.vocabulary.size))
    pairs = itertools.product(baselines.NEIGHBOURS, baselines.POWERS)
    recalls = [slow_recall(corpus, baselines.SetNeighbours(TrainingIndex(corpus), *pair), masked) for pair in pairs]
    np.testing.assert_allclose(slow_recall(corpus, tuned, masked), max(recalls))
    monkeypatch.setattr(baselines, "_tune", None)
    again = baselines.tuned_neighbours(TrainingIndex(corpus), tmp_path / "cache")
    assert (again.neighbours, again.power) == (tuned.neighbours, tuned.power)
    assert again.describe() == tuned.describe() and "tuned on the validation split" in tuned.describe()


def test_without_validation_sets_the_defaults_stay(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    corpus = dataclasses.replace(corpus, splits=np.zeros_like(corpus.splits))
    index = TrainingIndex(corpus)
    tuned = baselines.tuned_neighbours(index, tmp_path / "cache")
    assert (tuned.neighbours, tuned.power) == (500, 3.0)
    # No more sets than there are.
    nearest = f"nearest {min(500, len(index))} training sets"
    assert tuned.describe().endswith(f"{nearest}, idf cosine to the power 3, untuned: no validation set")
    tuned.neighbours = 20_000
    assert f"nearest {len(index)} training sets" in tuned.describe()


def test_set_neighbours_find_the_family(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [np.arange(NUM_SPECIAL, NUM_SPECIAL + 4, dtype=np.int32)]
    ids, _ = rank(baselines.SetNeighbours(TrainingIndex(corpus)), visible, [16])
    assert (ids[0] < NUM_SPECIAL + FAMILY).all()


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
    monkeypatch.setattr("tcc_jax.completion.baselines._GENES_AT_ONCE", 7)
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
    monkeypatch.setattr("tcc_jax.completion.baselines._fit_ease", None)
    again, _ = rank(Ease(corpus, tmp_path), visible, [16])
    assert again[0].tolist() == ids[0].tolist()
