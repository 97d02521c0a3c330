import math

import numpy as np
import pytest
import scipy.stats

from tcc_jax.completion.protocol import bootstrap_interval, mask_sets, run_method
from tcc_jax.completion.sets import KnownSet
from tcc_jax.corpus.vocabulary import NUM_SPECIAL


def known_set(length, outside=0, start=NUM_SPECIAL):
    return KnownSet(f"set of {length}", "lib", np.arange(start, start + length, dtype=np.int32), outside)


@pytest.mark.parametrize(("length", "visible"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3), (1000, 200)])
def test_visible_counts(length, visible):
    masked, skipped = mask_sets([known_set(length, outside=3)])
    assert not skipped and len(masked[0].visible) == visible and masked[0].outside == 3
    together = np.concatenate([masked[0].visible, masked[0].hidden])
    assert sorted(together.tolist()) == known_set(length).ids.tolist()


def test_at_least_one_gene_is_hidden():
    masked, _ = mask_sets([known_set(2)], visible_share=0.99)
    assert len(masked[0].hidden) == 1


def test_masks_depend_on_seed_and_place_alone():
    sets = [known_set(50), known_set(30), known_set(40)]
    first, again, other = (mask_sets(sets, seed=seed)[0] for seed in (0, 0, 1))
    changed, _ = mask_sets([known_set(99), *sets[1:]], seed=0)
    for index in (1, 2):
        assert first[index].visible.tolist() == again[index].visible.tolist() == changed[index].visible.tolist()
        assert first[index].visible.tolist() != other[index].visible.tolist()


def test_sets_that_cannot_be_evaluated_are_listed():
    masked, skipped = mask_sets([known_set(1, outside=4), known_set(5), known_set(0, outside=2)])
    assert [one.name for one in masked] == ["set of 5"]
    assert [(one.name, reason.split(" genes")[0]) for one, reason in skipped] == [
        ("set of 1", "1 of its 5"),
        ("set of 0", "0 of its 2"),
    ]


def test_statistics_of_a_method():
    num_genes = 200
    sets, _ = mask_sets([known_set(20), known_set(10, start=60), known_set(40, start=100)])

    def good_ids_first(visible):
        # Knows the first set whole, and nothing else.
        scores = np.zeros((len(visible), NUM_SPECIAL + num_genes), np.float32)
        scores[:, NUM_SPECIAL : NUM_SPECIAL + 20] = 1
        return scores

    outcome = run_method("oracle", good_ids_first, sets, num_genes)
    assert outcome.hits[0] == 16 and outcome.recall[0] == 1 and outcome.hits[1] == 0
    assert [len(drawn) for drawn in outcome.drawn] == [16, 8, 32]
    p = []
    for masked, hits in zip(sets, outcome.hits, strict=True):
        rest = num_genes - len(masked.visible)
        drawn = hidden = len(masked.hidden)
        table = [[hits, hidden - hits], [drawn - hits, rest - hidden - drawn + hits]]
        p.append(scipy.stats.fisher_exact(table, alternative="greater").pvalue)
    np.testing.assert_allclose(np.exp(outcome.log_p), p, rtol=1e-5)
    np.testing.assert_allclose(np.exp(outcome.log_adjusted_p), scipy.stats.false_discovery_control(p), rtol=1e-5)
    assert outcome.significant(0.05).tolist() == [True, False, False]
    assert not outcome.significant(math.exp(outcome.log_adjusted_p[0]) / 2).any()


def test_bootstrap_interval():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values, seed=5)
    assert (low, high) == bootstrap_interval(values, seed=5)
    half_width = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half_width, values.mean() + half_width], atol=0.004)
    assert bootstrap_interval(np.ones(1)) == (1.0, 1.0)
