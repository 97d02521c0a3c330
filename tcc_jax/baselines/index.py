"""The training sets of a corpus by their genes: where retrieval, `--why` and the leak report look sets up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tcc_jax.corpus.similarity import training_sets
from tcc_jax.corpus.store import Corpus
from tcc_jax.terminal import Advance


class TrainingIndex:
    """An inverted index: for each gene the training sets that hold it, and for each set its genes.

    A query touches only the sets that share a gene with it. Takes 12 bytes of memory for each gene of each set.

    Args:
        corpus: the prepared corpus; sets are numbered among its training sets, in its order.

    Attributes:
        corpus: the corpus.
        numbers: [sets] int64, the number of each set among all of the corpus.
        lengths: [sets] int64, genes of each set.
        counts: [V] int64, sets that hold each gene.
        members: [sets, V] sparse float32, 1 where a set holds a gene.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.numbers = corpus.indices("train")
        train, size = training_sets(corpus), corpus.vocabulary.size
        self.lengths = train.lengths
        self.members = train.matrix(size, np.ones(len(train.tokens), np.float32))
        by_gene = train.matrix(size, np.ones(len(train.tokens), np.int8)).tocsc()
        self._sets, self._starts = by_gene.indices, by_gene.indptr
        self.counts = np.diff(self._starts).astype(np.int64)

    def __len__(self) -> int:
        """Return the number of training sets."""
        return len(self.lengths)

    def holding(self, gene: int) -> np.ndarray:
        """Return the numbers of the sets that hold a gene, int32, ascending."""
        return self._sets[self._starts[gene] : self._starts[gene + 1]]

    def postings(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sets that hold each of some genes, one gene after the other: P set numbers, and P genes."""
        holding = [self.holding(gene) for gene in ids]
        sets_P = np.concatenate([*holding, np.empty(0, np.int32)])
        return sets_P, np.repeat(ids, [len(sets) for sets in holding])

    def shared(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compare a set with all training sets.

        Args:
            ids: its genes, each once.

        Returns:
            [sets] int64, the genes that each holds of it; and [sets] float64, the Jaccard to each.
        """
        shared = np.bincount(self.postings(ids)[0], minlength=len(self))
        # An empty set is unlike all; no training set is empty.
        return shared, shared / (len(ids) + self.lengths - shared)

    def best_jaccard(self, sets: Sequence[np.ndarray], advance: Advance) -> np.ndarray:
        """Return [n] float64, the largest Jaccard of each of n sets to a training set.

        Genes outside the vocabulary are left out: training sets lost theirs when they were prepared, so that an exact
        copy of one would look unlike it.

        Args:
            sets: the genes of whole sets, not of masked ones.
            advance: told 1 after each set.
        """
        best = np.zeros(len(sets))
        for place, ids in enumerate(sets):
            best[place] = self.shared(ids)[1].max(initial=0)
            advance(1)
        return best
