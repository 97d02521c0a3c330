"""Packed rows made by hand, for tests of the model and of training."""

import numpy as np

from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL, START


def pack(rows, length, num_segments):
    """Pack rows of segments, each a list of gene ids or a tuple of them (cut off: no <end>), into a batch."""
    shape = (len(rows), length)
    batch = {"tokens": np.zeros(shape, np.int32), "segments": np.zeros(shape, np.int32)}
    batch |= {name: np.zeros((len(rows), num_segments), np.int32) for name in ("starts", "gene_counts")}
    for row, segments in enumerate(rows):
        column = 0
        for slot, genes in enumerate(segments):
            tokens = [START, *genes] + ([END] if isinstance(genes, list) else [])
            batch["tokens"][row, column : column + len(tokens)] = tokens
            batch["segments"][row, column : column + len(tokens)] = slot + 1
            batch["starts"][row, slot], batch["gene_counts"][row, slot] = column, len(genes)
            column += len(tokens)
    return batch


def random_rows(seed, num_rows, length, vocabulary_size, longest=7):
    """Return rows of random segments that fill most of `length`; the last segment of odd rows is cut off."""
    random = np.random.default_rng(seed)
    rows = []
    for row in range(num_rows):
        segments, used = [], 0
        while used + longest + 2 <= length:
            size = int(random.integers(1, longest + 1))
            genes = random.choice(np.arange(NUM_SPECIAL, vocabulary_size), size, replace=False).tolist()
            segments.append(genes)
            used += size + 2
        if row % 2:
            segments[-1] = tuple(segments[-1])
        rows.append(segments)
    return rows
