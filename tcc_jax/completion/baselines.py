"""What a model must beat: random genes, popular genes, and the genes of the most similar training sets.

Each is a `ranker.Scorer`, so that it runs over the same masks and metrics as the model.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from tcc_jax.completion.ranker import Scorer
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import Vocabulary

# Queries compared with the training sets at once; against 350,000 sets the similarities of 32 take at most 135 MB.
_QUERIES_AT_ONCE = 32


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
        corpus: the prepared corpus.
        neighbours: training sets that count, at most.
        power: exponent of the similarity.
    """

    def __init__(self, corpus: Corpus, neighbours: int = 500, power: float = 3.0) -> None:
        self.neighbours, self.power = neighbours, power
        train = corpus.indices("train")
        lengths = corpus.lengths[train]
        genes = np.empty(int(lengths.sum()), np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for row, index in enumerate(train):
            genes[offsets[row] : offsets[row + 1]] = corpus.genes(index)
        shape = (len(train), corpus.vocabulary.size)
        self._members = scipy.sparse.csr_array((np.ones(len(genes), np.float32), genes, offsets), shape=shape)
        self._idf_V = np.log(len(train) / np.maximum(corpus.vocabulary.counts, 1)).astype(np.float32)
        weights = self._idf_V[genes]
        squares = np.add.reduceat(weights**2, offsets[:-1]) if len(train) else np.empty(0, np.float32)
        weights /= np.repeat(np.maximum(np.sqrt(squares), 1e-9), lengths)
        # By gene: the sets that hold it, so that a query touches only the sets that share a gene with it.
        self._sets_by_gene = scipy.sparse.csr_array((weights, genes, offsets), shape=shape).T.tocsr()

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`."""
        chunks = range(0, len(visible), _QUERIES_AT_ONCE)
        return np.concatenate([self._scores(visible[start : start + _QUERIES_AT_ONCE]) for start in chunks])

    def _scores(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        genes = np.concatenate(visible)
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in visible])])
        weights = self._idf_V[genes]
        weights /= np.repeat([max(np.linalg.norm(self._idf_V[ids]), 1e-9) for ids in visible], np.diff(offsets))
        queries = scipy.sparse.csr_array((weights, genes, offsets), shape=(len(visible), self._members.shape[1]))
        similarities = (queries @ self._sets_by_gene).tocsr()
        similarities.sort_indices()
        nearest, nearest_offsets = [], [0]
        for start, stop in zip(similarities.indptr[:-1], similarities.indptr[1:], strict=True):
            row = np.arange(start, stop)
            if len(row) > self.neighbours:
                row = np.sort(row[np.argpartition(-similarities.data[start:stop], self.neighbours)[: self.neighbours]])
            nearest.append(row)
            nearest_offsets.append(nearest_offsets[-1] + len(row))
        kept = np.concatenate(nearest)
        votes = scipy.sparse.csr_array(
            (similarities.data[kept] ** self.power, similarities.indices[kept], nearest_offsets),
            shape=similarities.shape,
        )
        return (votes @ self._members).toarray()
