"""Vectors of the genes from the training sets alone: genes that share sets point the same way, before any training."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg

from tcc_jax.corpus.similarity import training_sets
from tcc_jax.corpus.store import Corpus


def spectral_vectors(corpus: Corpus, width: int) -> np.ndarray:
    """Return unit vectors of the genes whose products tell how near they are in the graph of sets and genes.

    The bipartite graph is spread evenly over sets and genes (each mention weighs 1 / sqrt(set length x gene count));
    the leading right singular vectors, one coordinate each, are scaled to length 1 by gene: the co-clustering of
    Dhillon (KDD 2001) with the rows of Ng, Jordan & Weiss (NIPS 2002).

    Args:
        corpus: the prepared corpus; only its training sets count.
        width: D, coordinates of a vector. A small corpus has fewer to give; the others are then 0.

    Returns:
        [V, D] float32; zeros for special ids and for genes that no training set holds. The same on every call on one
        machine.
    """
    train, size = training_sets(corpus), corpus.vocabulary.size
    counts_V = np.bincount(train.tokens, minlength=size)
    weights = 1 / np.sqrt(np.repeat(train.lengths, train.lengths) * counts_V[train.tokens])
    graph = train.matrix(size, weights.astype(np.float32))
    count = min(width, min(graph.shape) - 1)
    vectors_VD = np.zeros((size, width), np.float32)
    if count > 0:
        start = np.ones(min(graph.shape), np.float32)
        vectors_VD[:, :count] = scipy.sparse.linalg.svds(graph, k=count, v0=start)[2].T
    vectors_VD[counts_V == 0] = 0
    norms_V1 = np.linalg.norm(vectors_VD, axis=1, keepdims=True)
    return np.divide(vectors_VD, norms_V1, out=vectors_VD, where=norms_V1 > 0)
