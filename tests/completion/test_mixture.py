import dataclasses
import itertools

import numpy as np
import pytest

from tcc_jax.completion import mixture as module
from tcc_jax.completion.baselines import Ease, SetNeighbours
from tcc_jax.completion.fitting import validation_masks
from tcc_jax.completion.mixture import EASE_WEIGHTS, VOTE_WEIGHTS, Mixture, tuned_mixture
from tcc_jax.completion.model import load
from tcc_jax.completion.ranker import rank
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import make_corpus, make_run

SIZE = 80


def scorer(seed, low=-3.0):
    return lambda visible: np.random.default_rng(seed).uniform(low, 3, (len(visible), SIZE)).astype(np.float32)


def slow_mixture(parts, visible, ease_weight, vote_weight):
    candidates = [id_ for id_ in range(NUM_SPECIAL, SIZE) if id_ not in visible]
    logits, ease, votes = (np.asarray(part[candidates], np.float64) for part in parts)
    logits += ease_weight * (ease - ease.mean()) / ease.std()
    scores = np.full(SIZE, -np.inf)
    scores[candidates] = np.log(np.exp(logits) / np.exp(logits).sum() + vote_weight * votes)
    return scores


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.4, 0.0), (0.0, 2.0), (0.3, 0.7)])
def test_equals_a_loop_in_float64(weights):
    visible = [np.array([20, 70, 33], np.int32), np.array([16], np.int32)]
    scorers = scorer(0), scorer(1), scorer(2, 0)
    scores = Mixture(*scorers, *weights)(visible)
    for row, ids in enumerate(visible):
        expected = slow_mixture([one(visible)[row] for one in scorers], ids.tolist(), *weights)
        np.testing.assert_allclose(scores[row], expected, rtol=1e-5, atol=1e-5)


def test_scores_that_are_all_equal_and_no_vote_leave_the_model():
    visible = [np.array([20], np.int32)]

    def flat(visible):
        return np.full((len(visible), SIZE), 7.3, np.float32)

    def none(visible):
        return np.zeros((len(visible), SIZE), np.float32)

    mixed, alone = Mixture(scorer(0), flat, none, 0.5, 3.0)(visible), Mixture(scorer(0), flat, none)(visible)
    np.testing.assert_allclose(mixed, alone, rtol=1e-6)


def test_weights_are_the_best_on_the_validation_split_and_kept(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    make_run(tmp_path / "run", corpus)
    model, ease, neighbours = load(tmp_path / "run"), Ease(corpus, tmp_path / "cache"), SetNeighbours(corpus)
    tuned = tuned_mixture(model, ease, neighbours, corpus, tmp_path / "cache")
    masked = validation_masks(corpus, 1000)

    def recall(mixture):
        ids, _ = rank(mixture, [one.visible for one in masked], [len(one.hidden) for one in masked])
        return np.mean([np.isin(drawn, one.hidden).mean() for drawn, one in zip(ids, masked, strict=True)])

    pairs = list(itertools.product(EASE_WEIGHTS, VOTE_WEIGHTS))
    recalls = [recall(Mixture(model.score, ease, neighbours, *pair)) for pair in pairs]
    np.testing.assert_allclose(recall(tuned), max(recalls))
    assert max(recalls) > recalls[0] and f"{tuned.vote_weight:g} x votes" in tuned.describe()
    unsplit = dataclasses.replace(corpus, splits=np.zeros_like(corpus.splits))
    alone = tuned_mixture(model, ease, neighbours, unsplit, tmp_path / "another cache")
    assert (alone.ease_weight, alone.vote_weight) == (0, 0)
    monkeypatch.setattr(module, "_tune", None)
    again = tuned_mixture(model, ease, neighbours, corpus, tmp_path / "cache")
    assert (again.ease_weight, again.vote_weight) == (tuned.ease_weight, tuned.vote_weight)
    # Other parameters or settings are weighed anew.
    make_run(tmp_path / "other", corpus, seed=4)
    with pytest.raises(TypeError):
        tuned_mixture(load(tmp_path / "other"), ease, neighbours, corpus, tmp_path / "cache")
    neighbours.power = 2.0
    with pytest.raises(TypeError):
        tuned_mixture(model, ease, neighbours, corpus, tmp_path / "cache")
