"""The vectors of the spectral start by products on an accelerator, for the time to quality.

`tcc_jax.corpus.spectral.spectral_vectors` asks ARPACK, one vector after the other, on one core for the most part: many
minutes at width 1024 on the full corpus. Here whole blocks are multiplied: subspace iteration (Halko, Martinsson &
Tropp 2011) on a few more vectors than are wanted. The vectors span nearly the same space, and their products, which is
all that the start uses, come out nearly the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tcc_jax.corpus.similarity import training_sets
from tcc_jax.corpus.store import Corpus

ITERATIONS = 12
_OVERSAMPLING = 1.1
_SETS_AT_ONCE = 4096


def device_vectors(corpus: Corpus, width: int, iterations: int = ITERATIONS) -> np.ndarray:
    """Return what `spectral_vectors` returns, nearly; a rotation apart, which no product of two vectors shows.

    Args:
        corpus: the prepared corpus; only its training sets count.
        width: D, coordinates of a vector. A small corpus has fewer to give; the others are then 0.
        iterations: products with the graph.
    """
    train, size = training_sets(corpus), corpus.vocabulary.size
    counts_V = np.bincount(train.tokens, minlength=size)
    count = min(width, len(train) - 1, size - 1)
    columns = min(int(_OVERSAMPLING * count) + 8, len(train), size)
    weights = 1 / np.sqrt(np.repeat(train.lengths, train.lengths) * counts_V[train.tokens])
    # Chunks of sets, each with as many mentions as the largest; those that are added weigh nothing.
    chunk = np.repeat(np.arange(len(train)), train.lengths) // _SETS_AT_ONCE
    firsts = np.searchsorted(chunk, np.arange(chunk[-1] + 2))
    place = np.arange(len(chunk)) - firsts[chunk]
    shape = (chunk[-1] + 1, int(np.diff(firsts).max()))
    rows, genes, values = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    rows[chunk, place] = np.repeat(np.arange(len(train)), train.lengths) % _SETS_AT_ONCE
    genes[chunk, place] = train.tokens
    values[chunk, place] = weights
    vectors_VD = np.zeros((size, width), np.float32)
    vectors_VD[:, :count] = _top(size, columns, count, iterations, rows, genes, values)
    vectors_VD[counts_V == 0] = 0
    norms_V1 = np.linalg.norm(vectors_VD, axis=1, keepdims=True)
    return np.divide(vectors_VD, norms_V1, out=vectors_VD, where=norms_V1 > 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _top(
    size: int, columns: int, count: int, iterations: int, rows: jax.Array, genes: jax.Array, values: jax.Array
) -> jax.Array:
    """Return the leading right singular vectors [V, count] of the matrix whose entries are given in chunks of rows."""
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def squared(q_VK: jax.Array) -> jax.Array:
        def add(sum_VK: jax.Array, entries: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            row, gene, value = entries
            part_SV = jnp.zeros((_SETS_AT_ONCE, size), jnp.float32).at[row, gene].add(value)
            return sum_VK + product(part_SV.T, product(part_SV, q_VK)), None

        return jax.lax.scan(add, jnp.zeros_like(q_VK), (rows, genes, values))[0]

    q_VK = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (size, columns)))[0]
    q_VK = jax.lax.fori_loop(0, iterations, lambda _, q_VK: jnp.linalg.qr(squared(q_VK))[0], q_VK)
    _, vectors_KK = jnp.linalg.eigh(product(q_VK.T, squared(q_VK)))
    return product(q_VK, vectors_KK[:, ::-1][:, :count])
