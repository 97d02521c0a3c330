"""Spectral vectors: against a dense decomposition, and what has none."""

import numpy as np

from tcc_jax.corpus.spectral import spectral_vectors
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.corpus.corpora import make_corpus


def dense_vectors(corpus, width):
    graph = np.zeros((corpus.num_sets, corpus.vocabulary.size))
    for index in corpus.indices("train"):
        graph[index, corpus.genes(index)] = 1
    counts, lengths = graph.sum(0), graph.sum(1)
    scaled = graph / np.sqrt(np.outer(np.maximum(lengths, 1), np.maximum(counts, 1)))
    vectors = np.linalg.svd(scaled)[2][:width].T * (counts > 0)[:, None]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1), counts


def test_they_are_those_of_a_dense_decomposition(tmp_path):
    corpus = make_corpus(tmp_path)
    expected, counts = dense_vectors(corpus, 12)
    vectors = spectral_vectors(corpus, 12)
    assert vectors.dtype == np.float32 and vectors.shape == (corpus.vocabulary.size, 12)
    # Singular vectors have no sign and no order among equals: products do not show either.
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), counts > 0, atol=1e-5)
    assert not vectors[:NUM_SPECIAL].any()
    np.testing.assert_array_equal(vectors, spectral_vectors(corpus, 12))


def test_a_small_corpus_gives_fewer_coordinates(tmp_path):
    corpus = make_corpus(tmp_path)
    vectors = spectral_vectors(corpus, 4096)
    given = min(len(corpus.indices("train")), corpus.vocabulary.size) - 1
    assert vectors[:, :given].any(axis=0).all()
    assert not vectors[:, given:].any()
