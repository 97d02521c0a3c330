import csv
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tcc_jax.completion.overlap import benjamini_hochberg, log_fisher_greater

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "tcc1000_overlap.tsv"


def log10_p(hits, drawn, hidden, universe):
    return np.asarray(log_fisher_greater(hits, drawn, hidden, universe), np.float64) / math.log(10)


def log10_of_integer(number):
    shift = max(0, number.bit_length() - 1000)
    return (math.log(number >> shift) + shift * math.log(2)) / math.log(10)


def exact_log10_p(hits, drawn, hidden, universe):
    total = math.comb(universe, drawn)
    terms = range(hits, min(drawn, hidden) + 1)
    ways = sum(math.comb(hidden, x) * math.comb(universe - hidden, drawn - x) for x in terms)
    if 2 * ways > total:
        # Integer division first: the float of a ratio near 1 would lose its distance from 1.
        return math.log1p(-((total - ways) * 2**200 // total) / 2**200) / math.log(10)
    return log10_of_integer(ways) - log10_of_integer(total)


def random_tables(rng, size, low, high):
    universe = np.exp(rng.uniform(math.log(low), math.log(high + 1), size)).astype(int)

    def margin():
        # Uniform, small, or close to the whole universe.
        small = np.exp(rng.random(size) * np.log(universe)).astype(int)
        uniform = (rng.random(size) * (universe + 1)).astype(int)
        return np.choose(rng.integers(0, 3, size), [uniform, small, universe - small])

    drawn, hidden = margin(), margin()
    fewest, most = np.maximum(0, drawn + hidden - universe), np.minimum(drawn, hidden)
    mean = drawn * hidden / universe
    deviation = np.sqrt(mean * (1 - hidden / universe) * (1 - drawn / universe) + 0.1)
    near = np.round(mean + deviation * rng.normal(size=size) * rng.choice([1, 5, 30], size)).astype(int)
    anywhere = fewest + (rng.random(size) * (most - fewest + 1)).astype(int)
    hits = np.clip(np.where(rng.random(size) < 0.7, near, anywhere), fewest, most)
    return hits, drawn, hidden, universe


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference tables are not beside the checkout")
def test_reference_tables():
    with open(REFERENCE, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = ("hits", "missed", "extra", "neither")
    hits, missed, extra, neither = (np.array([int(row[column]) for row in rows]) for column in columns)
    recorded = np.log10([float(row["p_value"]) for row in rows])
    log_p = log_fisher_greater(hits, hits + extra, hits + missed, hits + missed + extra + neither)
    assert len(rows) == 1000 and recorded.min() < -266
    np.testing.assert_allclose(np.asarray(log_p) / math.log(10), recorded, rtol=0, atol=1e-4)
    assert (np.asarray(benjamini_hochberg(log_p)) <= math.log(0.05)).sum() == 660


def test_exact_integers_up_to_200():
    tables = random_tables(np.random.default_rng(0), 5000, 10, 200)
    exact = [exact_log10_p(*map(int, table)) for table in zip(*tables, strict=True)]
    np.testing.assert_allclose(log10_p(*tables), exact, rtol=1e-5, atol=1e-4)


def test_every_table_of_a_small_universe():
    tables = [
        (hits, drawn, hidden, 10)
        for drawn in range(11)
        for hidden in range(11)
        for hits in range(min(drawn, hidden) + 1)
    ]
    exact = [exact_log10_p(*table) for table in tables]
    np.testing.assert_allclose(log10_p(*np.array(tables).T), exact, rtol=0, atol=1e-5)


def test_scipy_up_to_a_million():
    hits, drawn, hidden, universe = tables = random_tables(np.random.default_rng(1), 2000, 10, 10**6)
    assert universe.max() > 900_000
    expected = scipy.stats.hypergeom.logsf(hits - 1, universe, hidden, drawn) / math.log(10)
    error = np.abs(log10_p(*tables) - expected)
    allowed = np.maximum(1e-4, 1e-5 * np.abs(expected))
    for index in np.flatnonzero(~(error <= allowed)):
        # SciPy's own tail loses digits in places: exact integers decide.
        exact = exact_log10_p(*(int(column[index]) for column in tables))
        assert abs(log10_p(*(column[index] for column in tables)) - exact) <= max(1e-4, 1e-5 * abs(exact))


def test_longest_sums():
    hits = np.arange(249_990, 250_011)
    expected = scipy.stats.hypergeom.logsf(hits - 1, 10**6, 500_000, 500_000) / math.log(10)
    np.testing.assert_allclose(log10_p(hits, 500_000, 500_000, 10**6), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((0, 5, 5, 100), 0.0),  # no hits
        ((0, 0, 5, 100), 0.0),  # nothing drawn
        ((0, 5, 0, 100), 0.0),  # nothing hidden
        ((0, 0, 0, 0), 0.0),
        ((5, 5, 5, 5), 0.0),  # everything drawn
        ((3, 8, 5, 10), 0.0),  # at least 3 of the 5 must be among 8 of 10
        ((4, 8, 5, 10), math.log10(7 / 9)),  # drawn > universe - hidden: 1 - C(5,3) C(5,5) / C(10,8)
        ((5, 8, 5, 10), math.log10(56 / 252)),
        ((5, 5, 5, 44902), -log10_of_integer(math.comb(44902, 5))),  # all hits
        ((1, 1, 1, 10**6), -6.0),
        ((6, 5, 8, 100), -math.inf),
        ((1, 0, 8, 100), -math.inf),
    ],
)
def test_edges(table, expected):
    np.testing.assert_allclose(log10_p(*table), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("table", [(-1, 5, 5, 10), (1, 11, 5, 10), (1, 5, 11, 10), (0, -1, 5, 10), (0, 0, 0, -1)])
def test_nonsense_is_nan(table):
    assert np.isnan(log10_p(*table))


def test_float32_and_empty_batches():
    empty = np.zeros(0, np.int32)
    assert log_fisher_greater(empty, empty, empty, empty).shape == (0,)
    assert benjamini_hochberg(jnp.zeros(0)).shape == (0,)
    assert log_fisher_greater(*np.array([[1], [2], [3], [9]])).dtype == jnp.float32
    assert not jax.config.jax_enable_x64


def test_a_hundred_thousand_tables_take_under_two_seconds():
    tables = random_tables(np.random.default_rng(2), 100_000, 10, 10**6)
    log_fisher_greater(*tables).block_until_ready()
    start = time.perf_counter()
    log_fisher_greater(*tables).block_until_ready()
    assert time.perf_counter() - start < 2


def test_benjamini_hochberg_against_scipy():
    rng = np.random.default_rng(3)
    p = np.concatenate([rng.random(400), rng.random(200) ** 8, [1.0, 1.0, 0.25, 0.25]])
    adjusted = benjamini_hochberg(jnp.asarray(np.log(p), jnp.float32))
    # A few units in the last place of a float32 logarithm.
    np.testing.assert_allclose(adjusted, np.log(scipy.stats.false_discovery_control(p)), rtol=3e-7, atol=3e-7)


def test_benjamini_hochberg_far_below_the_smallest_float():
    log_p = jnp.array([-3000.0, 0.0, -5000.0])
    expected = [-3000 + math.log(3 / 2), 0.0, -5000 + math.log(3)]
    np.testing.assert_allclose(benjamini_hochberg(log_p), expected, rtol=1e-6)
