"""What a model must beat: random genes, popular genes, the genes of the most similar training sets, and EASE.

Each is a `ranker.Scorer`, so that it runs over the same masks and metrics as the model.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.linalg

from tcc_jax.completion.fitting import Arrays, cached, recall_of_each, validation_masks
from tcc_jax.completion.index import TrainingIndex
from tcc_jax.completion.ranker import Scorer
from tcc_jax.corpus.similarity import Sets, training_sets
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, Vocabulary
from tcc_jax.terminal import UserError, progress

NEIGHBOURS = (100, 500, 2000, 20_000)
POWERS = (1.0, 2.0, 3.0, 4.0, 6.0)
TUNING_SETS = 200
_GENES_AT_ONCE = 500


def popularity(vocabulary: Vocabulary) -> Scorer:
    """Score a gene by the number of training sets that hold it, whatever is visible."""
    counts_V = vocabulary.counts.astype(np.float32)
    return lambda visible: np.broadcast_to(counts_V, (len(visible), len(counts_V)))


def random_genes(vocabulary: Vocabulary, seed: int = 0) -> Scorer:
    """Score genes at random. A set's scores depend on the seed and its visible genes, not on its place in a batch."""

    def scores(visible: Sequence[np.ndarray]) -> np.ndarray:
        rows = (zlib.crc32(np.asarray(ids, np.int64).tobytes()) for ids in visible)
        return np.stack([np.random.default_rng([seed, row]).random(vocabulary.size, np.float32) for row in rows])

    return scores


class SetNeighbours:
    """Set-kNN: a gene's score is the sum of similarity**power over the nearest training sets that hold it.

    Similarity is the cosine between idf-weighted sets, idf = log(training sets / sets with the gene): memory-based
    collaborative filtering as in Breese, Heckerman & Kadie (1998), which raises weights to a power likewise. Genes that
    no neighbour holds tie at zero, so the ranker draws them by falling popularity. Only training sets are used.

    Args:
        index: the training sets.
        neighbours: training sets that count, at most.
        power: exponent of the similarity.
        how: how these two were chosen, for `describe`.
    """

    def __init__(self, index: TrainingIndex, neighbours: int = 500, power: float = 3.0, how: str = "as given") -> None:
        self.neighbours, self.power, self.how = neighbours, power, how
        self._index = index
        self._idf_V = np.log(len(index) / np.maximum(index.counts, 1))
        self._norms = np.sqrt(np.maximum(index.members @ self._idf_V**2, 1e-18))

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`."""
        return np.stack([self._votes(*self.nearest(self.similarities(ids), self.neighbours)) for ids in visible])

    def describe(self) -> str:
        """Return one line with the settings."""
        sets = f"nearest {min(self.neighbours, len(self._index)):,} training sets"
        return f"set-kNN: {sets}, idf cosine to the power {self.power:g}, {self.how}"

    def similarities(self, ids: np.ndarray) -> np.ndarray:
        """Return [sets] float64, the similarity of a prompt, given by its genes, to each training set."""
        sets_P, genes_P = self._index.postings(ids)
        weights_V = self._idf_V**2 / max(math.sqrt(np.sum(self._idf_V[ids] ** 2)), 1e-9)
        return np.bincount(sets_P, weights_V[genes_P], len(self._index)) / self._norms

    def nearest(self, similarities: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest sets, ascending and at most so many, and their similarities, all above 0."""
        sets = np.flatnonzero(similarities)
        if len(sets) > neighbours:
            sets = np.sort(sets[np.argpartition(-similarities[sets], neighbours)[:neighbours]])
        return sets, similarities[sets]

    def _votes(self, sets: np.ndarray, similarities: np.ndarray) -> np.ndarray:
        return self._index.members[sets].T @ (similarities**self.power).astype(np.float32)


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


class Ease:
    """H. Steck, "Embarrassingly shallow autoencoders for sparse data" (WWW 2019), over the most frequent genes.

    With X the training sets as rows, each scaled by 1 / sqrt(length), P = (X'X + penalty I)^-1 and B = I - P / diag(P):
    a gene's score is the sum of its weights from the visible genes. Genes outside the most frequent ones score below
    all others, by popularity. Fitting takes about 12 bytes x num_genes^2 of memory (2 GB at 13,000 genes), scoring 4.

    Args:
        corpus: the prepared corpus; its training sets are fitted.
        folder: where the weights are kept, by corpus hash and settings.
        num_genes: most frequent genes that are fitted.
        penalty: lambda, the weight of the squared weights.

    Raises:
        UserError: the weights need more memory than there is, or the penalty is too small or large for 32 bits.
    """

    def __init__(self, corpus: Corpus, folder: str | Path, num_genes: int = 13_000, penalty: float = 20.0) -> None:
        self._size = corpus.vocabulary.size
        # Ids go by falling count: the most frequent genes are the first.
        self.num_genes, self.penalty = min(num_genes, self._size - NUM_SPECIAL), penalty
        settings = {"version": 1, "corpus": corpus.hash, "num_genes": self.num_genes, "penalty": penalty}
        try:
            fitted = cached(folder, "ease", settings, lambda: _fit_ease(corpus, self.num_genes, penalty))
        except MemoryError:
            raise UserError(
                f"--ease-genes {num_genes}: not enough memory for {num_genes:,} genes; give fewer"
            ) from None
        self._weights_GG = fitted["weights"]

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`."""
        known = [ids[ids < NUM_SPECIAL + self.num_genes] - NUM_SPECIAL for ids in visible]
        scores = np.empty((len(visible), self._size), np.float32)
        for row, genes in enumerate(known):
            fitted_G = self._weights_GG[genes].sum(0) if len(genes) else np.zeros(self.num_genes, np.float32)
            scores[row] = np.min(fitted_G) - 1
            scores[row, NUM_SPECIAL : NUM_SPECIAL + self.num_genes] = fitted_G
        return scores


def _fit_ease(corpus: Corpus, num_genes: int, penalty: float) -> Arrays:
    train = training_sets(corpus)
    lengths = train.lengths
    kept = train.keep_mentions(train.tokens < NUM_SPECIAL + num_genes)
    gram_GG = _gram(Sets(kept.tokens - NUM_SPECIAL, kept.offsets), lengths, num_genes)
    gram_GG[np.diag_indices(num_genes)] += penalty
    with progress(f"fitting EASE: the inverse of {num_genes:,} x {num_genes:,} numbers"):
        factor_GG, info = scipy.linalg.lapack.spotrf(gram_GG, lower=True, overwrite_a=True)
        inverse_GG, _ = scipy.linalg.lapack.spotri(factor_GG, lower=True, overwrite_c=True)
    diagonal_G = np.diag(inverse_GG).copy()
    if info or not ((diagonal_G > 0) & np.isfinite(diagonal_G)).all():
        raise UserError(f"--ease-penalty {penalty:g}: no weights can be computed with it; give one nearer the default")
    # LAPACK leaves the result in one triangle, that of a Fortran array: mirror it without another matrix.
    for start in range(0, num_genes, _GENES_AT_ONCE):
        stop = start + _GENES_AT_ONCE
        inverse_GG[start:stop, stop:] = inverse_GG[stop:, start:stop].T
        block = inverse_GG[start:stop, start:stop]
        block[:] = np.tril(block) + np.tril(block, -1).T
    # One row for each visible gene: what it says of every other gene.
    inverse_GG /= -diagonal_G
    inverse_GG[np.diag_indices(num_genes)] = 0
    return {"weights": np.ascontiguousarray(inverse_GG)}


def _gram(sets: Sets, lengths: np.ndarray, num_genes: int) -> np.ndarray:
    scale = 1 / np.sqrt(np.repeat(lengths, sets.lengths))
    rows = sets.matrix(num_genes, scale.astype(np.float32))
    columns = rows.T.tocsr()
    gram_GG = np.empty((num_genes, num_genes), np.float32, order="F")
    with progress("fitting EASE: how often genes meet", num_genes) as advance:
        for start in range(0, num_genes, _GENES_AT_ONCE):
            block = (columns[start : start + _GENES_AT_ONCE] @ rows).toarray()
            # The matrix is symmetric; LAPACK works in place in Fortran order, where a block of columns lies together.
            gram_GG[:, start : start + _GENES_AT_ONCE] = block.T
            advance(len(block))
    return gram_GG
