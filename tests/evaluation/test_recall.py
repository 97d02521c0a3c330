import dataclasses

import jax
import numpy as np
import pytest

import tcc_jax
from tcc_jax.completion.tuning import recall_of_each, validation_masks
from tcc_jax.evaluation import recall as module
from tcc_jax.evaluation.recall import make_recall
from tests.completion.tiny import STEP, make_corpus, make_run


def with_sets(config, count):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, recall_sets=count))


def test_it_is_the_mean_over_random_validation_sets(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    config = with_sets(make_run(tmp_path / "run", corpus), 10)
    model = tcc_jax.load(tmp_path / "run")
    masked = validation_masks(corpus, 10)
    first = {corpus.names[index] for index in corpus.indices("validation")[:10]}
    assert {one.name for one in masked} != first
    expected = recall_of_each(model.score([one.visible for one in masked]), masked)
    monkeypatch.setattr(module, "_SETS_AT_ONCE", 4)
    polls = []
    found = make_recall(config, corpus)(model.checkpoint.params, STEP, lambda: polls.append(1))
    assert found == pytest.approx(np.mean(expected)) and len(polls) == 3


def test_a_poll_gives_it_up(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    recall = make_recall(make_run(tmp_path / "run", corpus), corpus)
    with pytest.raises(InterruptedError):
        recall({}, STEP, lambda: (_ for _ in ()).throw(InterruptedError))


def test_without_a_number_or_a_validation_set_it_is_0(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    config = make_run(tmp_path / "run", corpus)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tcc_jax.load(tmp_path / "run").checkpoint.params)
    assert make_recall(config, corpus)(broken, STEP, lambda: None) == 0
    none = dataclasses.replace(corpus, splits=np.zeros_like(corpus.splits))
    assert make_recall(config, none)({}, STEP, lambda: None) == 0
