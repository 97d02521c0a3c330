"""Settings of a method are chosen on sets of the validation split, masked as the default protocol masks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tcc_jax.completion.metrics import rank_keys
from tcc_jax.completion.protocol import MaskedSet, genes_of, mask_sets
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.corpus.store import Corpus


def validation_masks(corpus: Corpus, count: int) -> list[MaskedSet]:
    """Return up to `count` random sets of the validation split with a random 20 % visible; always the same ones."""
    masked, _ = mask_sets(sets_from_corpus(corpus, "validation"), genes_of(corpus.vocabulary.size))
    return [masked[index] for index in np.random.default_rng(0).permutation(len(masked))[:count]]


def mean_recall(scores_BV: np.ndarray, masked: Sequence[MaskedSet]) -> float:
    """Return the mean recall of [B, V] scores of masked sets, with as many genes drawn as are hidden in each."""
    keys_BV = rank_keys(scores_BV, [one.visible for one in masked], genes_of(scores_BV.shape[1]))
    recalls = []
    for keys_V, one in zip(keys_BV, masked, strict=True):
        last = np.partition(keys_V, len(one.hidden) - 1)[len(one.hidden) - 1]
        recalls.append(np.mean(keys_V[one.hidden] <= last))
    return float(np.mean(recalls))
