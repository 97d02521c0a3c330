"""Completion by the training sets that the visible genes are likely to come from: a relevance model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from tcc_jax.baselines.index import TrainingIndex

# Chosen on validation sets of the real corpus while their own libraries had no vote (benchmarks/EVAL.md). Power times
# pooling from 4.9 to 5.6, half the smoothing, and half or twice as many sets are within 0.003 of recall.
_SMOOTHING = 0.1
_POWER = 8.0
_NEAREST = 1000
_POOLING = 0.65


class RelevanceModel:
    """A gene's score is the evidence for it from the training sets that the visible genes are likely to come from.

    1. A training set s of |s| genes weighs (sum over visible genes i in s of log(1 + c / (|s| p_i))) ** power, p_i the
       share of gene i in all mentions: the log-likelihood ratio of the prompt under s, smoothed by popularity, of Ponte
       & Croft's query likelihood (SIGIR 1998), c being the odds of s. The nearest 1,000 sets count, of near-duplicates
       the best.
    2. One step of expectation-maximisation for a prompt that is a mixture of sets: each visible gene has one vote,
       which the sets that hold it share by weight. A set that explains genes that others do not gains.
    3. The votes of each library for a gene, to the power 0.65, are added up: sets of one library repeat each other.
       Sets as sources of evidence for a prompt are the relevance model of Lavrenko & Croft (SIGIR 2001).

    Genes that no such set holds tie at zero, so the ranker draws them by falling popularity.

    Args:
        index: the training sets.

    Attributes:
        index: the same.
        names: [libraries] names of the libraries of the training sets, sorted.
        libraries: [training sets] the number of each one's library among these.
    """

    def __init__(self, index: TrainingIndex) -> None:
        self.index, corpus = index, index.corpus
        self._odds_V = _SMOOTHING * index.counts.sum() / np.maximum(index.counts, 1)
        self._clusters = corpus.clusters[index.numbers]
        libraries = [corpus.libraries[number] for number in index.numbers]
        self.names, self.libraries = np.unique(libraries, return_inverse=True)

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `baselines.Scorer`."""
        return np.stack([self.votes(self.likelihoods(ids), ids) for ids in visible])

    @property
    def settings(self) -> dict[str, float]:
        """What decides the scores besides the corpus, as JSON values."""
        return {"smoothing": _SMOOTHING, "power": _POWER, "nearest": _NEAREST, "pooling": _POOLING}

    def describe(self) -> str:
        """Return one line with the settings."""
        return (
            f"relevance: the {min(_NEAREST, len(self.index)):,} training sets of highest query likelihood, "
            "a vote for each visible gene, "
            f"pooled over {len(self.names):,} librar{'y' if len(self.names) == 1 else 'ies'}"
        )

    def likelihoods(self, ids: np.ndarray) -> np.ndarray:
        """Return [sets] float32, the log-likelihood ratio of a prompt, given by its genes, under each training set."""
        sets_P, genes_P = self.index.postings(ids)
        ratios_P = np.log1p(self._odds_V[genes_P] / self.index.lengths[sets_P])
        return np.bincount(sets_P, ratios_P, len(self.index)).astype(np.float32)

    def votes(self, likelihoods: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the [V] float32 scores; sets of likelihood 0 have no vote."""
        sets = np.flatnonzero(likelihoods)
        if not len(sets):
            return np.zeros(self.index.members.shape[1], np.float32)
        sets, ratios = self._nearest(sets, likelihoods[sets])
        return self._pooled(sets, (ratios / ratios.max()) ** _POWER, ids)

    def _nearest(self, sets: np.ndarray, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Sets come by number: among equals the first are taken.
        if len(sets) > _NEAREST:
            least = np.partition(ratios, -_NEAREST)[-_NEAREST]
            above = np.flatnonzero(ratios > least)
            kept = np.append(above, np.flatnonzero(ratios == least)[: _NEAREST - len(above)])
            sets, ratios = sets[kept], ratios[kept]
        order = np.lexsort((sets, -ratios, self._clusters[sets]))
        _, firsts = np.unique(self._clusters[sets[order]], return_index=True)
        best = order[firsts]
        return sets[best], ratios[best]

    def _pooled(self, sets: np.ndarray, weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
        members = self.index.members[sets]
        # At least one of the sets holds a gene; one that none of the nearest holds has no vote to share.
        held_V = weights @ members
        shares_V = np.zeros_like(held_V)
        shares_V[ids] = np.divide(1, held_V[ids], out=np.zeros(len(ids), held_V.dtype), where=held_V[ids] > 0)
        weights = weights * (members @ shares_V)
        libraries, group = np.unique(self.libraries[sets], return_inverse=True)
        by_library = scipy.sparse.csr_array((weights, (group, np.arange(len(sets)))), (len(libraries), len(sets)))
        votes = by_library @ members
        votes.data **= _POOLING
        return votes.sum(axis=0)
