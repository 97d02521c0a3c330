"""The relevance model against a loop over sets and genes in float64."""

import dataclasses

import numpy as np
import pytest

from tcc_jax.baselines import relevance as module
from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.relevance import RelevanceModel
from tcc_jax.completion.ranker import rank
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import FAMILY, make_corpus


def brute_force(corpus, visible, nearest):
    index = corpus.indices("train")
    train = [set(corpus.genes(number).tolist()) for number in index]
    mentions = sum(map(len, train))
    share = {id_: sum(id_ in one for one in train) / mentions for id_ in range(corpus.vocabulary.size)}
    ratios = [sum(np.log(1 + 0.1 / (len(one) * share[id_])) for id_ in one & set(visible)) for one in train]
    # Equal ratios must not depend on the order of a float64 sum.
    order = sorted(range(len(train)), key=lambda number: (-round(ratios[number], 9), number))
    best = {}
    for number in [number for number in order if ratios[number] > 0][:nearest]:
        best.setdefault(corpus.clusters[index[number]], number)
    weights = {number: ratios[number] ** 8 for number in best.values()}
    held = {id_: sum(weights[number] for number in weights if id_ in train[number]) for id_ in visible}
    weights = {
        number: weight * sum(1 / held[id_] for id_ in visible if id_ in train[number] and held[id_])
        for number, weight in weights.items()
    }
    scores = np.zeros(corpus.vocabulary.size)
    for id_ in range(corpus.vocabulary.size):
        votes = {}
        for number, weight in weights.items():
            if id_ in train[number]:
                library = corpus.libraries[index[number]]
                votes[library] = votes.get(library, 0) + weight
        scores[id_] = sum(vote**0.65 for vote in votes.values())
    return scores


@pytest.mark.parametrize("nearest", [1000, 7])
def test_equals_a_loop_in_float64(tmp_path, monkeypatch, nearest):
    monkeypatch.setattr(module, "_NEAREST", nearest)
    corpus = make_corpus(tmp_path / "corpus")
    rng = np.random.default_rng(0)
    corpus = dataclasses.replace(
        corpus,
        libraries=[f"library {number}" for number in rng.integers(0, 3, corpus.num_sets)],
        clusters=rng.integers(0, 40, corpus.num_sets),
    )
    visible = [rng.choice(60, rng.integers(1, 9), replace=False).astype(np.int32) + NUM_SPECIAL for _ in range(30)]
    model = RelevanceModel(TrainingIndex(corpus))
    scores = model(visible)
    assert scores.dtype == np.float32 and model.names.tolist() == ["library 0", "library 1", "library 2"]
    for row, ids in enumerate(visible):
        expected = brute_force(corpus, ids.tolist(), nearest)
        np.testing.assert_allclose(scores[row] / scores[row].max(), expected / expected.max(), rtol=1e-3, atol=1e-5)


def test_a_row_does_not_depend_on_the_others_and_finds_its_family(tmp_path):
    model = RelevanceModel(TrainingIndex(make_corpus(tmp_path / "corpus")))
    visible = [np.arange(start, start + 4, dtype=np.int32) for start in range(NUM_SPECIAL, NUM_SPECIAL + 40)]
    together = model(visible)
    np.testing.assert_array_equal(together[7], model(visible[7:8])[0])
    ids, _ = rank(model, visible[:1], [16])
    assert (ids[0] < NUM_SPECIAL + FAMILY).all()


def test_nothing_visible_and_genes_of_no_training_set_leave_all_genes_tied(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    # No set that holds gene 16 stays in training.
    splits = np.where([16 in corpus.genes(index) for index in range(corpus.num_sets)], 2, corpus.splits)
    corpus = dataclasses.replace(corpus, splits=splits.astype(np.uint8))
    nothing, unheld = np.empty(0, np.int32), np.array([16], np.int32)
    scores = RelevanceModel(TrainingIndex(corpus))([nothing, np.array([20], np.int32), unheld])
    assert not scores[0].any() and scores[1].any() and not scores[2].any()


def test_a_gene_that_none_of_the_nearest_sets_holds_has_no_vote_to_share(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus")
    monkeypatch.setattr(module, "_NEAREST", 1)
    # Families share no gene: the nearest set holds genes of one only.
    visible = [np.array([20, 21, 22, 23, 40], np.int32)]
    (scores,) = RelevanceModel(TrainingIndex(corpus))(visible)
    assert np.isfinite(scores).all() and scores.any()
    np.testing.assert_allclose(
        scores / scores.max(), (expected := brute_force(corpus, visible[0].tolist(), 1)) / expected.max(), rtol=1e-4
    )
