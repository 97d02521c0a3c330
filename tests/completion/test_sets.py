import numpy as np
import pytest

from tcc_jax.completion.sets import (
    OUTSIDE,
    GeneFinder,
    KnownSet,
    choose_sets,
    read_background,
    read_sets,
    read_stream,
)
from tcc_jax.corpus.gmt import Problems
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.terminal import UserError
from tests.completion.tiny import make_corpus, write_hgnc


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")


@pytest.fixture
def table(tmp_path):
    return SymbolTable.read(write_hgnc(tmp_path / "hgnc.tsv"))


def test_lines_keep_their_order_and_unknown_genes(tmp_path, corpus, table):
    (tmp_path / "file.gmt").write_text("a\tsource\tG3\tOLD1\tNOPE\tG1\tG3\tG0\nb\t\tG5\n")
    finder, problems = GeneFinder(table, corpus.vocabulary), Problems()
    sets = list(read_sets([tmp_path / "file.gmt"], finder, problems, "description"))
    assert sets[0].line.tolist() == [NUM_SPECIAL + 3, NUM_SPECIAL + 1, OUTSIDE, NUM_SPECIAL + 1, NUM_SPECIAL]
    assert sets[0].ids.tolist() == [NUM_SPECIAL + 3, NUM_SPECIAL + 1, NUM_SPECIAL]
    assert [one.library for one in sets] == ["source", "file"]
    sets = list(read_sets([tmp_path / "file.gmt"], finder, problems))
    assert [one.library for one in sets] == ["file", "file"]


def test_choose_sets():
    sets = [KnownSet(str(index), "lib", np.empty(0, np.int32)) for index in range(50)]
    assert choose_sets(sets, None, 0) is sets and choose_sets(sets, 50, 0) is sets
    chosen = [int(one.name) for one in choose_sets(sets, 10, 3)]
    assert len(set(chosen)) == 10 and chosen == sorted(chosen)
    assert chosen == [int(one.name) for one in choose_sets(sets, 10, 3)]
    assert chosen != [int(one.name) for one in choose_sets(sets, 10, 4)]


def test_background(tmp_path, corpus, table, capsys):
    path = tmp_path / "background.txt"
    path.write_text("G0\nOLD1 G7\tNOPE\nG99\n")
    background = read_background(path, GeneFinder(table, corpus.vocabulary))
    assert np.flatnonzero(background).tolist() == [NUM_SPECIAL, NUM_SPECIAL + 1, NUM_SPECIAL + 7]
    assert "3 genes; 2 others" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"NOPE\n", b"\xff\xfe\x00G1"])
def test_bad_backgrounds(tmp_path, corpus, table, content):
    path = tmp_path / "background.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--background .*background\.txt"):
        read_background(path, GeneFinder(table, corpus.vocabulary))


def test_standard_input_is_read_as_it_comes(corpus, table):
    def lines():
        yield from (b"\n", b"one\t\tG1\tOLD1\n", b"short\n")
        assert first is not None
        yield b"two\t\tG2"

    first, problems = None, Problems()
    sets = read_stream(lines(), GeneFinder(table, corpus.vocabulary), problems)
    first = next(sets)
    assert [one.name for one in (first, *sets)] == ["one", "short", "two"]
    assert problems.examples == {"lines with fewer than three columns": ["standard input:3"]}


def test_gmt_on_standard_input_may_begin_with_a_set_without_genes(corpus, table):
    problems = Problems()
    sets = read_stream(iter([b" \n", b"empty\t\t\n", b"one\t\tG1\n"]), GeneFinder(table, corpus.vocabulary), problems)
    assert [(one.name, len(one.ids)) for one in sets] == [("empty", 0), ("one", 1)] and problems.counts == {
        "sets without genes": 1
    }
