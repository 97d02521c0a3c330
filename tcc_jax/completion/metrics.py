"""How well a ranking of genes finds the hidden ones: ranks from full score vectors, and metrics from ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
_LAST = np.iinfo(np.int64).max
_ID_BITS = 32


def rank_keys(scores_BV: np.ndarray, visible: Sequence[np.ndarray], candidates_V: np.ndarray) -> np.ndarray:
    """Turn scores into integers that sort as the ranking does: best first, the lower id first where scores are equal.

    That is the order of `ranker.rank`; ids go by falling popularity.

    Args:
        scores_BV: float, higher is better; finite or infinite.
        visible: for each row the ids that can't be drawn.
        candidates_V: [V] bool, ids that can be drawn.

    Returns:
        keys_BV, int64: the id in the low 32 bits; the largest int64 for what can't be drawn.

    Raises:
        ValueError: a score is not a number.
    """
    # Adding 0 makes -0 equal to 0, whose bits differ.
    scores_BV = np.asarray(scores_BV, np.float32) + np.float32(0)
    if np.isnan(scores_BV).any():
        raise ValueError("a score is not a number")
    # The bits of a float32 as an integer ascend with the number, once those of negative numbers are turned round.
    bits_BV = scores_BV.view(np.int32)
    bits_BV ^= (bits_BV >> 31) & np.int32(0x7FFFFFFF)
    keys_BV = (~bits_BV).astype(np.int64) << _ID_BITS
    keys_BV |= np.arange(scores_BV.shape[1])
    keys_BV[:, ~candidates_V] = _LAST
    for row, ids in enumerate(visible):
        keys_BV[row, ids] = _LAST
    return keys_BV


def best_ids(sorted_keys: np.ndarray, count: int) -> np.ndarray:
    """Return the int32 ids of the `count` best candidates (fewer if there are not that many) of one sorted row."""
    best = sorted_keys[:count]
    return (best[best != _LAST] & (2**_ID_BITS - 1)).astype(np.int32)


def ranks_of(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the ranks from 1, ascending, of the genes with the given keys, in one sorted row; int64."""
    return np.sort(np.searchsorted(sorted_keys, keys) + 1)


def num_candidates(sorted_keys: np.ndarray) -> int:
    """Return how many genes of one sorted row could be drawn."""
    return int(np.searchsorted(sorted_keys, _LAST))


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
