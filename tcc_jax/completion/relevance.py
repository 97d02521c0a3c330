"""Completion by the training sets that the visible genes are likely to come from: a relevance model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from tcc_jax.completion.ranker import batched
from tcc_jax.corpus.similarity import Sets, join_sets, training_sets
from tcc_jax.corpus.store import Corpus

# Chosen on validation sets of the real corpus while their own libraries had no vote (benchmarks/EVAL.md). Power times
# pooling from 4.9 to 5.6, half the smoothing, and half or twice as many sets are within 0.003 of recall.
_SMOOTHING = 0.1
_POWER = 8.0
_NEAREST = 1000
_POOLING = 0.65
# Queries compared with the training sets at once; against 350,000 sets the likelihoods of 32 take at most 135 MB.
_QUERIES_AT_ONCE = 32


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
        corpus: the prepared corpus; only its training sets are used.

    Attributes:
        names: [libraries] names of the libraries of the training sets, sorted.
        libraries: [training sets] the number of each one's library among these.
    """

    def __init__(self, corpus: Corpus) -> None:
        train, index = training_sets(corpus), corpus.indices("train")
        size = corpus.vocabulary.size
        self._members = train.matrix(size, np.ones(len(train.tokens), np.float32))
        # By gene: the sets that hold it, so that a query touches only the sets that share a gene with it.
        self._ratios_by_gene = train.matrix(size, _log_ratios(train, size)).T.tocsr()
        self._clusters = corpus.clusters[index]
        self.names, self.libraries = np.unique([corpus.libraries[number] for number in index], return_inverse=True)

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`."""
        batches = batched(visible, _QUERIES_AT_ONCE)
        return np.concatenate([self.votes(self.likelihoods(batch), batch) for batch in batches])

    @property
    def settings(self) -> dict[str, float]:
        """What decides the scores besides the corpus, as JSON values."""
        return {"smoothing": _SMOOTHING, "power": _POWER, "nearest": _NEAREST, "pooling": _POOLING}

    def describe(self) -> str:
        """Return one line with the settings."""
        return (
            f"relevance: the {_NEAREST:,} training sets of highest query likelihood, a vote for each visible gene, "
            f"pooled over {len(self.names):,} librar{'y' if len(self.names) == 1 else 'ies'}"
        )

    def likelihoods(self, visible: Sequence[np.ndarray]) -> scipy.sparse.csr_array:
        """Return the [n, training sets] log-likelihood ratios of the sets that share a gene, float32, over 0."""
        prompts = join_sets(visible)
        genes = prompts.matrix(self._members.shape[1], np.ones(len(prompts.tokens), np.float32))
        likelihoods = (genes @ self._ratios_by_gene).tocsr()
        likelihoods.sort_indices()
        return likelihoods

    def votes(self, likelihoods: scipy.sparse.csr_array, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Return the [n, V] float32 scores; sets that `likelihoods` does not hold have no vote."""
        scores = np.zeros((len(visible), self._members.shape[1]), np.float32)
        for row, ids in enumerate(visible):
            part = slice(*likelihoods.indptr[row : row + 2])
            sets, ratios = self._nearest(likelihoods.indices[part], likelihoods.data[part])
            if len(sets):
                scores[row] = self._pooled(sets, (ratios / ratios.max()) ** _POWER, ids)
        return scores

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
        members = self._members[sets]
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


def _log_ratios(sets: Sets, num_genes: int) -> np.ndarray:
    counts_V = np.bincount(sets.tokens, minlength=num_genes)
    expected = np.repeat(sets.lengths, sets.lengths) * (counts_V / len(sets.tokens))[sets.tokens]
    return np.log1p(_SMOOTHING / expected).astype(np.float32)
