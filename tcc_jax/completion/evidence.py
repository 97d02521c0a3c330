"""Why a gene is proposed: the training sets most like the visible genes that hold it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tcc_jax.completion.sets import training_sets
from tcc_jax.corpus.store import Corpus


@dataclass(frozen=True)
class Neighbour:
    """A training set that holds a proposed gene.

    Attributes:
        name: of the set.
        library: it comes from.
        shared: visible genes that are in it.
        size: its genes.
        jaccard: shared genes over the genes of the visible ones and the set together.
    """

    name: str
    library: str
    shared: int
    size: int
    jaccard: float


class Evidence:
    """Finds the training sets that speak for proposed genes. Takes about 9 bytes for each gene of each training set.

    Args:
        corpus: the prepared corpus; only its training sets are used.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._train = corpus.indices("train")
        train = training_sets(corpus)
        self._lengths = train.lengths
        # One byte a member: only where they are matters.
        by_gene = train.matrix(corpus.vocabulary.size, np.ones(len(train.tokens), np.int8)).tocsc()
        self._sets, self._starts = by_gene.indices, by_gene.indptr

    def __call__(self, visible: np.ndarray, proposed: np.ndarray, at_most: int = 3) -> list[list[Neighbour]]:
        """Return for each proposed gene the training sets that hold it and a visible gene, by falling Jaccard.

        Args:
            visible: ids of the visible genes, each once.
            proposed: ids of the proposed genes.
            at_most: sets for each gene.
        """
        touched = np.concatenate([self._holding(gene) for gene in visible])
        shared = np.bincount(touched, minlength=len(self._train))
        jaccard = shared / (len(visible) + self._lengths - shared)
        evidence = []
        for gene in proposed:
            holding = self._holding(gene)
            holding = holding[shared[holding] > 0]
            best = holding[np.lexsort((holding, -jaccard[holding]))[:at_most]]
            evidence.append([self._neighbour(place, int(shared[place]), float(jaccard[place])) for place in best])
        return evidence

    def _holding(self, gene: int) -> np.ndarray:
        return self._sets[self._starts[gene] : self._starts[gene + 1]]

    def _neighbour(self, place: int, shared: int, jaccard: float) -> Neighbour:
        index = self._train[place]
        names, libraries = self._corpus.names, self._corpus.libraries
        return Neighbour(names[index], libraries[index], shared, int(self._lengths[place]), jaccard)
