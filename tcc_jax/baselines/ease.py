"""EASE: a linear model of how often genes meet in training sets."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.linalg

from tcc_jax.baselines.cache import Arrays, cached, is_kept
from tcc_jax.corpus.similarity import Sets, training_sets
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.terminal import UserError, progress

_GENES_AT_ONCE = 500
_BYTES_A_PAIR, _ROUNDED = 12, 1000


class Ease:
    """H. Steck, "Embarrassingly shallow autoencoders for sparse data" (WWW 2019), over the most frequent genes.

    With X the training sets as rows, each scaled by 1 / sqrt(length), P = (X'X + penalty I)^-1 and B = I - P / diag(P):
    a gene's score is the sum of its weights from the visible genes. Genes outside the most frequent ones score below
    all others, by popularity. Fitting takes about 12 bytes x num_genes^2 of memory (2 GB at 13,000 genes), scoring 4.

    Args:
        corpus: the prepared corpus; its training sets are fitted.
        folder: where the weights are kept, by corpus hash and settings.
        num_genes: most frequent genes that are fitted, or as many of them as the memory that is free has room for.
        penalty: lambda, the weight of the squared weights.

    Attributes:
        num_genes: genes that were fitted.
        limited: whether memory made them fewer.

    Raises:
        UserError: the weights need more memory than there is, or the penalty is too small or large for 32 bits.
    """

    def __init__(self, corpus: Corpus, folder: str | Path, num_genes: int = 13_000, penalty: float = 20.0) -> None:
        self._size = corpus.vocabulary.size
        # Ids go by falling count: the most frequent genes are the first.
        wanted = min(num_genes, self._size - NUM_SPECIAL)
        settings = {"version": 1, "corpus": corpus.hash, "num_genes": wanted, "penalty": penalty}
        # What was fitted before needs a third of the memory.
        room = wanted if is_kept(folder, "ease", settings) else _room_for()
        self.num_genes, self.penalty, self.limited = min(wanted, room), penalty, room < wanted
        settings["num_genes"] = self.num_genes
        try:
            fitted = cached(folder, "ease", settings, lambda: _fit_ease(corpus, self.num_genes, penalty))
        except MemoryError:
            raise UserError(
                f"--ease-genes {num_genes}: not enough memory for {self.num_genes:,} genes; give fewer"
            ) from None
        self._weights_GG = fitted["weights"]

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `baselines.Scorer`."""
        known = [ids[ids < NUM_SPECIAL + self.num_genes] - NUM_SPECIAL for ids in visible]
        scores = np.empty((len(visible), self._size), np.float32)
        for row, genes in enumerate(known):
            fitted_G = self._weights_GG[genes].sum(0) if len(genes) else np.zeros(self.num_genes, np.float32)
            scores[row] = np.min(fitted_G) - 1
            scores[row, NUM_SPECIAL : NUM_SPECIAL + self.num_genes] = fitted_G
        return scores


def _room_for() -> int:
    # Asked beforehand: Linux gives out more memory than it has, and ends the process when it is used.
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize
    room = math.isqrt(free // _BYTES_A_PAIR)
    # Rounded, so that a little more or less memory the next time fits nothing anew.
    return max(1, room // _ROUNDED * _ROUNDED if room > _ROUNDED else room)


def _fit_ease(corpus: Corpus, num_genes: int, penalty: float) -> Arrays:
    train = training_sets(corpus)
    lengths = train.lengths
    kept = train.keep_mentions(train.tokens < NUM_SPECIAL + num_genes)
    gram_GG = _gram(Sets(kept.tokens - NUM_SPECIAL, kept.offsets), lengths, num_genes)
    gram_GG[np.diag_indices(num_genes)] += penalty
    with progress(f"fitting EASE: the inverse of {num_genes:,} x {num_genes:,} numbers"):
        factor_GG, info = scipy.linalg.lapack.spotrf(gram_GG, lower=True, overwrite_a=True)
        inverse_GG, _ = scipy.linalg.lapack.spotri(factor_GG, lower=True, overwrite_c=True)
    diagonal_G = np.diag(inverse_GG).copy()
    if info or not ((diagonal_G > 0) & np.isfinite(diagonal_G)).all():
        raise UserError(f"--ease-penalty {penalty:g}: no weights can be computed with it; give one nearer the default")
    # LAPACK leaves the result in one triangle, that of a Fortran array: mirror it without another matrix.
    for start in range(0, num_genes, _GENES_AT_ONCE):
        stop = start + _GENES_AT_ONCE
        inverse_GG[start:stop, stop:] = inverse_GG[stop:, start:stop].T
        block = inverse_GG[start:stop, start:stop]
        block[:] = np.tril(block) + np.tril(block, -1).T
    # One row for each visible gene: what it says of every other gene.
    inverse_GG /= -diagonal_G
    inverse_GG[np.diag_indices(num_genes)] = 0
    return {"weights": np.ascontiguousarray(inverse_GG)}


def _gram(sets: Sets, lengths: np.ndarray, num_genes: int) -> np.ndarray:
    scale = 1 / np.sqrt(np.repeat(lengths, sets.lengths))
    rows = sets.matrix(num_genes, scale.astype(np.float32))
    columns = rows.T.tocsr()
    gram_GG = np.empty((num_genes, num_genes), np.float32, order="F")
    with progress("fitting EASE: how often genes meet", num_genes) as advance:
        for start in range(0, num_genes, _GENES_AT_ONCE):
            block = (columns[start : start + _GENES_AT_ONCE] @ rows).toarray()
            # The matrix is symmetric; LAPACK works in place in Fortran order, where a block of columns lies together.
            gram_GG[:, start : start + _GENES_AT_ONCE] = block.T
            advance(len(block))
    return gram_GG
