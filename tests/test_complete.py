import contextlib
import io
import json
import os
import subprocess
import sys
import types

import pytest

import tcc_jax
from tcc_jax import complete as command
from tcc_jax.completion.sampler import Sampling
from tcc_jax.corpus.store import open_corpus
from tests.completion.tiny import make_corpus, make_run, write_hgnc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    make_run(folder / "run", make_corpus(folder / "corpus"))
    write_hgnc(folder / "hgnc.tsv")
    return folder


def run(monkeypatch, folder, *arguments):
    fixed = ["--hgnc", str(folder / "hgnc.tsv")]
    if "--checkpoint" not in arguments:
        fixed += ["--checkpoint", str(folder / "run")]
    monkeypatch.setattr(sys, "argv", ["complete", *fixed, *arguments])
    command.main()


def fails(monkeypatch, capsys, folder, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "helptext" not in error
    return error


def test_a_table_of_proposals(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "G3", "G4", "--number", "7", "--format", "table")
    title, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert title == ["query:", "2", "visible", "genes"]
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
    assert len(shown.out.splitlines()) == 21


def test_symbols_of_another_case(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "g5", "old1", "--case-insensitive")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["g5 is G5 (case)", "old1 is G1 (case)"] and len(shown.out.splitlines()) == 21


def test_no_known_gene(folder, monkeypatch, capsys):
    error = fails(monkeypatch, capsys, folder, "G99", "g5")
    assert "G99 is approved but" in error and "g5 is not in the vocabulary; the nearest: G5" in error


def test_of_many_unknown_genes_twenty_are_named(folder, monkeypatch, capsys):
    unknown = [f"XX{index}" for index in range(200)]
    run(monkeypatch, folder, "G1", *unknown)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[0].startswith("XX0 is not in the vocabulary")
    assert lines[-1] == "and 180 more symbols; --format json lists them with each set"
    error = fails(monkeypatch, capsys, folder, *unknown)
    assert error.count("not in the vocabulary") == 20 and error.endswith("; and 180 more symbols")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no gene"),
        (["G1", "--number", "0"], "--number"),
        (["G1", "--number", "x"], "--number: invalid literal for int() with base 10: 'x'; see python"),
        (["G1", "--permutations", "0"], "--permutations"),
        (["G1", "--decode", "sample", "--top-p", "2"], "top_p = 2.0"),
        (["G1", "--temperature", "0"], "--temperature goes with --decode sample"),
        (["G1", "--top-k", "5"], "--top-k goes with --decode sample"),
        (["G1", "--top-p", "0.5"], "--top-p goes with --decode sample"),
        (["G1", "--stop-at-end"], "--stop-at-end goes with --decode sample"),
        (["G1", "--number", "4097", "--decode", "sample"], "--number 4097: at most 4,096 genes are drawn one by one"),
        (["G1", "--permutations", "2", "--decode", "sample"], "--permutations goes with --decode rank"),
        (["G1", "--seed", "-1"], "seed"),
        (["G1", "\udcffX", "--out", "x.json"], r"'\udcffX': not text in UTF-8"),
        (["G1", "--mixture", "--decode", "sample"], "--mixture"),
        (["G1", "--mixture", "--corpus", "nowhere"], "nowhere"),
        (["G1", "--corpus", "nowhere"], "--corpus goes with --why or --mixture"),
        (["G1", "-"], "standard input"),
        (["G1", "--gmt", "a.gmt"], "choose one"),
        (["--gmt", "nowhere.gmt"], "nowhere.gmt"),
        (["G1", "--background", "nowhere.txt"], "nowhere.txt"),
        (["G1", "--why", "--corpus", "nowhere"], "error: the corpus nowhere is not there"),
        (["G1", "--out", "nowhere/x.tsv"], "nowhere"),
        (["G1", "--out", "x.tsv.gz"], "--out x.tsv.gz: nothing is compressed"),
        (["G1", "--out", "x.XZ"], "--out x.XZ: nothing is compressed"),
        (["G1", "--why", "--format", "gmt"], "--why: GMT has no place for it"),
        (["G1", "--why", "--out", "x.gmt"], "--why: GMT has no place for it"),
        ([f"G{index}" for index in range(60)], "no gene is left to propose"),
    ],
)
def test_bad_options(folder, monkeypatch, capsys, arguments, message):
    assert message in fails(monkeypatch, capsys, folder, *arguments)


def test_a_missing_checkpoint(folder, monkeypatch, capsys):
    assert "nowhere" in fails(monkeypatch, capsys, folder, "G1", "--checkpoint", str(folder / "nowhere"))


def give_input(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))


GMT = "one/a\tfrom\tG1\tG2\tG2\n\nbad\tnone is known\tXX\tTWO\nshort\nempty\t\t\n two \t\tOLD1\tG9\tG99\n"


def test_a_gmt_file_streams_and_one_bad_set_does_not_stop_the_rest(folder, monkeypatch, capsys):
    (folder / "sets.gmt").write_text(GMT)
    run(monkeypatch, folder, "--gmt", str(folder / "sets.gmt"), "--number", "3")
    shown = capsys.readouterr()
    header, *rows = [line.split("\t") for line in shown.out.splitlines()]
    assert header == ["set", "rank", "gene", "probability"]
    assert [row[:2] for row in rows] == [[name, str(rank)] for name in ("one/a", "two") for rank in (1, 2, 3)]
    notes = shown.err.splitlines()
    for text in (
        "lines with fewer than three columns: 1",
        "sets without genes: 1",
        "genes repeated within a set: 1",
        "OLD1 is G1 (previous)",
        "XX is not in the vocabulary; left out",
        "TWO is ambiguous",
        "3 of 5 sets could not be completed:",
        "  bad: no known gene",
        "  short: no gene",
        "  empty: no gene",
    ):
        assert any(line.startswith(text) for line in notes), text


@pytest.mark.parametrize("decode", ["rank", "sample"])
def test_progress_moves_by_the_batch_and_counts_each_set_once(folder, monkeypatch, capsys, decode):
    counts = []

    @contextlib.contextmanager
    def noted(label):
        yield counts.append

    monkeypatch.setattr("tcc_jax.completion.completions.progress", noted)
    # Prompts of two lengths are two batches for the sampler.
    longer = "".join(f"long{index}\t\t" + "\t".join(f"G{gene}" for gene in range(20)) + "\n" for index in range(3))
    (folder / "sets.gmt").write_text(GMT + longer)
    run(monkeypatch, folder, "--gmt", str(folder / "sets.gmt"), "--number", "3", "--decode", decode)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5 * 3
    assert sorted(counts) == sorted({"rank": [5], "sample": [2, 3]}[decode] + [1, 1, 1])


@pytest.mark.parametrize("position", ["none", "learned"])
def test_sampling_tells_what_a_row_has_no_room_for(folder, monkeypatch, capsys, position):
    checkpoint = folder / f"run-{position}"
    make_run(checkpoint, open_corpus(folder / "corpus"), position=position)
    sets = {"short": 8, "long": 30, "middle": 12}
    lines = (f"{name}\t\t" + "\t".join(f"G{gene}" for gene in range(size)) for name, size in sets.items())
    (folder / "sets.gmt").write_text("\n".join(lines) + "\n" + "unknown\t\tXX\n")

    def drawn(number, *flags):
        fixed = ["--gmt", str(folder / "sets.gmt"), "--checkpoint", str(checkpoint), "--number", str(number)]
        run(monkeypatch, folder, *fixed, *flags)
        shown = capsys.readouterr()
        names = [line.split("\t")[0] for line in shown.out.splitlines()[1:]]
        return [names.count(name) for name in sets], [line for line in shown.err.splitlines() if "a row" in line]

    asked = "4 sets do not fit in a row together with what is drawn: a random part of their genes was shown, or fewer"
    assert drawn(20) == ([20, 20, 20], [])
    if position == "none":
        assert drawn(20, "--decode", "sample") == ([20, 20, 20], [])
        return
    parts = "long: 15 of 30 genes shown, at most 16 of 20 drawn"
    assert drawn(20, "--decode", "sample") == ([20, 16, 19], [f"2 of {asked} can come back ({parts})"])
    parts = "long: 26 of 30 genes shown, at most 5 of 5 drawn"
    assert drawn(5, "--decode", "sample") == ([5, 5, 5], [f"1 of {asked} can come back ({parts})"])
    parts = "short: 8 of 8 genes shown, at most 23 of 40 drawn"
    assert drawn(40, "--decode", "sample") == ([23, 16, 19], [f"3 of {asked} can come back ({parts})"])


def test_formats(folder, monkeypatch, capsys):
    (folder / "sets.gmt").write_text(GMT)
    fixed = ["--gmt", str(folder / "sets.gmt"), "--number", "3"]
    run(monkeypatch, folder, *fixed)
    tsv = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    run(monkeypatch, folder, *fixed, "--format", "gmt")
    gmt = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in gmt] == ["one/a", "two"]
    assert [gene for line in gmt for gene in line[2:]] == [row[2] for row in tsv]
    run(monkeypatch, folder, *fixed, "--out", str(folder / "out.json"))
    assert capsys.readouterr().out == ""
    document = json.loads((folder / "out.json").read_text())
    assert document["format_version"] == 1 and document["checkpoint"]["step"] == 7
    one, bad, short, empty, two = document["sets"]
    assert (short["set"], short["problem"]) == ("short", "no gene") == ("short", empty["problem"])
    assert (one["visible"], two["visible"]) == (["G1", "G2"], ["G1", "G9"])
    assert bad["problem"] == "no known gene" and bad["proposals"] == [] and one["problem"] is None
    assert {"written": "OLD1", "symbol": "G1", "how": "previous", "used": True} in two["symbols"]
    assert two["notes"][0] == "OLD1 is G1 (previous)" and "G99" in two["notes"][1]
    proposals = [proposal for record in document["sets"] for proposal in record["proposals"]]
    assert [proposal["symbol"] for proposal in proposals] == [row[2] for row in tsv]


@pytest.mark.parametrize("format", ["table", "tsv", "json", "gmt"])
def test_without_a_completed_set_nothing_is_printed(folder, monkeypatch, capsys, format):
    bad = "bad\t\tXX\nworse\t\tTWO\n"
    give_input(monkeypatch, bad)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, "-", "--format", format)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == "" and "none of the 2 sets could be completed" in shown.err
    give_input(monkeypatch, f"{bad}good\t\tG1\n")
    run(monkeypatch, folder, "-", "--format", format)
    shown = capsys.readouterr().out
    assert "good" in shown
    if format == "json":
        assert [one["set"] for one in json.loads(shown)["sets"]] == ["bad", "worse", "good"]


def test_a_failed_output_leaves_nothing_behind(folder, monkeypatch, capsys, tmp_path):
    fails(monkeypatch, capsys, folder, "XX", "--out", str(tmp_path / "x.tsv"))
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_not_replaced(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "in.gmt").write_text(GMT)
    (tmp_path / "link").symlink_to("in.gmt")
    for given, out in (("in.gmt", "in.gmt"), ("in.gmt", "link"), ("", "in.gmt")):
        error = fails(monkeypatch, capsys, folder, "--gmt", str(tmp_path / given), "--out", str(tmp_path / out))
        assert f"{out}: is an input" in error and (tmp_path / "in.gmt").read_text() == GMT
    error = fails(
        monkeypatch, capsys, folder, "G1", "--background", str(tmp_path / "link"), "--out", str(tmp_path / "in.gmt")
    )
    assert "is an input" in error
    # Standard input as the shell redirects it: the real one, not sys.stdin.
    command = [sys.executable, "-m", "tcc_jax.complete", "-", "--checkpoint", "x", "--out", tmp_path / "in.gmt"]
    with open(tmp_path / "in.gmt") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert done.returncode == 2 and "is an input" in done.stderr


def test_the_next_completion_finds_what_this_one_compiled(folder, tmp_path):
    environment = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "tcc_jax.complete", "G3", "--checkpoint", folder / "run", "--number", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tcc_jax" / "compilations").glob("jit_top_genes-*"))


def test_standard_input(folder, monkeypatch, capsys):
    give_input(monkeypatch, "\nG3\nG4, G5\n")
    run(monkeypatch, folder, "-", "--number", "4")
    genes = [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert genes == [one.symbol for one in tcc_jax.load(folder / "run").complete(["G3", "G4", "G5"], number=4)]
    give_input(monkeypatch, GMT)
    run(monkeypatch, folder, "-", "--number", "2")
    shown = capsys.readouterr()
    assert [line.split("\t")[0] for line in shown.out.splitlines()] == ["set", "one/a", "one/a", "two", "two"]
    assert "fewer than three columns: 1 (first: standard input:4)" in shown.err
    give_input(monkeypatch, " \n")
    assert "standard input is empty" in fails(monkeypatch, capsys, folder, "-")
    give_input(monkeypatch, "one\ttwo\n")
    assert "standard input: no usable gene set" in fails(monkeypatch, capsys, folder, "-")


def test_sampling_and_background(folder, monkeypatch, capsys):
    (folder / "background.txt").write_text("G7\nOLD1 G8\nXX\n")
    arguments = ["G3", "--background", str(folder / "background.txt"), "--decode", "sample", "--seed", "3"]
    run(monkeypatch, folder, *arguments)
    shown = capsys.readouterr()
    rows = [line.split("\t") for line in shown.out.splitlines()[1:]]
    assert {row[2] for row in rows} == {"G1", "G7", "G8"}
    assert sum(float(row[3]) for row in rows) == pytest.approx(1, rel=1e-4)
    assert "background.txt: 3 genes; 1 others" in shown.err
    run(monkeypatch, folder, *arguments)
    assert capsys.readouterr().out == shown.out


def test_options_reach_the_model(folder, monkeypatch, capsys):
    model, genes, drawn = tcc_jax.load(folder / "run"), ["G3", "G44", "G25"], ["--decode", "sample"]

    def proposals(*flags):
        run(monkeypatch, folder, *genes, *flags)
        return [tuple(line.split("\t")[2:]) for line in capsys.readouterr().out.splitlines()[1:]]

    found = {"ranked": proposals(), "drawn": proposals(*drawn)}
    for flag, value, settings in (
        ("--permutations", "5", {"permutations": 5}),
        ("--seed", "1", {"sampling": Sampling(seed=1)}),
        ("--temperature", "0.1", {"sampling": Sampling(temperature=0.1)}),
        ("--top-k", "2", {"sampling": Sampling(top_k=2)}),
        ("--top-p", "0.1", {"sampling": Sampling(top_p=0.1)}),
        ("--stop-at-end", "", {"sampling": Sampling(stop_at_end=True)}),
    ):
        found[flag] = proposals(*(drawn if "sampling" in settings else []), flag, *value.split())
        expected = model.complete(genes, **settings)
        assert found[flag] == [(one.symbol, f"{one.probability:.6g}") for one in expected], flag
    assert len(set(map(tuple, found.values()))) == len(found)


def test_why(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "G3", "G4", "--why", "--format", "json", "--number", "4")
    proposals = json.loads(capsys.readouterr().out)["sets"][0]["proposals"]
    corpus = open_corpus(folder / "corpus")
    train = [set(corpus.genes(index).tolist()) for index in corpus.indices("train")]
    visible = {corpus.vocabulary.ids["G3"], corpus.vocabulary.ids["G4"]}
    for proposal in proposals:
        id_ = corpus.vocabulary.ids[proposal["symbol"]]
        holding = [genes for genes in train if id_ in genes and genes & visible]
        expected = sorted((len(genes & visible) / len(genes | visible) for genes in holding), reverse=True)[:3]
        assert [one["jaccard"] for one in proposal["training_sets"]] == pytest.approx(expected)
        assert all(one["shared"] in (1, 2) and one["library"] == "lib" for one in proposal["training_sets"])
    run(monkeypatch, folder, "G3", "--why")
    assert "Jaccard" in capsys.readouterr().out


def test_mixture(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(monkeypatch, folder, "G3", "G4", "--mixture", "--number", "58")
    shown = capsys.readouterr()
    assert "mixture: log(" in shown.err and "log(1 p" not in shown.err
    rows = [line.split("\t") for line in shown.out.splitlines()[1:]]
    assert len(rows) == 58 and sum(float(row[3]) for row in rows) == pytest.approx(1, rel=1e-4)
    run(monkeypatch, folder, "G3", "G4", "--number", "58")
    alone = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert alone != rows and sorted(row[2] for row in alone) == sorted(row[2] for row in rows)


def test_why_says_when_the_corpus_is_missing(folder, monkeypatch, capsys):
    (folder / "corpus").rename(folder / "elsewhere")
    try:
        run(monkeypatch, folder, "G3", "--why")
        shown = capsys.readouterr()
        missing = f"the corpus {folder / 'corpus'} is not there; name it with --corpus"
        assert f"--why is left out: {missing}" in shown.err and len(shown.out.splitlines()) == 21
        run(monkeypatch, folder, "G3", "--why", "--corpus", str(folder / "elsewhere"))
        assert "Jaccard" in capsys.readouterr().out
    finally:
        (folder / "elsewhere").rename(folder / "corpus")
    make_corpus(folder / "other", prefix="H")
    assert "another vocabulary" in fails(monkeypatch, capsys, folder, "G3", "--why", "--corpus", str(folder / "other"))
