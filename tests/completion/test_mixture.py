import dataclasses

import numpy as np
import pytest

from tcc_jax.baselines import relevance
from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.relevance import RelevanceModel
from tcc_jax.completion import mixture as module
from tcc_jax.completion.mixture import WEIGHTS, Mixture, tuned_mixture
from tcc_jax.completion.model import load
from tcc_jax.completion.ranker import rank
from tcc_jax.completion.tuning import validation_masks
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import make_corpus, make_run

SIZE = 80


def scorer(seed, low=-3.0):
    return lambda visible: np.random.default_rng(seed).uniform(low, 3, (len(visible), SIZE)).astype(np.float32)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_equals_a_loop_in_float64(weight):
    visible = [np.array([20, 70, 33], np.int32), np.array([16], np.int32)]
    model, retrieval = scorer(0), scorer(1, 0)
    scores = Mixture(model, retrieval, weight)(visible)
    for row, ids in enumerate(visible):
        candidates = [id_ for id_ in range(NUM_SPECIAL, SIZE) if id_ not in ids]
        logits, votes = (np.asarray(part(visible)[row, candidates], np.float64) for part in (model, retrieval))
        share = (1 - weight) * np.exp(logits) / np.exp(logits).sum() + weight * votes / votes.sum()
        np.testing.assert_allclose(scores[row, candidates], np.log(share), rtol=1e-5, atol=1e-5)
        assert np.all(np.isneginf(np.delete(scores[row], candidates)))


def test_without_a_vote_the_order_of_the_model_stays():
    visible = [np.array([20], np.int32)]
    mixed = Mixture(scorer(0), lambda visible: np.zeros((len(visible), SIZE), np.float32), 0.5)(visible)
    alone = Mixture(scorer(0), scorer(1, 0))(visible)
    np.testing.assert_array_equal(np.argsort(mixed[0]), np.argsort(alone[0]))


def with_libraries(corpus):
    """Two libraries, each of them with sets of all families in every split."""
    return dataclasses.replace(corpus, libraries=["one" if index % 2 else "two" for index in range(corpus.num_sets)])


def test_weight_is_the_best_on_the_validation_split_and_kept(tmp_path, monkeypatch):
    corpus = with_libraries(make_corpus(tmp_path / "corpus", num_sets=300))
    make_run(tmp_path / "run", corpus)
    # Few sets count: those of the own library must not take the place of others.
    monkeypatch.setattr(relevance, "_NEAREST", 5)
    model, retrieval = load(tmp_path / "run"), RelevanceModel(TrainingIndex(corpus))
    tuned = tuned_mixture(model, retrieval, tmp_path / "cache")
    masked, recalls = validation_masks(corpus, 1000), np.zeros(len(WEIGHTS))
    for one in masked:
        likelihoods = retrieval.likelihoods(one.visible)
        names = np.array([corpus.libraries[set_] for set_ in corpus.indices("train")])
        likelihoods[names == one.library] = 0
        votes_V = retrieval.votes(likelihoods, one.visible)
        for number, weight in enumerate(WEIGHTS):
            mixture = Mixture(model.score, lambda visible, votes_V=votes_V: votes_V[None], weight)
            (drawn,), _ = rank(mixture, [one.visible], [len(one.hidden)])
            recalls[number] += np.isin(drawn, one.hidden).mean() / len(masked)
    assert recalls[WEIGHTS.index(tuned.weight)] == pytest.approx(recalls.max())
    assert tuned.weight > 0 and f"{tuned.weight:g} s" in tuned.describe()
    assert tuned.describe().endswith("; weighed on the validation split")
    unsplit = dataclasses.replace(corpus, splits=np.zeros_like(corpus.splits))
    alone = tuned_mixture(model, RelevanceModel(TrainingIndex(unsplit)), tmp_path / "another cache")
    assert alone.weight == 0 and alone.describe().endswith("; the model alone: no validation set to weigh it on")
    monkeypatch.setattr(module, "_tune", None)
    assert tuned_mixture(model, retrieval, tmp_path / "cache").weight == tuned.weight
    # Other parameters or settings are weighed anew.
    make_run(tmp_path / "other", corpus, seed=4)
    with pytest.raises(TypeError):
        tuned_mixture(load(tmp_path / "other"), retrieval, tmp_path / "cache")
    monkeypatch.setattr(relevance, "_POWER", 2.0)
    with pytest.raises(TypeError):
        tuned_mixture(model, retrieval, tmp_path / "cache")


def test_only_a_library_with_most_of_the_training_sets_keeps_its_votes(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    make_run(tmp_path / "run", corpus)
    model = load(tmp_path / "run")
    alone = tuned_mixture(model, RelevanceModel(TrainingIndex(corpus)), tmp_path / "one")
    names = ["test" if split == 2 else "train" for split in corpus.splits]
    unseen = dataclasses.replace(corpus, libraries=names)
    assert tuned_mixture(model, RelevanceModel(TrainingIndex(unseen)), tmp_path / "two").weight == alone.weight > 0
    # Families share no gene: where each is a library of its own, nothing is left to vote.
    apart = dataclasses.replace(corpus, libraries=[f"family {index % 3}" for index in range(corpus.num_sets)])
    assert tuned_mixture(model, RelevanceModel(TrainingIndex(apart)), tmp_path / "three").weight == 0
