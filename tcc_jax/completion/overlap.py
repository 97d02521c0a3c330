"""Overlap statistics on device, in float32 and in log space: the hypergeometric tail and Benjamini-Hochberg.

Accelerators such as TPUs have no float64, and differences of lgamma lose everything in float32 (lgamma(44,902) is 4e5).
What is summed here is small or positive instead, so that tails far below the smallest float keep their digits.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

# Up to here every count is exact in float32.
LARGEST_UNIVERSE = 2**24
_TERMS_PER_STEP = 8
_SERIES_TERMS = 13
# log(m!) - m log(m) + m for the first integers, where Stirling's series is not yet accurate.
_STIRLING_TABLE = [0.0] + [math.lgamma(m + 1) - m * math.log(m) + m for m in range(1, 16)]


@jax.jit
def log_fisher_greater(hits: jax.Array, drawn: jax.Array, hidden: jax.Array, universe: jax.Array) -> jax.Array:
    """One-sided Fisher test: log P(X >= hits) for X ~ Hypergeometric(universe, hidden, drawn).

    The probability of the table itself comes from the saddle-point form of C. Loader, "Fast and accurate computation of
    binomial probabilities" (2000), as in R's `dhyper`; the tail from its term ratios. Up to the mean the tail is taken
    as the complement of the lower one. The error in log10 p is under max(1e-4, 1e-5 x |log10 p|) for universes up to
    1,000,000. The four counts broadcast; `universe` is at most `LARGEST_UNIVERSE`.

    Args:
        hits: [n] int32, drawn genes that are hidden genes.
        drawn: [n] int32, genes drawn.
        hidden: [n] int32, genes hidden.
        universe: [n] int32, genes that could have been drawn.

    Returns:
        [n] float32 natural logs: 0 where hits can't be fewer (nothing drawn, say), -inf where hits can't be that many,
        nan where a count is negative or more are drawn or hidden than there are.
    """
    counts = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.int32) for x in (hits, drawn, hidden, universe)))
    hits, drawn, hidden, universe = counts
    nonsense = (hits < 0) | (drawn < 0) | (hidden < 0) | (drawn > universe) | (hidden > universe)
    certain = hits <= jnp.maximum(0, drawn - (universe - hidden))
    impossible = hits > jnp.minimum(drawn, hidden)
    # Tables with a known answer run through the arithmetic as 1 hit, 1 drawn, 1 hidden of 2.
    known = nonsense | certain | impossible
    hits, drawn, hidden = (jnp.where(known, 1, x) for x in (hits, drawn, hidden))
    universe = jnp.where(known, 2, universe)

    # Fewer than `hits` hidden genes drawn means at least drawn - hits + 1 of the others: an upper tail again.
    lower = ~_wide_less(_wide_product(hidden, drawn), _wide_product(hits, universe))
    hits = jnp.where(lower, drawn - hits + 1, hits)
    hidden = jnp.where(lower, universe - hidden, hidden)
    log_tail = _log_probability(hits, drawn, hidden, universe) + _log_tail_ratio(hits, drawn, hidden, universe)
    log_p = jnp.where(lower, jnp.log1p(-jnp.exp(jnp.minimum(log_tail, 0.0))), jnp.minimum(log_tail, 0.0))
    log_p = jnp.where(certain, 0.0, jnp.where(impossible, -jnp.inf, log_p))
    return jnp.where(nonsense, jnp.nan, log_p)


@jax.jit
def benjamini_hochberg(log_p: jax.Array) -> jax.Array:
    """Adjust p-values for the false discovery rate (Benjamini and Hochberg 1995), in log space.

    Args:
        log_p: [n] float32 natural logs of p-values, no nan.

    Returns:
        [n] float32 natural logs of the adjusted p-values, in the order of the input, at most 0. A test is significant
        at alpha when its value is at most log(alpha).
    """
    order = jnp.argsort(log_p)
    ranks = jnp.arange(1, log_p.shape[0] + 1, dtype=jnp.float32)
    adjusted = log_p[order] + jnp.log(log_p.shape[0] / ranks)
    adjusted = jnp.minimum(jax.lax.cummin(adjusted, reverse=True), 0.0)
    return jnp.zeros_like(log_p).at[order].set(adjusted)


def _log_probability(hits: jax.Array, drawn: jax.Array, hidden: jax.Array, universe: jax.Array) -> jax.Array:
    # With m! = m^m e^-m exp(g(m)), the log probability of a 2 x 2 table with observed counts o and expected counts e is
    # g(margins) - g(universe) - g(o) - sum of (o log(o / e) - o + e), every term of the last sum at or above zero.
    # All four cells lie equally far from their expectation: |o - e| = (hits x universe - hidden x drawn) / universe,
    # whose numerator cancels and is therefore taken in exact integers.
    excess = _wide_to_float(_wide_subtract(_wide_product(hits, universe), _wide_product(hidden, drawn)))
    distance = excess / universe.astype(jnp.float32)
    others, left = universe - hidden, universe - drawn
    cells = (
        (hits, hidden, drawn, distance),
        (hidden - hits, hidden, left, -distance),
        (drawn - hits, others, drawn, -distance),
        (left - hidden + hits, others, left, distance),
    )
    deviance = functools.reduce(jnp.add, (_deviance(o, row, column, universe, d) for o, row, column, d in cells))
    margins = _stirling(hidden) + _stirling(others) + _stirling(drawn) + _stirling(left) - _stirling(universe)
    return margins - functools.reduce(jnp.add, (_stirling(o) for o, *_ in cells)) - deviance


def _deviance(
    observed: jax.Array, row: jax.Array, column: jax.Array, universe: jax.Array, distance: jax.Array
) -> jax.Array:
    # Loader's bd0, o log(o / e) - o + e. With v = (o - e) / (o + e), log(o / e) = 2 atanh(v): near the expectation the
    # series of atanh is free of the cancellation.
    o, row, column, n = (x.astype(jnp.float32) for x in (observed, row, column, universe))
    expected = row * column / n
    v = distance / (o + expected)
    v2 = v * v
    series = jnp.zeros_like(v)
    for power in range(2 * _SERIES_TERMS + 1, 1, -2):
        series = series * v2 + 1 / power
    near = distance * v + 2 * o * v * v2 * series
    far = jnp.where(o > 0, o * jnp.log(jnp.maximum(o, 1.0) / expected), 0.0) - distance
    return jnp.where(jnp.abs(v) < 0.5, near, far)


def _stirling(count: jax.Array) -> jax.Array:
    table = jnp.array(_STIRLING_TABLE, jnp.float32)
    m = jnp.maximum(count, 1).astype(jnp.float32)
    series = 0.5 * jnp.log(2 * math.pi * m) + (1 / 12 - 1 / (360 * m * m)) / m
    return jnp.where(count < len(_STIRLING_TABLE), table[jnp.minimum(count, len(_STIRLING_TABLE) - 1)], series)


def _log_tail_ratio(hits: jax.Array, drawn: jax.Array, hidden: jax.Array, universe: jax.Array) -> jax.Array:
    # log of P(X >= hits) / P(X = hits): past the mean each term is a smaller share of the one before.
    k, missed, extra, neither = (
        x.astype(jnp.float32) for x in (hits, hidden - hits, drawn - hits, universe - hidden - drawn + hits)
    )

    def more(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, term, total = state
        return jnp.any(term > 2.0**-27 * total)

    def add(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        step, term, total = state
        for _ in range(_TERMS_PER_STEP):
            ratio = ((missed - step) * (extra - step)) / ((k + step + 1) * (neither + step + 1))
            term = term * ratio
            total = total + term
            step = step + 1
        return step, term, total

    ones = jnp.ones_like(k)
    _, _, total = jax.lax.while_loop(more, add, (jnp.float32(0), ones, ones))
    return jnp.log(total)


# Products of two counts need up to 62 bits: a pair of uint32, high word first. Integers, because a compiler may reorder
# floating-point sums.
_Wide = tuple[jax.Array, jax.Array]


def _wide_product(x: jax.Array, y: jax.Array) -> _Wide:
    a, b = x.astype(jnp.uint32), y.astype(jnp.uint32)
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = (a_low * b_low >> 16) + (a_low * b_high & 0xFFFF) + (a_high * b_low & 0xFFFF)
    return a_high * b_high + (a_low * b_high >> 16) + (a_high * b_low >> 16) + (middle >> 16), a * b


def _wide_less(x: _Wide, y: _Wide) -> jax.Array:
    return (x[0] < y[0]) | ((x[0] == y[0]) & (x[1] < y[1]))


def _wide_subtract(x: _Wide, y: _Wide) -> _Wide:
    return x[0] - y[0] - (x[1] < y[1]).astype(jnp.uint32), x[1] - y[1]


def _wide_to_float(x: _Wide) -> jax.Array:
    return x[0].astype(jnp.float32) * 2.0**32 + x[1].astype(jnp.float32)
