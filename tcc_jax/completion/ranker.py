"""Rank genes by their scores: the most likely ones that are not visible already, whoever scored them.

A scorer is the model or a baseline: a function from lists of visible gene ids to one score for each id.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tcc_jax.baselines import Scorer
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, PAD

T = TypeVar("T")
_LAST = np.iinfo(np.int64).max
_ID_BITS = 32

# Sets scored at once: [256, V] float32 is 46 MB at 44,902 symbols.
_BATCH = 256


def rank(
    scorer: Scorer,
    visible: Sequence[np.ndarray],
    counts: Sequence[int],
    advance: Callable[[int], None] = lambda count: None,
    candidates_V: np.ndarray | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw the genes with the highest scores for each set; visible genes and special ids are never drawn.

    Args:
        scorer: the model or a baseline.
        visible: for each set the ids of its visible genes.
        counts: for each set how many genes to draw; fewer are drawn where there are not that many.
        advance: called with the number of sets just done.
        candidates_V: [V] bool, the genes that may be drawn; all unless given.

    Returns:
        For each set, in the order given: the drawn ids, int32, best first, equal scores by id; and the probability of
        each, float32: its share under the softmax of the scores over all genes that could be drawn.
    """
    ids: list[np.ndarray] = [np.empty(0, np.int32)] * len(visible)
    probabilities: list[np.ndarray] = [np.empty(0, np.float32)] * len(visible)
    blocked = None if candidates_V is None else jnp.asarray(~candidates_V)
    # By length, so that sets in a batch need about the same padding.
    order = sorted(range(len(visible)), key=lambda index: (len(visible[index]), index))
    for batch in batched(order, _BATCH):
        # All sizes are rounded up, so that a stream of any sets compiles a bounded number of programs.
        rows, longest = power_of_two(len(batch)), power_of_two(max(len(visible[index]) for index in batch))
        scores_BV = np.asarray(scorer([visible[index] for index in batch]))
        scores_BV = np.pad(scores_BV, ((0, rows - len(batch)), (0, 0)))
        visible_BP = np.full((rows, longest), PAD, np.int32)
        for row, index in enumerate(batch):
            visible_BP[row, : len(visible[index])] = visible[index]
        most = min(power_of_two(max(counts[index] for index in batch)), scores_BV.shape[1])
        top = top_genes(scores_BV, visible_BP, most, blocked)
        ids_BK, probabilities_BK, found_B = map(np.asarray, top)
        for row, index in enumerate(batch):
            drawn = min(counts[index], found_B[row])
            ids[index], probabilities[index] = ids_BK[row, :drawn], probabilities_BK[row, :drawn]
        advance(len(batch))
    return ids, probabilities


@functools.partial(jax.jit, static_argnames="count")
def top_genes(
    scores_BV: jax.Array, visible_BP: jax.Array, count: int, blocked_V: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find the highest scores among the genes that are not visible.

    Args:
        scores_BV: any float type, one finite score for each id.
        visible_BP: int32 ids of visible genes, padded with 0.
        count: K, genes to find.
        blocked_V: bool, ids that are no candidates in any row, beside the special ones.

    Returns:
        ids_BK, int32, best first, the lower id first where scores are equal; probabilities_BK, float32, the share
        under the softmax over all candidates; and found_B, int32: how many of the K are candidates.
    """
    scores_BV = scores_BV.astype(jnp.float32)
    rows_B1 = jnp.arange(scores_BV.shape[0])[:, None]
    blocked_1V = (jnp.arange(scores_BV.shape[1]) < NUM_SPECIAL) | (False if blocked_V is None else blocked_V)
    candidates_BV = jnp.where(blocked_1V, -jnp.inf, scores_BV)
    candidates_BV = candidates_BV.at[rows_B1, visible_BP].set(-jnp.inf)
    top_BK, ids_BK = jax.lax.top_k(candidates_BV, count)
    found_BK = ~jnp.isneginf(top_BK)
    log_total_B1 = jax.nn.logsumexp(candidates_BV, axis=1, keepdims=True)
    # With no candidate left the total is log(0), and -inf - -inf no number.
    return ids_BK, jnp.where(found_BK, jnp.exp(top_BK - log_total_B1), 0.0), found_BK.sum(axis=1)


def rank_keys(scores_BV: np.ndarray, visible: Sequence[np.ndarray], candidates_V: np.ndarray) -> np.ndarray:
    """Turn scores into integers that sort as the ranking does: best first, the lower id first where scores are equal.

    That is the order of `rank`; ids go by falling popularity.

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


def recall_among(keys: np.ndarray, hidden_keys: np.ndarray) -> float:
    """Return the share of m hidden genes that are among the m best of all `keys`, theirs included; nan if m is 0."""
    count = len(hidden_keys)
    return float(np.mean(hidden_keys <= np.partition(keys, count - 1)[count - 1])) if count else math.nan


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


def power_of_two(count: int) -> int:
    """Return the smallest power of two of at least `count`: sizes are padded to it, so that few are compiled."""
    return 1 << max(0, count - 1).bit_length()


def row_bucket(rows: int, shards: int = 1) -> int:
    """Return what a batch is padded to: 1, 4, 16, 64 and so on rows on each of `shards` devices, at least `rows`."""
    return next(shards * bucket for power in range(32) if shards * (bucket := 4**power) >= rows)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, the last one shorter, reading no further than the list at hand."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
