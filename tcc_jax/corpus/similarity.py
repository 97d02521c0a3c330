"""How alike gene sets are: exact Jaccard by sparse products, near-duplicate clusters by MinHash and exact checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from tcc_jax.corpus.store import SPLITS, Corpus

LEAK_LEVELS = (0.3, 0.5, 0.9)
_QUERIES_AT_ONCE = 64
_MISSED_PAIRS = 0.008
_HASHES_AT_MOST = 400
_PAIRS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Sets:
    """Many gene sets in two flat arrays.

    Attributes:
        tokens: flat gene numbers, int32, each once within a set.
        offsets: [sets + 1] int64; set i holds tokens[offsets[i] : offsets[i + 1]].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Return the number of sets."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[sets] int64, genes in each set."""
        return np.diff(self.offsets)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return [sets] sums of per-mention values (integers wrap around; empty sets give 0)."""
        total = np.zeros(len(values) + 1, values.dtype if values.dtype != bool else np.int64)
        np.cumsum(values, out=total[1:])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def select(self, sets: np.ndarray) -> Sets:
        """Return the sets of a boolean mask [sets], in order."""
        lengths = self.lengths
        return _from_lengths(self.tokens[np.repeat(sets, lengths)], lengths[sets])

    def keep_mentions(self, mask: np.ndarray) -> Sets:
        """Return the same sets with only the mentions of a boolean mask [mentions]; sets may become empty."""
        return _from_lengths(self.tokens[mask], self.sum(mask))

    def matrix(self, num_genes: int, values: np.ndarray | None = None) -> scipy.sparse.csr_array:
        """Return a [sets, num_genes] matrix of per-mention values; without any, the int32 incidence matrix."""
        values = np.ones(len(self.tokens), np.int32) if values is None else values
        # Where 32 bits can count the mentions, the columns keep theirs too: SciPy takes one type for both.
        offsets = self.offsets.astype(np.int32) if len(self.tokens) < 2**31 else self.offsets
        return scipy.sparse.csr_array((values, self.tokens, offsets), shape=(len(self), num_genes))


def training_sets(corpus: Corpus) -> Sets:
    """Return the training sets of a corpus as int32 ids, in memory: 4 bytes a mention."""
    train = Sets(corpus.tokens, corpus.offsets).select(corpus.splits == SPLITS.index("train"))
    return Sets(train.tokens.astype(np.int32), train.offsets)


def join_sets(sets: Sequence[np.ndarray]) -> Sets:
    """Return sets given one by one, as arrays of gene numbers, in two flat arrays."""
    return _from_lengths(np.concatenate([*sets, np.empty(0, np.int32)]).astype(np.int32), [len(one) for one in sets])


def _from_lengths(tokens: np.ndarray, lengths: np.ndarray | list[int]) -> Sets:
    return Sets(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def nearest(
    queries: Sets, targets: Sets, num_genes: int, limit: float, advance: Callable[[int], None] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
    """Compare all queries with all targets, exactly.

    Args:
        queries: the smaller side.
        targets: the larger side.
        num_genes: gene numbers lie below it.
        limit: Jaccard from which a target counts as over.
        advance: told the number of queries just done.

    Returns:
        [queries] float64, the largest Jaccard of each query to any target, and [targets] bool, whether a target reaches
        the limit with any query.

    Memory: beside the incidence matrices, a few numbers for each of 64 x len(targets) pairs that share a gene.
    """
    best = np.zeros(len(queries))
    over = np.zeros(len(targets), bool)
    if not len(queries) or not len(targets):
        return best, over
    query_matrix, by_gene = queries.matrix(num_genes), targets.matrix(num_genes).T.tocsr()
    query_lengths, target_lengths = queries.lengths.astype(np.int32), targets.lengths.astype(np.int32)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        stop = min(start + _QUERIES_AT_ONCE, len(queries))
        shared = (query_matrix[start:stop] @ by_gene).tocsr()
        sizes = np.repeat(query_lengths[start:stop], np.diff(shared.indptr))
        sizes += target_lengths[shared.indices]
        sizes -= shared.data
        # A quotient is rounded as its limit was, so that 14 shared of 25 reach 0.56; the product 0.56 * 25 exceeds 14.
        jaccard = shared.data / sizes
        over[shared.indices[jaccard >= limit]] = True
        filled = np.diff(shared.indptr) > 0
        best[start:stop][filled] = np.maximum.reduceat(jaccard, shared.indptr[:-1][filled])
        advance(stop - start)
    return best, over


def leak_counts(best: np.ndarray) -> dict[str, Any]:
    """Return JSON values: how many sets there are, and how many have their largest Jaccard at each of `LEAK_LEVELS`.

    Args:
        best: [sets] the largest Jaccard of each set to a training set, from `nearest`.
    """
    levels = {f"{level:g}": int(np.count_nonzero(best >= level)) for level in LEAK_LEVELS}
    return {"sets": len(best), "with_training_set_at_jaccard": levels}


def near_duplicate_clusters(
    sets: Sets, num_genes: int, limit: float, seed: int, advance: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """Group sets so that near-duplicates, directly or through others, share a cluster.

    MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) proposes
    pairs, each is checked exactly, and clusters are the connected components. At Jaccard = `limit` a pair is proposed
    with a probability of at least 99 %, above it with more.

    Args:
        sets: no empty ones.
        num_genes: gene numbers lie below it.
        limit: Jaccard from which two sets belong together.
        seed: of the random permutations of the genes.
        advance: told 1 after each band; there are `num_bands(limit)[0]` of them.

    Returns:
        [sets] int64 labels from 0, in the order of each cluster's first set.
    """
    bands, rows = num_bands(limit)
    random = np.random.default_rng(seed)
    lengths = sets.lengths
    labels = np.arange(len(sets))
    for _ in range(bands):
        keys = np.zeros(len(sets), np.uint64)
        for _ in range(rows):
            rank = random.permutation(num_genes).astype(np.uint16 if num_genes <= 2**16 else np.uint32)
            smallest = np.minimum.reduceat(rank[sets.tokens], sets.offsets[:-1])
            # Mixed rather than concatenated, so that any number of rows fits; a clash only adds a pair to check.
            keys = (keys ^ smallest.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        sizes = np.diff(starts, append=len(order))
        # First each bucket's first set with the others: where that already joins a bucket, its other pairs need no
        # check, so that thousands of copies of one set cost no more than their number.
        leaders = np.repeat(order[starts], sizes)
        labels = _join(sets, lengths, labels, leaders, order, limit)
        ordered = labels[order]
        mixed = np.minimum.reduceat(ordered, starts) != np.maximum.reduceat(ordered, starts)
        buckets = [order[start + 1 : start + size] for start, size in zip(starts[mixed], sizes[mixed], strict=True)]
        for left, right in _pairs(buckets, labels):
            labels = _join(sets, lengths, labels, left, right, limit)
        advance(1)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def num_bands(limit: float) -> tuple[int, int]:
    """Return (bands, rows a band): the most selective layout within 400 hashes that finds 99 % of pairs at `limit`."""
    best = (1, 1)
    for rows in range(1, 17):
        bands = math.ceil(math.log(_MISSED_PAIRS) / math.log1p(-(limit**rows))) if limit < 1 else 1
        if bands * rows <= _HASHES_AT_MOST or rows == 1:
            best = (bands, rows)
    return best


def _pairs(buckets: list[np.ndarray], labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for bucket in buckets:
        for first in range(len(bucket) - 1):
            others = bucket[first + 1 :]
            others = others[labels[others] != labels[bucket[first]]]
            pending.append((np.full(len(others), bucket[first]), others))
            count += len(others)
            if count > _PAIRS_AT_ONCE:
                yield _concatenate(pending)
                pending, count = [], 0
    if pending:
        yield _concatenate(pending)


def _concatenate(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([left for left, _ in pairs]), np.concatenate([right for _, right in pairs])


def _join(
    sets: Sets, lengths: np.ndarray, labels: np.ndarray, left: np.ndarray, right: np.ndarray, limit: float
) -> np.ndarray:
    small, large = np.minimum(lengths[left], lengths[right]), np.maximum(lengths[left], lengths[right])
    possible = (labels[left] != labels[right]) & (small / large >= limit)
    left, right = left[possible], right[possible]
    order = np.argsort(left, kind="stable")
    left, right = left[order], right[order]
    alike = _jaccard_reaches(sets, lengths, left, right, limit)
    edges = (np.ones(np.count_nonzero(alike)), (labels[left[alike]], labels[right[alike]]))
    graph = scipy.sparse.coo_array(edges, shape=(len(labels), len(labels)))
    return connected_components(graph, directed=False)[1][labels]


def _jaccard_reaches(sets: Sets, lengths: np.ndarray, left: np.ndarray, right: np.ndarray, limit: float) -> np.ndarray:
    """Exact, for pairs sorted by `left`: marks the genes of each left set and counts them in its partners."""
    result = np.zeros(len(left), bool)
    if not len(left):
        return result
    mark = np.zeros(int(sets.tokens.max()) + 1, bool)
    starts = np.flatnonzero(np.diff(left, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(left)), strict=True):
        first = left[start]
        genes = sets.tokens[sets.offsets[first] : sets.offsets[first + 1]]
        mark[genes] = True
        for pair in range(start, stop):
            other = right[pair]
            shared = np.count_nonzero(mark[sets.tokens[sets.offsets[other] : sets.offsets[other + 1]]])
            result[pair] = shared / (lengths[first] + lengths[other] - shared) >= limit
        mark[genes] = False
    return result
