"""The packing plan: every segment once, nothing split, close to the best possible."""

import math

import numpy as np
import pytest

from tcc_jax.corpus.packing import plan_rows, prompt_lengths, segment_lengths


def realistic_lengths(count, row_length, seed=0):
    genes = np.exp(np.random.default_rng(seed).normal(4.0, 1.3, count)).astype(int).clip(5, 5000)
    return np.minimum(segment_lengths(genes), row_length)


@pytest.mark.parametrize(("row_length", "most"), [(64, 4), (256, 8), (1024, 64)])
def test_every_segment_has_one_slot_and_no_row_overflows(row_length, most):
    lengths = realistic_lengths(5000, row_length)
    plan = plan_rows(lengths, row_length, most)
    np.testing.assert_array_equal(np.sort(plan.slot_lengths), np.sort(lengths))
    rows = np.add.reduceat(plan.slot_lengths, plan.row_starts[:-1])
    assert rows.max() <= row_length
    assert 1 <= np.diff(plan.row_starts).min() <= np.diff(plan.row_starts).max() <= most


def test_plan_depends_on_the_lengths_alone():
    lengths = realistic_lengths(2000, 256)
    one, two = plan_rows(lengths, 256, 8), plan_rows(lengths[::-1], 256, 8)
    np.testing.assert_array_equal(one.slot_lengths, two.slot_lengths)
    np.testing.assert_array_equal(one.row_starts, two.row_starts)


def test_nearly_full():
    lengths = realistic_lengths(100_000, 1024)
    plan = plan_rows(lengths, 1024, 64)
    assert plan.fullness > 0.99
    assert plan.num_rows >= math.ceil(lengths.sum() / 1024)


def test_many_short_segments_do_not_leave_rows_half_empty():
    # Half of the segments are short: rows of them alone would close at 8 segments with 40 of 256 tokens.
    lengths = np.concatenate([np.full(1000, 5), np.arange(1000) % 200 + 7])
    plan = plan_rows(lengths, 256, 8)
    assert np.diff(plan.row_starts).max() <= 8
    assert plan.fullness > 0.98


def test_small_cases():
    assert segment_lengths(np.array([1, 6, 7, 100])).tolist() == [3, 8, 9, 102]
    plan = plan_rows(np.array([8, 3, 5]), 8, 2)
    assert plan.num_rows == 2
    assert plan.fullness == 1.0
    assert plan_rows(np.array([2, 2, 2]), 8, 1).num_rows == 3


def test_a_prompt_is_a_share_of_its_set_up_to_a_number_of_genes():
    genes = np.array([1, 2, 5, 10, 11, 53, 54, 1000])
    # 0.6 of 5 is 3; a set of two shows one; 32 is the most.
    assert (prompt_lengths(genes, 32, 0.6) - 1).tolist() == [0, 1, 3, 6, 6, 31, 32, 32]
    assert (prompt_lengths(genes, 32, 0.05) - 1).tolist() == [0, 1, 1, 1, 1, 2, 2, 32]
