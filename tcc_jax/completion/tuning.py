"""Settings chosen on the validation split, always on the same sets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tcc_jax.baselines.cache import Arrays, cached
from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.completion.masks import MaskedSet, mask_sets
from tcc_jax.completion.ranker import rank_keys, recall_among
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import genes_of
from tcc_jax.terminal import progress

NEIGHBOURS = (100, 500, 2000, 20_000)
POWERS = (1.0, 2.0, 3.0, 4.0, 6.0)
TUNING_SETS = 200


def validation_masks(corpus: Corpus, count: int) -> list[MaskedSet]:
    """Return up to `count` random sets of the validation split with a random 20 % visible; always the same ones."""
    masked, _ = mask_sets(sets_from_corpus(corpus, "validation"), genes_of(corpus.vocabulary.size))
    return [masked[index] for index in np.random.default_rng(0).permutation(len(masked))[:count]]


def recall_of_each(scores_BV: np.ndarray, masked: Sequence[MaskedSet]) -> np.ndarray:
    """Return the [B] recall of [B, V] scores in each masked set, with as many genes drawn as are hidden in it."""
    keys_BV = rank_keys(scores_BV, [one.visible for one in masked], genes_of(scores_BV.shape[1]))
    return np.array([recall_among(keys_V, keys_V[one.hidden]) for keys_V, one in zip(keys_BV, masked, strict=True)])


def tuned_neighbours(index: TrainingIndex, folder: str | Path) -> SetNeighbours:
    """Return set-kNN with the power and the number of neighbours that do best on the corpus's validation split.

    Best is the highest mean recall at the hidden count, with a random 20 % of up to `TUNING_SETS` validation sets
    visible, over all pairs of `NEIGHBOURS` and `POWERS`. The choice is kept in `folder`, by the corpus hash. With no
    validation set that has two genes the defaults stay.
    """
    tuned = validation_masks(index.corpus, 1)
    scorer = SetNeighbours(index, how="tuned on the validation split" if tuned else "untuned: no validation set")
    settings = {
        "version": 1, "corpus": index.corpus.hash, "neighbours": NEIGHBOURS, "powers": POWERS, "sets": TUNING_SETS
    }  # fmt: skip
    chosen = cached(folder, "set-knn", settings, lambda: _tune(scorer, index))
    scorer.neighbours, scorer.power = int(chosen["neighbours"]), float(chosen["power"])
    return scorer


def _tune(scorer: SetNeighbours, index: TrainingIndex) -> Arrays:
    masked = validation_masks(index.corpus, TUNING_SETS)
    recalls = {pair: 0.0 for pair in itertools.product(NEIGHBOURS, POWERS)} if masked else {}
    with progress("tuning set-kNN on the validation sets", len(masked)) as advance:
        for one in masked:
            similarities = scorer.similarities(one.visible)
            for neighbours in NEIGHBOURS:
                sets, nearest = scorer.nearest(similarities, neighbours)
                votes = index.members[sets].T @ (nearest[:, None] ** POWERS).astype(np.float32)
                for power, votes_V in zip(POWERS, votes.T, strict=True):
                    recalls[neighbours, power] += recall_of_each(votes_V[None], [one])[0] / len(masked)
            advance(1)
    best = max(recalls, key=lambda pair: (recalls[pair], pair), default=(scorer.neighbours, scorer.power))
    return {"recall": np.array(recalls.get(best, -1.0)), "neighbours": np.array(best[0]), "power": np.array(best[1])}
