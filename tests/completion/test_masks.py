import numpy as np
import pytest

from tcc_jax.completion.masks import mask_sets
from tcc_jax.completion.sets import KnownSet
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, genes_of

GENES = genes_of(NUM_SPECIAL + 1500)


def known_set(length, outside=0, start=NUM_SPECIAL):
    return KnownSet(f"set of {length}", "lib", np.arange(start, start + length, dtype=np.int32), outside)


@pytest.mark.parametrize(("length", "visible"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3), (1000, 200)])
def test_visible_counts(length, visible):
    masked, skipped = mask_sets([known_set(length, outside=3)], GENES)
    one = masked[0]
    assert not skipped and len(one.visible) == visible and one.outside == 3 and one.place == 0
    assert one.hidden_count == one.drawn_count == length - visible and one.universe == 1500 - visible
    assert sorted([*one.visible, *one.hidden]) == known_set(length).ids.tolist()


def test_at_least_one_gene_is_hidden():
    masked, _ = mask_sets([known_set(2)], GENES, visible_share=0.99)
    assert len(masked[0].hidden) == 1


def test_masks_depend_on_seed_and_place_alone():
    sets = [known_set(50), known_set(30), known_set(40)]
    first, again, other = (mask_sets(sets, GENES, seed=seed)[0] for seed in (0, 0, 1))
    changed, _ = mask_sets([known_set(99), *sets[1:]], GENES, seed=0)
    for index in (1, 2):
        assert first[index].visible.tolist() == again[index].visible.tolist() == changed[index].visible.tolist()
        assert first[index].visible.tolist() != other[index].visible.tolist()


def test_sets_that_cannot_be_evaluated_are_listed():
    masked, skipped = mask_sets([known_set(1, outside=4), known_set(5), known_set(0, outside=2)], GENES)
    assert [one.name for one in masked] == ["set of 5"] and masked[0].place == 1
    assert [(one.name, reason.split(" genes")[0]) for one, reason in skipped] == [
        ("set of 1", "1 of its 5"),
        ("set of 0", "0 of its 2"),
    ]


def test_a_background_is_the_universe():
    background = np.zeros(len(GENES), bool)
    background[NUM_SPECIAL + 5 : NUM_SPECIAL + 105] = True
    masked, skipped = mask_sets([known_set(25, outside=1), known_set(6)], background)
    one = masked[0]
    assert background[one.visible].all() and background[one.hidden].all()
    assert (len(one.visible), len(one.hidden), one.universe) == (4, 16, 96)
    assert (one.outside, one.outside_background) == (1, 5)
    assert skipped[0][1] == "1 of its 6 genes in the background; 2 are needed"


@pytest.mark.parametrize(("share", "false"), [(0.0, 0), (0.2, 5), (0.5, 20)])
def test_false_genes_make_up_their_share_of_the_prompt(share, false):
    sets = [known_set(100)]
    true = mask_sets(sets, GENES, seed=4)[0][0]
    one = mask_sets(sets, GENES, seed=4, false_share=share)[0][0]
    wrong = np.setdiff1d(one.visible, sets[0].ids)
    assert len(wrong) == false and GENES[wrong].all() and len(one.visible) == 20 + false
    # What is true and what is hidden stay the same, so that only the false genes differ.
    assert set(true.visible) <= set(one.visible.tolist()) and one.hidden.tolist() == true.hidden.tolist()
    assert one.universe == 1500 - len(one.visible)


@pytest.mark.parametrize("length", [5, 8, 13])
def test_false_genes_make_up_their_share_of_many_short_prompts(length):
    # One, two and three visible genes, beside which 0.25, 0.5 and 0.75 of a gene are to be false.
    sets = [known_set(length)] * 2000
    true, mixed = (mask_sets(sets, GENES, false_share=share)[0] for share in (0.0, 0.2))
    visible, shown = (sum(len(one.visible) for one in masked) for masked in (true, mixed))
    assert (shown - visible) / shown == pytest.approx(0.2, abs=0.015)
    assert {len(one.visible) for one in mixed} == {len(true[0].visible), len(true[0].visible) + 1}
