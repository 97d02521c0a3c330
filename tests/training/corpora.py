"""Small corpora on disk, for tests of training."""

import numpy as np

from tcc_jax.corpus.store import Corpus, write_corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, SPECIAL_SYMBOLS, Vocabulary


def write_small_corpus(folder, num_sets=60, num_genes=40, seed=0):
    """Write a corpus of random gene sets; every tenth set is for validation, every eleventh for testing."""
    random = np.random.default_rng(seed)
    sets = [
        random.choice(np.arange(NUM_SPECIAL, NUM_SPECIAL + num_genes), int(random.integers(5, 14)), replace=False)
        for _ in range(num_sets)
    ]
    splits = np.array([1 if i % 10 == 9 else 2 if i % 11 == 10 else 0 for i in range(num_sets)], np.uint8)
    counts = np.zeros(NUM_SPECIAL + num_genes, np.int64)
    for genes, split in zip(sets, splits, strict=True):
        if split == 0:
            counts[genes] += 1
    symbols = (*SPECIAL_SYMBOLS, *(f"GENE{seed}{index}" for index in range(num_genes)))
    corpus = Corpus(
        path=folder,
        meta={},
        vocabulary=Vocabulary(symbols, tuple("" for _ in symbols), counts),
        names=[f"set{index}" for index in range(num_sets)],
        libraries=["made"] * num_sets,
        other_names=[[] for _ in sets],
        splits=splits,
        clusters=np.arange(num_sets),
        tokens=np.concatenate(sets),
        offsets=np.cumsum([0, *map(len, sets)]),
    )
    folder.mkdir()
    write_corpus(folder, corpus)
    return folder
