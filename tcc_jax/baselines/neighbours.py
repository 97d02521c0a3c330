"""Set-kNN: the genes of the most similar training sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tcc_jax.baselines.index import TrainingIndex


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
        """Score [n, V] float32, as a `baselines.Scorer`."""
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
