"""Run a method over masked sets: ranks of the hidden genes, metrics from ranks, tests, intervals and comparisons."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats

from tcc_jax.baselines import Scorer
from tcc_jax.completion.masks import MaskedSet
from tcc_jax.completion.overlap import benjamini_hochberg, log_fisher_greater
from tcc_jax.completion.ranker import batched, best_ids, num_candidates, rank_keys, ranks_of, recall_among

CUTS = (10, 50, 100)
METRICS = (
    "hits",
    "recall",
    "precision",
    *(f"recall_at_{cut}" for cut in CUTS),
    *(f"precision_at_{cut}" for cut in CUTS),
    "recall_at_hidden",
    "precision_at_hidden",
    "ndcg_at_100",
    "average_precision",
    "reciprocal_rank",
    "auroc",
)
RESAMPLES = 2000
# Sets scored at once: scores [128, V] float32 and their keys, int64, take 55 MB at 35,700 symbols.
_BATCH = 128
_RESAMPLES_AT_ONCE = 100
_BINS_PER_DECADE = 4
_LOW_DECADE, _HIGH_DECADE = -4, 3


@dataclass(frozen=True)
class Calibration:
    """How often genes of an expected number of hits (share x hidden count) are hidden, by bins of it.

    Attributes:
        expected: [bins] float64, mean of the expected number in the bin.
        frequency: [bins] float64, share of the genes in the bin that are hidden.
        genes: [bins] int64, genes of all sets in the bin, none empty.
    """

    expected: np.ndarray
    frequency: np.ndarray
    genes: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What one method found; arrays have the shape [S, N] of seeds and sets, float64, and nan where undefined.

    Attributes:
        method: its name.
        metrics: by name, those of `METRICS`, `rare_recall` and, of a model, `nats_per_hidden_gene`.
        log_p: natural log of the one-sided Fisher p of the overlap.
        log_adjusted_p: the same after Benjamini-Hochberg over the sets of one seed.
        drawn: for the first seed, int32 ids drawn for each set, best first.
        calibration: of a model or mixture, for the first seed.
    """

    method: str
    metrics: dict[str, np.ndarray]
    log_p: np.ndarray
    log_adjusted_p: np.ndarray
    drawn: list[np.ndarray]
    calibration: Calibration | None = None

    def first_seed(self) -> Outcome:
        """Return what was found with the first seed alone."""
        metrics = {name: values_SN[:1] for name, values_SN in self.metrics.items()}
        return replace(self, metrics=metrics, log_p=self.log_p[:1], log_adjusted_p=self.log_adjusted_p[:1])

    def significant(self, alpha: float) -> np.ndarray:
        """Return [S, N] bool: adjusted p at most `alpha`."""
        return self.log_adjusted_p <= math.log(alpha)

    def per_set(self, metric: str) -> np.ndarray:
        """Return [N] float64, the metric averaged over the seeds; nan where no seed defines it."""
        values_SN = self.metrics[metric]
        defined_SN = np.isfinite(values_SN)
        return np.where(defined_SN, values_SN, 0).sum(0) / np.where(defined_SN.any(0), defined_SN.sum(0), np.nan)


def run_method(
    method: str,
    scorer: Scorer,
    trials: Sequence[Sequence[MaskedSet]],
    candidates_V: np.ndarray,
    rare_V: np.ndarray | None = None,
    is_model: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Complete every set with one method, rank the hidden genes and test the overlap.

    Args:
        method: name in reports.
        scorer: the model or a baseline.
        trials: for each seed the same sets, masked.
        candidates_V: [V] bool, ids that may be drawn.
        rare_V: [V] bool; `rare_recall` ranks these genes alone: of m hidden ones, the share among the m best of them.
        is_model: the scores are logits of a softmax over the genes, as of a model or mixture: nats and calibration are
            computed.
        advance: called with the number of sets just done.

    Raises:
        ValueError: a score is not a number.
    """
    shape = (len(trials), len(trials[0]))
    names = (*METRICS, "rare_recall", *(("nats_per_hidden_gene",) if is_model else ()))
    metrics = {name: np.full(shape, np.nan) for name in names}
    bins = _Bins() if is_model else None
    drawn: list[np.ndarray] = [np.empty(0, np.int32)] * shape[1]
    for seed, sets in enumerate(trials):
        # By length, so that prompts in a batch need about the same padding.
        order = sorted(range(len(sets)), key=lambda index: (len(sets[index].visible), index))
        for batch in batched(order, _BATCH):
            visible = [sets[index].visible for index in batch]
            scores_BV = np.array(scorer(visible), np.float32)
            keys_BV = rank_keys(scores_BV, visible, candidates_V)
            sorted_BV = _sorted(keys_BV)
            for row, index in enumerate(batch):
                masked, keys_V = sets[index], keys_BV[row]
                values = set_metrics(
                    ranks_of(sorted_BV[row], keys_V[masked.hidden]),
                    masked.hidden_count, masked.drawn_count, num_candidates(sorted_BV[row]),
                )  # fmt: skip
                for name, value in values.items():
                    metrics[name][seed, index] = value
                if rare_V is not None:
                    rare = masked.hidden[rare_V[masked.hidden]]
                    metrics["rare_recall"][seed, index] = recall_among(keys_V[rare_V], keys_V[rare])
                if seed == 0:
                    drawn[index] = best_ids(sorted_BV[row], masked.drawn_count)
                if bins is not None:
                    shares_C, log_shares_H = _shares(scores_BV[row], sorted_BV[row], masked.hidden)
                    if len(log_shares_H):
                        metrics["nats_per_hidden_gene"][seed, index] = -log_shares_H.mean()
                    if seed == 0:
                        bins.add(shares_C, np.exp(log_shares_H), len(masked.hidden))
            advance(len(batch))
    log_p, log_adjusted_p = _test(trials, metrics["hits"])
    return Outcome(method, metrics, log_p, log_adjusted_p, drawn, bins.calibration() if bins else None)


def bootstrap(values_NM: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % percentile bootstrap interval of the mean over sets (Efron 1979), 2,000 seeded resamples.

    Args:
        values_NM: float, M values for each of N sets; nan where a value is not defined, left out of the means.
        seed: of the resampling.

    Returns:
        low_M and high_M, float64; nan where no set defines the value.
    """
    values_NM = np.asarray(values_NM, np.float64)
    count, columns = values_NM.shape
    if not count:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    defined_NM = np.isfinite(values_NM)
    filled_NM = np.where(defined_NM, values_NM, 0)
    means = []
    for part_RN in _resamples(count, seed):
        times_RN = part_RN.astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((times_RN @ filled_NM) / (times_RN @ defined_NM))
    means_RM = np.concatenate(means)
    low_M, high_M = np.full((2, columns), np.nan)
    for column in np.flatnonzero(defined_NM.any(0)):
        low_M[column], high_M[column] = np.nanpercentile(means_RM[:, column], [2.5, 97.5])
    return low_M, high_M


@functools.lru_cache(maxsize=2)
def _resamples(count: int, seed: int) -> list[np.ndarray]:
    # How often each set is drawn, rather than which sets are: two products give all means at once. The same resamples
    # serve every method; a byte is enough, as a set is hardly ever drawn ten times.
    rng, shares = np.random.default_rng(seed), np.full(count, 1 / count)
    parts = [_RESAMPLES_AT_ONCE] * (RESAMPLES // _RESAMPLES_AT_ONCE)
    return [rng.multinomial(count, shares, part).astype(np.uint8) for part in parts]


def mean(values: np.ndarray) -> float:
    """Return the mean of what is defined; nan of nothing."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def compare(
    one: Outcome, other: Outcome, seed: int = 0, metric: str = "recall", chosen_N: np.ndarray | None = None
) -> dict[str, Any]:
    """Compare two methods set by set, the seeds averaged within a set.

    Args:
        one: a method.
        other: what it is compared with.
        seed: of the bootstrap.
        metric: which one; sets that do not define it are left out.
        chosen_N: [N] bool, the sets to compare; all unless given.

    Returns:
        JSON values: sets won, lost and tied by the first, the mean difference with its paired bootstrap 95 % interval,
        and the two-sided p of Wilcoxon's signed-rank test (1945; ties in sign left out), 1 where all sets are tied.
    """
    difference = one.per_set(metric) - other.per_set(metric)
    difference = difference[np.isfinite(difference) & (True if chosen_N is None else chosen_N)]
    # Averages over seeds differ in their last bits: those are ties.
    difference[np.abs(difference) < 1e-12] = 0
    (low,), (high,) = bootstrap(difference[:, None], seed)
    moved = bool(np.any(difference != 0))
    return {
        "method": one.method,
        "baseline": other.method,
        "metric": metric,
        "won": int((difference > 0).sum()),
        "lost": int((difference < 0).sum()),
        "tied": int((difference == 0).sum()),
        "difference": mean(difference),
        "difference_low": float(low),
        "difference_high": float(high),
        "wilcoxon_p": float(scipy.stats.wilcoxon(difference, zero_method="wilcox").pvalue) if moved else 1.0,
    }


def _test(trials: Sequence[Sequence[MaskedSet]], hits_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_p, adjusted = [], []
    for sets, hits_N in zip(trials, hits_SN, strict=True):
        tables = (hits_N, *np.array([(one.drawn_count, one.hidden_count, one.universe) for one in sets]).T)
        log_p.append(log_fisher_greater(*(jnp.asarray(column, jnp.int32) for column in tables)))
        adjusted.append(benjamini_hochberg(log_p[-1]))
    return np.array(log_p, np.float64), np.array(adjusted, np.float64)


def _sorted(keys_BV: np.ndarray) -> np.ndarray:
    sorted_BV = keys_BV.copy()
    # Most of the time after scoring; NumPy sorts outside the interpreter's lock.
    with ThreadPoolExecutor() as threads:
        list(threads.map(np.ndarray.sort, sorted_BV))
    return sorted_BV


def _shares(scores_V: np.ndarray, sorted_V: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores_C = scores_V[best_ids(sorted_V, num_candidates(sorted_V))].astype(np.float64)
    if not len(scores_C):
        return scores_C, np.empty(0)
    exponentials_C = np.exp(scores_C - scores_C[0])
    total = exponentials_C.sum()
    return exponentials_C / total, scores_V[hidden] - scores_C[0] - math.log(total)


class _Bins:
    def __init__(self) -> None:
        decades = np.arange(_LOW_DECADE * _BINS_PER_DECADE, _HIGH_DECADE * _BINS_PER_DECADE + 1)
        self._edges = 10.0 ** (decades / _BINS_PER_DECADE)
        self._genes, self._hits, self._expected = np.zeros((3, len(self._edges) + 1))

    def add(self, shares_C: np.ndarray, hidden_shares_H: np.ndarray, hidden_count: int) -> None:
        expected_C = shares_C * hidden_count
        # Descending shares: the bins are runs, so that their sums need no histogram of every gene.
        splits = np.searchsorted(-expected_C, -self._edges[::-1], side="right")
        bounds = np.concatenate([[0], splits, [len(expected_C)]])
        totals = np.concatenate([[0.0], np.cumsum(expected_C)])
        self._genes += np.diff(bounds)[::-1]
        self._expected += np.diff(totals[bounds])[::-1]
        places = np.searchsorted(self._edges, hidden_shares_H * hidden_count, side="right")
        self._hits += np.bincount(places, minlength=len(self._hits))

    def calibration(self) -> Calibration:
        filled = self._genes > 0
        genes = self._genes[filled]
        return Calibration(self._expected[filled] / genes, self._hits[filled] / genes, genes.astype(np.int64))


def set_metrics(ranks: np.ndarray, hidden_count: int, drawn_count: int, candidates: int) -> dict[str, float]:
    """Compute the metrics of one set.

    With K = `hidden_count` and r_1 < r_2 < ... the ranks of the hidden genes that could be drawn (the others count as
    never found): recall at n is hits among the first n over K, precision at n is the same hits over n; `recall` and
    `precision` are at `drawn_count`, `recall_at_hidden` and `precision_at_hidden` at K, where they are equal by
    definition. nDCG@100 has binary gains and the discount 1 / log2(1 + rank) (Jarvelin & Kekalainen 2002), over the
    ideal of min(K, 100) first ranks; average precision is the mean over all K of i / r_i; reciprocal rank is 1 / r_1.
    AUROC is the share of pairs of a hidden gene and another candidate that are in the right order (Mann-Whitney),
    hidden genes that can't be drawn left out; equal scores are ordered as the ranking orders them.

    Args:
        ranks: ranks from 1, ascending, of the hidden genes among the candidates.
        hidden_count: K, at least 1.
        drawn_count: genes drawn; 0 gives recall and precision 0.
        candidates: genes that could be drawn, the hidden ones included.

    Returns:
        A value for each of `METRICS`; AUROC is nan where no hidden gene, or nothing else, can be drawn.
    """
    known = len(ranks)
    order = np.arange(1, known + 1)

    def hits(count: int) -> int:
        return int(np.searchsorted(ranks, count, side="right"))

    gain = float(np.sum(1 / np.log2(1 + ranks[: hits(100)])))
    ideal = float(np.sum(1 / np.log2(1 + np.arange(1, min(hidden_count, 100) + 1))))
    misordered = int(ranks.sum()) - known * (known + 1) // 2
    pairs = known * (candidates - known)
    return {
        "hits": hits(drawn_count),
        "recall": hits(drawn_count) / hidden_count,
        "precision": hits(drawn_count) / max(drawn_count, 1),
        **{f"recall_at_{cut}": hits(cut) / hidden_count for cut in CUTS},
        **{f"precision_at_{cut}": hits(cut) / cut for cut in CUTS},
        "recall_at_hidden": hits(hidden_count) / hidden_count,
        "precision_at_hidden": hits(hidden_count) / hidden_count,
        "ndcg_at_100": gain / ideal,
        "average_precision": float(np.sum(order / ranks)) / hidden_count,
        "reciprocal_rank": 1 / int(ranks[0]) if known else 0.0,
        "auroc": 1 - misordered / pairs if pairs else float("nan"),
    }
