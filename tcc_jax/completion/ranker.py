"""Rank genes by their scores: the most likely ones that are not visible already, whoever scored them.

A scorer is the model or a baseline: a function from lists of visible gene ids to one score for each id.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tcc_jax.corpus.vocabulary import NUM_SPECIAL, PAD

T = TypeVar("T")
Scorer = Callable[[Sequence[np.ndarray]], jax.Array | np.ndarray]
"""n arrays of visible gene ids -> [n, V] scores, any float type, higher is better; only their order matters."""

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
