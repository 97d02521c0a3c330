"""The protocol of an evaluation: hide most of each set, draw as many genes as were hidden, test the overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tcc_jax.completion.overlap import benjamini_hochberg, log_fisher_greater
from tcc_jax.completion.ranker import Scorer, rank
from tcc_jax.completion.sets import KnownSet

_RESAMPLES = 2000


@dataclass(frozen=True)
class MaskedSet:
    """A set with most of its genes hidden.

    Attributes:
        name: the set's name.
        library: the library it comes from.
        outside: genes of the set that are not in the vocabulary; they are neither visible nor hidden.
        visible: int32 ids shown to the model, in random order.
        hidden: int32 ids to be found.
    """

    name: str
    library: str
    outside: int
    visible: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What one method drew, and how well it overlaps with the hidden genes; arrays have one value a set.

    Attributes:
        method: its name.
        drawn: int32 ids drawn, best first.
        hits: int64, drawn genes that are hidden genes.
        recall: float64, hits over hidden genes.
        log_p: float64, natural log of the one-sided Fisher p.
        log_adjusted_p: float64, the same after Benjamini-Hochberg over all sets.
    """

    method: str
    drawn: list[np.ndarray]
    hits: np.ndarray
    recall: np.ndarray
    log_p: np.ndarray
    log_adjusted_p: np.ndarray

    def significant(self, alpha: float) -> np.ndarray:
        """Return [sets] bool: adjusted p at most `alpha`."""
        return self.log_adjusted_p <= math.log(alpha)


def mask_sets(
    sets: Sequence[KnownSet], visible_share: float = 0.2, seed: int = 0
) -> tuple[list[MaskedSet], list[tuple[KnownSet, str]]]:
    """Hide genes of each set.

    Of the L genes in the vocabulary max(1, round(visible_share x L)) stay visible, at least one is hidden. Which ones
    depends on the seed and the set's place in `sets`, not on the other sets.

    Returns:
        The masked sets in order, and the sets that can't be evaluated, each with the reason.
    """
    masked, skipped = [], []
    for index, known in enumerate(sets):
        length = len(known.ids)
        if length < 2:
            reason = f"{length} of its {length + known.outside} genes in the vocabulary; 2 are needed"
            skipped.append((known, reason))
            continue
        order = np.random.default_rng([seed, index]).permutation(known.ids)
        cut = min(max(1, round(visible_share * length)), length - 1)
        masked.append(MaskedSet(known.name, known.library, known.outside, order[:cut], order[cut:]))
    return masked, skipped


def run_method(
    method: str,
    scorer: Scorer,
    sets: Sequence[MaskedSet],
    num_genes: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Complete every set with one method and test the overlap.

    As many genes are drawn as were hidden. The universe of the test is the vocabulary's genes minus the visible ones:
    whatever could have been drawn.

    Args:
        method: name in reports.
        scorer: the model or a baseline.
        sets: what to complete.
        num_genes: genes in the vocabulary, special ids not counted.
        advance: called with the number of sets just done.
    """
    counts = [len(masked.hidden) for masked in sets]
    drawn, _ = rank(scorer, [masked.visible for masked in sets], counts, advance)
    hits = np.array([np.isin(ids, masked.hidden).sum() for ids, masked in zip(drawn, sets, strict=True)], np.int64)
    hidden = np.array(counts, np.int64)
    universe = num_genes - np.array([len(masked.visible) for masked in sets])
    log_p = log_fisher_greater(*(jnp.asarray(x, jnp.int32) for x in (hits, hidden, hidden, universe)))
    adjusted = benjamini_hochberg(log_p)
    return Outcome(method, drawn, hits, hits / hidden, np.asarray(log_p, np.float64), np.asarray(adjusted, np.float64))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean over sets (Efron 1979), 2,000 seeded resamples."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
