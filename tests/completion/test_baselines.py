import dataclasses
import itertools

import numpy as np

from tcc_jax.completion import baselines
from tcc_jax.completion.protocol import genes_of, mask_sets
from tcc_jax.completion.ranker import rank
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import FAMILY, make_corpus


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


def test_set_neighbours_equal_brute_force(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    rng = np.random.default_rng(0)
    visible = [rng.choice(60, rng.integers(1, 9), replace=False).astype(np.int32) + NUM_SPECIAL for _ in range(40)]
    scores = baselines.SetNeighbours(corpus)(visible)
    for row, ids in enumerate(visible):
        expected = brute_force_neighbours(corpus, ids.tolist(), 500, 3)
        np.testing.assert_allclose(scores[row], expected, rtol=1e-4, atol=1e-6)


def test_nearest_sets_alone_count(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [corpus.genes(int(index))[:4].astype(np.int32) for index in corpus.indices("test")[:5]]
    scores = baselines.SetNeighbours(corpus, neighbours=1)(visible)
    held = [set(corpus.genes(int(index)).tolist()) for index in corpus.indices("train")]
    for row in scores:
        assert set(np.flatnonzero(row).tolist()) in held


def test_votes_of_several_numbers_of_neighbours_equal_those_of_each(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [np.array([16, 17, 40], np.int32), np.empty(0, np.int32), np.array([50], np.int32)]
    numbers = (1, 3, 10, 500)
    for number, scores in zip(numbers, baselines.SetNeighbours(corpus).scores(visible, numbers, 2.0), strict=True):
        alone = baselines.SetNeighbours(corpus, number, 2.0)(visible)
        np.testing.assert_allclose(scores, alone, rtol=1e-5)
        # Nothing visible: no set is near, and all genes tie.
        assert (scores[1] == 0).all() and (scores[0] > 0).any()


def slow_recall(corpus, scorer, masked):
    ids, _ = rank(scorer, [one.visible for one in masked], [len(one.hidden) for one in masked])
    return np.mean([np.isin(drawn, one.hidden).mean() for drawn, one in zip(ids, masked, strict=True)])


def test_tuning_takes_the_best_on_the_validation_split(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    tuned = baselines.tuned_neighbours(corpus, tmp_path / "cache")
    masked, _ = mask_sets(sets_from_corpus(corpus, "validation"), genes_of(corpus.vocabulary.size))
    pairs = itertools.product(baselines.NEIGHBOURS, baselines.POWERS)
    recalls = [slow_recall(corpus, baselines.SetNeighbours(corpus, *pair), masked) for pair in pairs]
    np.testing.assert_allclose(slow_recall(corpus, tuned, masked), max(recalls))
    monkeypatch.setattr(baselines, "_tune", None)
    again = baselines.tuned_neighbours(corpus, tmp_path / "cache")
    assert (again.neighbours, again.power) == (tuned.neighbours, tuned.power)


def test_without_validation_sets_the_defaults_stay(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    corpus = dataclasses.replace(corpus, splits=np.zeros_like(corpus.splits))
    tuned = baselines.tuned_neighbours(corpus, tmp_path / "cache")
    assert (tuned.neighbours, tuned.power) == (500, 3.0)


def test_set_neighbours_find_the_family(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [np.arange(NUM_SPECIAL, NUM_SPECIAL + 4, dtype=np.int32)]
    ids, _ = rank(baselines.SetNeighbours(corpus), visible, [16])
    assert (ids[0] < NUM_SPECIAL + FAMILY).all()
