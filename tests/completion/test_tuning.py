import dataclasses
import itertools

import numpy as np

from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.completion import tuning
from tcc_jax.completion.masks import mask_sets
from tcc_jax.completion.ranker import rank
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.completion.tuning import NEIGHBOURS, POWERS, recall_of_each, tuned_neighbours, validation_masks
from tcc_jax.corpus.vocabulary import genes_of
from tests.completion.tiny import make_corpus


def test_validation_sets_are_always_the_same_ones(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    few, all_ = validation_masks(corpus, 7), validation_masks(corpus, 1000)
    assert len(few) == 7 and len(all_) == len(corpus.indices("validation"))
    for one, other in zip(few, all_, strict=False):
        assert one.name == other.name and (one.visible == other.visible).all()
        assert one.name in [corpus.names[index] for index in corpus.indices("validation")]


def test_recall_equals_a_full_sort_with_ties(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    masked = validation_masks(corpus, 1000)
    scores_BV = np.random.default_rng(0).integers(0, 4, (len(masked), corpus.vocabulary.size)).astype(np.float32)
    genes = np.flatnonzero(genes_of(corpus.vocabulary.size))
    recalls = []
    for scores_V, one in zip(scores_BV, masked, strict=True):
        order = sorted(set(genes.tolist()) - set(one.visible.tolist()), key=lambda id_: (-scores_V[id_], id_))
        drawn = set(order[: len(one.hidden)])
        recalls.append(len(drawn & set(one.hidden.tolist())) / len(one.hidden))
    np.testing.assert_allclose(recall_of_each(scores_BV, masked), recalls)


def slow_recall(corpus, scorer, masked):
    ids, _ = rank(scorer, [one.visible for one in masked], [len(one.hidden) for one in masked])
    return np.mean([np.isin(drawn, one.hidden).mean() for drawn, one in zip(ids, masked, strict=True)])


def test_tuning_takes_the_best_on_the_validation_split(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    tuned = tuned_neighbours(TrainingIndex(corpus), tmp_path / "cache")
    masked, _ = mask_sets(sets_from_corpus(corpus, "validation"), genes_of(corpus.vocabulary.size))
    pairs = itertools.product(NEIGHBOURS, POWERS)
    recalls = [slow_recall(corpus, SetNeighbours(TrainingIndex(corpus), *pair), masked) for pair in pairs]
    np.testing.assert_allclose(slow_recall(corpus, tuned, masked), max(recalls))
    monkeypatch.setattr(tuning, "_tune", None)
    again = tuned_neighbours(TrainingIndex(corpus), tmp_path / "cache")
    assert (again.neighbours, again.power) == (tuned.neighbours, tuned.power)
    assert again.describe() == tuned.describe() and "tuned on the validation split" in tuned.describe()


def test_without_validation_sets_the_defaults_stay(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    corpus = dataclasses.replace(corpus, splits=np.zeros_like(corpus.splits))
    index = TrainingIndex(corpus)
    tuned = tuned_neighbours(index, tmp_path / "cache")
    assert (tuned.neighbours, tuned.power) == (500, 3.0)
    # No more sets than there are.
    nearest = f"nearest {min(500, len(index))} training sets"
    assert tuned.describe().endswith(f"{nearest}, idf cosine to the power 3, untuned: no validation set")
    tuned.neighbours = 20_000
    assert f"nearest {len(index)} training sets" in tuned.describe()
