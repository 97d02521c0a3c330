"""A corpus made of random numbers, of the shape of the real one: benchmarks need no files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, SPECIAL_SYMBOLS, Vocabulary

# Genes in a set, as in 384,497 sets of public libraries: half have up to 100, the mean is 125 to 130.
_MEDIAN, _MEAN = 100, 130
_SHORTEST, _LONGEST = 5, 2000

SMALLEST_VOCABULARY = NUM_SPECIAL + 8 * _SHORTEST


def synthetic_corpus(vocabulary_size: int, num_sets: int, seed: int = 0) -> Corpus:
    """Return a corpus in memory, all of it for training: a pure function of its arguments.

    Lengths are log-normal with median 100 and mean 130, cut to 5 to 2,000 and to an eighth of the genes; the gene with
    the r-th lowest id is drawn in proportion to r^(-1/3), none twice in a set.

    Args:
        vocabulary_size: V, the 16 special ids included; at least `SMALLEST_VOCABULARY`.
        num_sets: gene sets.
        seed: decides lengths and genes.
    """
    random = np.random.default_rng(seed)
    num_genes = vocabulary_size - NUM_SPECIAL
    sigma = np.sqrt(2 * np.log(_MEAN / _MEDIAN))
    lengths = np.exp(random.normal(np.log(_MEDIAN), sigma, num_sets))
    lengths = np.clip(lengths.astype(np.int64), _SHORTEST, min(_LONGEST, num_genes // 8))
    genes, offsets = _distinct_genes(random, lengths, num_genes)
    symbols = (*SPECIAL_SYMBOLS, *(f"GENE{number}" for number in range(num_genes)))
    counts = np.bincount(genes, minlength=num_genes)
    return Corpus(
        path=Path("synthetic"),
        meta={"corpus_hash": f"synthetic-{vocabulary_size}-{num_sets}-{seed}"},
        vocabulary=Vocabulary(symbols, ("",) * vocabulary_size, np.append(np.zeros(NUM_SPECIAL, np.int64), counts)),
        names=[f"set{number}" for number in range(num_sets)],
        libraries=["synthetic"] * num_sets,
        other_names=[[]] * num_sets,
        splits=np.zeros(num_sets, np.uint8),
        clusters=np.arange(num_sets),
        tokens=(NUM_SPECIAL + genes).astype(np.uint16 if vocabulary_size <= 2**16 else np.uint32),
        offsets=offsets,
    )


def _distinct_genes(random: np.random.Generator, lengths: np.ndarray, num_genes: int) -> tuple[np.ndarray, np.ndarray]:
    # More than are needed, since those drawn twice fall away; then as many as are needed of the rest, at random.
    drawn = lengths + lengths // 4 + 8
    owners = np.repeat(np.arange(len(lengths)), drawn)
    genes = (num_genes * random.random(len(owners)) ** 1.5).astype(np.int64)
    mentions = np.sort(owners * num_genes + genes)
    mentions = mentions[np.diff(mentions, prepend=-1) > 0]
    # Owners in the high bits: one sort shuffles every set within itself.
    owners = mentions // num_genes
    order = np.argsort((owners << 32) | random.integers(2**32, size=len(owners)))
    owners, genes = owners[order], mentions[order] % num_genes
    starts = np.searchsorted(owners, np.arange(len(lengths)))
    kept = np.arange(len(owners)) - starts[owners] < lengths[owners]
    return genes[kept], np.append(0, np.cumsum(np.bincount(owners[kept], minlength=len(lengths))))
