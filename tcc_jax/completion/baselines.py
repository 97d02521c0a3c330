"""What a model must beat: random genes, popular genes, and the genes of the most similar training sets.

Each is a `ranker.Scorer`, so that it runs over the same masks and metrics as the model.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse

from tcc_jax.completion.cache import Arrays, cached
from tcc_jax.completion.ranker import Scorer
from tcc_jax.completion.sets import training_sets
from tcc_jax.completion.tuning import mean_recall, validation_masks
from tcc_jax.corpus.similarity import Sets
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.terminal import progress

NEIGHBOURS = (100, 500, 2000, 20_000)
POWERS = (1.0, 2.0, 3.0, 4.0, 6.0)
TUNING_SETS = 200
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
        train = training_sets(corpus)
        shape = (len(train), corpus.vocabulary.size)
        self._members = scipy.sparse.csr_array(
            (np.ones(len(train.tokens), np.float32), train.tokens, train.offsets), shape=shape
        )
        self._idf_V = np.log(len(train) / np.maximum(corpus.vocabulary.counts, 1)).astype(np.float32)
        weights = self._idf_V[train.tokens]
        norms = np.sqrt(train.sum(weights.astype(np.float64) ** 2))
        weights /= np.repeat(np.maximum(norms, 1e-9), train.lengths).astype(np.float32)
        # By gene: the sets that hold it, so that a query touches only the sets that share a gene with it.
        self._sets_by_gene = scipy.sparse.csr_array((weights, train.tokens, train.offsets), shape=shape).T.tocsr()

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`."""
        return self.scores(visible, (self.neighbours,), self.power)[0]

    def scores(self, visible: Sequence[np.ndarray], neighbours: Sequence[int], power: float) -> list[np.ndarray]:
        """Score [n, V] float32 for each of several ascending numbers of neighbours, whose votes are shared."""
        parts = [
            self._scores(visible[start : start + _QUERIES_AT_ONCE], neighbours, power)
            for start in range(0, len(visible), _QUERIES_AT_ONCE)
        ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _scores(self, visible: Sequence[np.ndarray], neighbours: Sequence[int], power: float) -> list[np.ndarray]:
        queries = Sets(
            np.concatenate([*visible, np.empty(0, np.int32)]).astype(np.int32),
            np.concatenate([[0], np.cumsum([len(ids) for ids in visible])]).astype(np.int64),
        )
        weights = self._idf_V[queries.tokens]
        norms = np.sqrt(queries.sum(weights.astype(np.float64) ** 2))
        weights /= np.repeat(np.maximum(norms, 1e-9), queries.lengths).astype(np.float32)
        shape = (len(queries), self._members.shape[1])
        query_matrix = scipy.sparse.csr_array((weights, queries.tokens, queries.offsets), shape=shape)
        similarities = (query_matrix @ self._sets_by_gene).tocsr()
        similarities.sort_indices()
        total = np.zeros(shape, np.float32)
        scores, fewer = [], 0
        for count in neighbours:
            total = total + self._votes(similarities, fewer, count, power)
            scores.append(total)
            fewer = count
        return scores

    def _votes(self, similarities: scipy.sparse.csr_array, first: int, last: int, power: float) -> np.ndarray:
        nearest, offsets = [], [0]
        for start, stop in zip(similarities.indptr[:-1], similarities.indptr[1:], strict=True):
            row = np.arange(start, stop)
            if first or len(row) > last:
                cuts = [cut for cut in (first, last) if cut < len(row)]
                order = np.argpartition(-similarities.data[start:stop], cuts) if cuts else np.arange(len(row))
                row = np.sort(row[order[first:last]])
            nearest.append(row)
            offsets.append(offsets[-1] + len(row))
        kept = np.concatenate(nearest)
        votes = scipy.sparse.csr_array(
            (similarities.data[kept] ** power, similarities.indices[kept], offsets), shape=similarities.shape
        )
        return (votes @ self._members).toarray()


def tuned_neighbours(corpus: Corpus, folder: str | Path) -> SetNeighbours:
    """Return set-kNN with the power and the number of neighbours that do best on the corpus's validation split.

    Best is the highest mean recall at the hidden count, with a random 20 % of up to `TUNING_SETS` validation sets
    visible, over all pairs of `NEIGHBOURS` and `POWERS`. The choice is kept in `folder`, by the corpus hash. With no
    validation set that has two genes the defaults stay.
    """
    scorer = SetNeighbours(corpus)
    settings = {
        "version": 1, "corpus": corpus.hash, "neighbours": NEIGHBOURS, "powers": POWERS, "sets": TUNING_SETS
    }  # fmt: skip
    chosen = cached(folder, "set-knn", settings, lambda: _tune(scorer, corpus))
    scorer.neighbours, scorer.power = int(chosen["neighbours"]), float(chosen["power"])
    return scorer


def _tune(scorer: SetNeighbours, corpus: Corpus) -> Arrays:
    masked = validation_masks(corpus, TUNING_SETS)
    best = (-1.0, scorer.neighbours, scorer.power)
    with progress("tuning set-kNN on the validation sets", len(POWERS) * len(masked)) as advance:
        for power in POWERS if masked else ():
            # The votes of few neighbours are a part of those of many.
            scores = scorer.scores([one.visible for one in masked], NEIGHBOURS, power)
            for count, scores_BV in zip(NEIGHBOURS, scores, strict=True):
                best = max(best, (mean_recall(scores_BV, masked), count, power))
            advance(len(masked))
    return {"recall": np.array(best[0]), "neighbours": np.array(best[1]), "power": np.array(best[2])}
