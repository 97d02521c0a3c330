"""What any method must beat by far: popular genes, and random ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from tcc_jax.baselines import Scorer
from tcc_jax.corpus.vocabulary import Vocabulary


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
