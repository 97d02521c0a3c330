import sys

import pytest

import tcc_jax
from tcc_jax import complete as command
from tests.completion.tiny import make_corpus, make_run, write_hgnc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    make_run(folder / "run", make_corpus(folder / "corpus"))
    write_hgnc(folder / "hgnc.tsv")
    return folder


def run(monkeypatch, folder, *arguments):
    fixed = ["--checkpoint", str(folder / "run"), "--hgnc", str(folder / "hgnc.tsv")]
    monkeypatch.setattr(sys, "argv", ["complete", *fixed, *arguments])
    command.main()


def fails(monkeypatch, capsys, folder, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_a_table_of_proposals(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "G3", "G4", "--number", "7")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["rank", "gene", "probability"] and len(rows) == 2 + 7
    expected = tcc_jax.load(folder / "run").complete(["G3", "G4"], number=7)
    assert [row[1] for row in rows[2:]] == [one.symbol for one in expected]
    assert [float(row[2]) for row in rows[2:]] == pytest.approx([one.probability for one in expected], abs=1e-6)


def test_what_was_done_with_each_symbol(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "OLD1", "G4", "G99", "TWO", "g5", "G4")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "OLD1 is G1 (previous)",
        "G99 is approved but not in the model's vocabulary; left out",
        "TWO is ambiguous: several genes share that name; left out",
        "g5 is not in the vocabulary; the nearest: G5, G59, G58; left out",
    ]
    assert len(shown.out.splitlines()) == 22


def test_no_known_gene(folder, monkeypatch, capsys):
    error = fails(monkeypatch, capsys, folder, "G99", "g5")
    assert "G99 is approved but" in error and "g5 is not in the vocabulary; the nearest: G5" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no gene"), (["G1", "--number", "0"], "--number"), (["G1", "--number", "x"], "number")],
)
def test_bad_options(folder, monkeypatch, capsys, arguments, message):
    assert message in fails(monkeypatch, capsys, folder, *arguments)


def test_a_missing_checkpoint(folder, monkeypatch, capsys):
    assert "nowhere" in fails(monkeypatch, capsys, folder, "G1", "--checkpoint", str(folder / "nowhere"))
