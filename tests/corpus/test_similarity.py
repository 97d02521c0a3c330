"""Jaccard and near-duplicate clusters against brute force over all pairs."""

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from tcc_jax.corpus.similarity import Sets, leak_counts, near_duplicate_clusters, nearest, num_bands


def make_sets(lists):
    lengths = [len(genes) for genes in lists]
    return Sets(np.concatenate(lists).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def families(seed, number=200, num_genes=400):
    """Sets with variants of themselves at every degree of likeness."""
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(number):
        base = random.choice(num_genes, random.integers(5, 60), replace=False)
        lists.append(base)
        for _ in range(random.integers(0, 4)):
            kept = base[random.random(len(base)) < random.uniform(0.4, 1)]
            lists.append(np.union1d(kept, random.choice(num_genes, random.integers(1, 10), replace=False)))
    return make_sets(lists)


def brute_force_jaccard(sets):
    members = [set(sets.tokens[a:b].tolist()) for a, b in zip(sets.offsets, sets.offsets[1:], strict=False)]
    return np.array([[len(a & b) / len(a | b) for b in members] for a in members])


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.9, 1.0])
def test_nearest_is_exact(limit):
    sets = families(0)
    jaccard = brute_force_jaccard(sets)
    queries = sets.select(np.arange(len(sets)) < 70)
    best, over = nearest(queries, sets.select(np.arange(len(sets)) >= 70), 400, limit)
    np.testing.assert_allclose(best, jaccard[:70, 70:].max(1), rtol=1e-6)
    np.testing.assert_array_equal(over, (jaccard[:70, 70:] >= limit).any(0))


def test_a_pair_exactly_at_the_limit_counts():
    sets = make_sets([[0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 8]])
    first = sets.select(np.array([True, False, False]))
    rest = sets.select(np.array([False, True, True]))
    assert nearest(first, rest, 9, 0.5)[1].tolist() == [True, False]
    assert nearest(first, rest, 9, 1 / 3)[1].tolist() == [True, True]


@pytest.mark.parametrize(("shared", "union", "limit"), [(14, 25, 0.56), (7, 25, 0.28), (11, 20, 0.55), (2, 3, 2 / 3)])
def test_limits_without_an_exact_binary_fraction_are_exact(shared, union, limit):
    # In floating point 0.56 * 25 exceeds 14: a comparison of products would let such a pair pass.
    sets = make_sets([np.arange(shared), np.arange(union)])
    mask = np.array([True, False])
    assert nearest(sets.select(mask), sets.select(~mask), union, limit)[1].tolist() == [True]
    assert nearest(sets.select(mask), sets.select(~mask), union, limit + 1e-9)[1].tolist() == [False]
    assert near_duplicate_clusters(sets, union, limit, seed=0).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_the_components_of_all_pairs(seed):
    sets = families(seed)
    expected = connected_components(brute_force_jaccard(sets) >= 0.5)[1]
    np.testing.assert_array_equal(near_duplicate_clusters(sets, 400, 0.5, seed), expected)


def test_at_least_99_percent_of_pairs_at_the_limit_are_found():
    # 1,500 separate pairs of exactly Jaccard 0.5 (8 shared of 16), over genes of their own.
    lists = []
    for pair in range(1500):
        genes = np.arange(16) + 16 * pair
        lists += [genes[:12], np.concatenate([genes[:8], genes[12:]])]
    clusters = near_duplicate_clusters(make_sets(lists), 16 * 1500, 0.5, seed=1)
    assert np.mean(clusters[::2] == clusters[1::2]) >= 0.99
    assert len(np.unique(clusters)) >= 1500  # and nothing else is joined


def test_thousands_of_near_copies_are_one_cluster():
    random = np.random.default_rng(0)
    lists = [np.delete(np.arange(40), random.integers(0, 40)) for _ in range(3000)]
    assert near_duplicate_clusters(make_sets(lists), 40, 0.5, seed=0).max() == 0


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.9])
def test_bands_promise_99_percent(limit):
    bands, rows = num_bands(limit)
    assert 1 - (1 - limit**rows) ** bands >= 0.99
    assert bands * rows <= 400


def test_sets_arithmetic():
    sets = make_sets([[1, 2, 3], [], [4]])
    assert sets.lengths.tolist() == [3, 0, 1]
    assert sets.sum(np.array([1, 1, 0, 5])).tolist() == [2, 0, 5]
    assert sets.keep_mentions(np.array([True, False, True, False])).lengths.tolist() == [2, 0, 0]
    assert sets.select(np.array([False, True, True])).tokens.tolist() == [4]


def test_leaks_are_counted_from_each_level_on():
    counts = leak_counts(np.array([0.1, 3 / 10, 1 / 2, 8 / 9, 9 / 10]))
    assert counts == {"sets": 5, "with_training_set_at_jaccard": {"0.3": 4, "0.5": 3, "0.9": 1}}
