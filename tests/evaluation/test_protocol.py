import numpy as np
import pytest

from tcc_jax.completion.sets import OUTSIDE, FoundGene, KnownSet
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.evaluation.protocol import DrawnCounts, mask_last_genes, rarest_third, read_drawn_counts
from tcc_jax.terminal import UserError
from tests.completion.test_masks import known_set


def set_on_a_line(name, *ids):
    line = np.array(ids, np.int32)
    symbols = tuple(FoundGene(str(id_), None, "", None if id_ == OUTSIDE else id_) for id_ in ids)
    return KnownSet(name, "lib", np.unique(line[line != OUTSIDE]), int((line == OUTSIDE).sum()), symbols)


def test_the_last_genes_of_a_line_are_hidden():
    sets = [set_on_a_line("a", 20, OUTSIDE, 21, 22, 23, OUTSIDE, 20, 24)]
    counts = [DrawnCounts(hits=2, hidden=5, drawn=9, universe=44_902, line=2)]
    one = mask_last_genes(sets, counts, draw_hidden=False, num_candidates=1500)[0]
    assert one.visible.tolist() == [20, 21]
    # The gene that is unknown and the one that is visible already can't be found, and still count.
    assert one.hidden.tolist() == [22, 23, 24]
    assert (one.hidden_count, one.drawn_count, one.universe, one.outside) == (5, 9, 44_902, 2)
    assert mask_last_genes(sets, counts, True, 1500)[0].drawn_count == 5


def test_no_set_of_the_tcc_protocol_is_left_out():
    sets = [set_on_a_line("a", OUTSIDE, 20, 21), set_on_a_line("b", 20, OUTSIDE)]
    counts = [DrawnCounts(0, 0, 2, 44_902, 2), DrawnCounts(0, 3, 1, 44_902, 3)]
    first, second = mask_last_genes(sets, counts, False, 1500)
    assert len(first.visible) == 0 and first.drawn_count == 0
    assert len(second.hidden) == 0 and second.hidden_count == 1


@pytest.mark.parametrize("hidden", [0, 3, 4])
def test_counts_that_a_line_cannot_have(hidden):
    with pytest.raises(UserError, match="line 7 of the drawn counts"):
        mask_last_genes([set_on_a_line("a", 20, 21, 22)], [DrawnCounts(0, 1, hidden, 44_902, 7)], False, 1500)


def test_more_drawn_than_there_are():
    with pytest.raises(UserError, match="line 7 of the drawn counts: 1,500 drawn"):
        mask_last_genes([set_on_a_line("a", 20, 21, 22)], [DrawnCounts(0, 1500, 2, 44_902, 7)], False, 1500)


SETS = [known_set(5), known_set(6)]
HEADER = "library\tname\thits\tmissed\textra\tneither\tp_value\n"
FIRST, SECOND = "lib\tset of 5\t1\t2\t3\t94\t0.5\n", "lib\tset of 6\t0\t4\t0\t96\t1\n"


def test_drawn_counts_are_read(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "counts.tsv").write_text(HEADER + FIRST + SECOND, encoding=encoding)
        assert read_drawn_counts(tmp_path / "counts.tsv", SETS) == [
            DrawnCounts(1, 4, 3, 100, 2),
            DrawnCounts(0, 0, 4, 100, 3),
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no column 'name'"),
        (HEADER.replace("missed", "miss") + FIRST, "line 1: no column 'missed'"),
        (HEADER + SECOND + FIRST, "line 2: set 'set of 6', but the GMT files have 'set of 5' there"),
        (HEADER + FIRST, "line 3: ends after 1 sets, the GMT files hold 2"),
        (HEADER + FIRST + SECOND + SECOND, "line 4: set 'set of 6', but the GMT files hold only 2"),
        (HEADER + FIRST + SECOND.replace("\t4", "\tfour"), "line 3: hits, missed, extra, neither must be whole"),
        (HEADER + FIRST.replace("\t94", "\t-94") + SECOND, "line 2: hits"),
        (HEADER + FIRST.replace("\t94", "\t16777211") + SECOND, "line 2: universe 16,777,217; at most 16,777,216"),
        (HEADER + FIRST + "lib\tset of 6\n", "line 3: 2 columns, the header has 7"),
    ],
)
def test_bad_drawn_counts(tmp_path, content, message):
    path = tmp_path / "counts.tsv"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_drawn_counts(path, SETS)
    assert f"{path}: {message}" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_binary_drawn_counts(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(UserError, match=name):
            read_drawn_counts(tmp_path / name, SETS)


def test_the_rarest_third_of_the_genes_in_the_sets():
    counts = np.zeros(NUM_SPECIAL + 9, np.int64)
    counts[NUM_SPECIAL:] = [9, 3, 8, 2, 2, 4, 5, 1, 7]
    sets = [known_set(4), known_set(6)]
    # Of the counts 9 3 8 2 2 4 the lowest two are 2: all genes of the vocabulary at or below it are as rare.
    assert (np.flatnonzero(rarest_third(counts, sets)) - NUM_SPECIAL).tolist() == [3, 4, 7]
    assert not rarest_third(counts, [known_set(2)]).any()
