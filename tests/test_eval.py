import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from tcc_jax import eval as command
from tests.completion.tiny import STEP, make_corpus, make_run, write_hgnc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    make_run(folder / "run", make_corpus(folder / "corpus"))
    write_hgnc(folder / "hgnc.tsv")
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    command.main()


def fails(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "Traceback" not in error
    return error.strip().splitlines()[-1]


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_test_split_of_the_corpus(folder, monkeypatch, capsys):
    run(monkeypatch, "--checkpoint", folder / "run", "--out", folder / "deep/report")
    out = folder / "deep/report"
    report = json.loads((out / "report.json").read_text())
    rows = read_table(out / "per_set.tsv")
    assert report["format_version"] == 1 and report["checkpoint"]["step"] == STEP
    assert report["sets_evaluated"] == len(rows) == 27 and report["skipped"] == []
    methods = {row["method"]: row for row in report["methods"]}
    assert list(methods) == ["model", "popularity", "random", "set-kNN"]
    # Sets are drawn from families of 20 genes: neighbours know them, chance and popularity don't.
    assert methods["set-kNN"]["recall"] > 0.25 > methods["random"]["recall"]
    for name, prefix in (("model", ""), ("popularity", "popularity_"), ("set-kNN", "set_knn_")):
        assert sum(int(row[f"{prefix}hits"]) for row in rows) == methods[name]["hits"]
        assert sum(row[f"{prefix}significant"] == "yes" for row in rows) == methods[name]["significant"]
        recall = [int(row[f"{prefix}hits"]) / int(row["hidden"]) for row in rows]
        np.testing.assert_allclose(np.mean(recall), methods[name]["recall"])
        assert methods[name]["recall_low"] <= methods[name]["recall"] <= methods[name]["recall_high"]
    lines = [line.split("\t") for line in (out / "completions.gmt").read_text().splitlines()]
    assert [line[0] for line in lines] == [row["name"] for row in rows]
    assert {line[1] for line in lines} == {f"completed by tcc_jax step {STEP}"}
    assert [len(line) - 2 for line in lines] == [int(row["hidden"]) for row in rows]
    pytest.importorskip("matplotlib")
    assert (out / "significance.png").stat().st_size > 10_000 and (out / "significance.svg").exists()
    shown = capsys.readouterr()
    assert "popularity" in shown.out and "set-kNN" in shown.out


def test_gmt_with_awkward_sets_and_without_the_corpus(folder, monkeypatch, capsys):
    genes = [f"G{index}" for index in range(20)]
    lines = [
        ["../a/b", "", *genes],
        ["one gene", "", "G1", "NOPE"],
        ["none", "", "NOPE", "NOPE2"],
        ["old, ambiguous, absent", "", "OLD1", "G2", "G3", "TWO", "G99", "NOPE", "G1"],
        ["everything", "", *(f"G{index}" for index in range(60))],
    ]
    gmt = folder / "awkward.gmt"
    gmt.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    moved = (folder / "corpus").rename(folder / "elsewhere")
    try:
        run(monkeypatch, "--checkpoint", folder / "run/checkpoints" / str(STEP), "--gmt", gmt,
            "--hgnc", folder / "hgnc.tsv", "--out", folder / "awkward", "--seed", 3)  # fmt: skip
    finally:
        moved.rename(folder / "corpus")
    report = json.loads((folder / "awkward/report.json").read_text())
    rows = read_table(folder / "awkward/per_set.tsv")
    assert [row["name"] for row in rows] == ["../a/b", "old, ambiguous, absent", "everything"]
    assert [one["name"] for one in report["skipped"]] == ["one gene", "none"]
    # OLD1 and G1 are one gene; TWO, G99 and NOPE are left out and counted.
    assert (rows[1]["visible"], rows[1]["hidden"], rows[1]["outside_vocabulary"]) == ("1", "2", "3")
    assert rows[2]["visible"] == "12" and rows[2]["hits"] == "48" and float(rows[2]["log10_p"]) == 0
    assert "set-kNN" in report["left_out"] and [row["method"] for row in report["methods"]][-1] == "random"
    symbols = report["source"]["symbols"]
    assert symbols["mentions"]["previous"] == 1 and symbols["mentions"]["ambiguous"] == 1
    assert symbols["not_mapped"]["most_frequent"] == {"NOPE": 3, "NOPE2": 1, "TWO": 1}
    assert symbols["not_in_vocabulary"]["most_frequent"] == {"G99": 1}
    error = capsys.readouterr().err
    assert "skipped awkward/none: 0 of its 2 genes in the vocabulary" in error and "set-kNN is left out" in error


def test_same_input_gives_the_same_bytes(folder, monkeypatch):
    for name in ("first", "second"):
        run(monkeypatch, "--checkpoint", folder / "run", "--out", folder / name, "--split", "validation")
    for name in ("per_set.tsv", "completions.gmt"):
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes()
    reports = [json.loads((folder / name / "report.json").read_text()) for name in ("first", "second")]
    assert reports[0]["methods"] == reports[1]["methods"]


def test_an_existing_folder_is_kept_unless_overwrite(folder, monkeypatch, capsys):
    out = folder / "kept"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    arguments = ("--checkpoint", folder / "run", "--out", out, "--split", "validation")
    assert "already exists" in fails(monkeypatch, capsys, *arguments)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    monkeypatch.setattr("tcc_jax.completion.report.can_plot", lambda: False)
    run(monkeypatch, *arguments, "--overwrite")
    assert sorted(file.name for file in out.iterdir()) == ["completions.gmt", "per_set.tsv", "report.json"]
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_another_vocabulary_is_refused(folder, monkeypatch, capsys):
    make_corpus(folder / "other", prefix="H")
    error = fails(
        monkeypatch, capsys, "--checkpoint", folder / "run", "--corpus", folder / "other", "--out", folder / "new"
    )
    assert str(folder / "other") in error and str(folder / "run") in error and "another vocabulary" in error
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gmt", "missing.gmt"], "missing.gmt"),
        (["--visible", "1"], "--visible"),
        (["--alpha", "0"], "--alpha"),
        (["--seed", "-1"], "--seed"),
        (["--corpus", "missing"], "missing"),
        (["--visible", "many"], "visible"),
    ],
)
def test_bad_options(folder, monkeypatch, capsys, arguments, message):
    out = folder / "bad/report"
    hgnc = ["--hgnc", folder / "hgnc.tsv"]
    error = fails(monkeypatch, capsys, "--checkpoint", folder / "run", "--out", out, *hgnc, *arguments)
    assert message in error and not out.parent.exists()


@pytest.mark.parametrize("content", ["", "only a name\n", "set\t\tNOPE\tNOPE2\n"])
def test_a_gmt_without_a_usable_set(folder, monkeypatch, capsys, content):
    (folder / "bad.gmt").write_text(content)
    arguments = ("--gmt", folder / "bad.gmt", "--hgnc", folder / "hgnc.tsv", "--out", folder / "bad")
    assert "bad.gmt" in fails(monkeypatch, capsys, "--checkpoint", folder / "run", *arguments)
    assert not (folder / "bad").exists()


def test_a_missing_checkpoint(folder, monkeypatch, capsys):
    assert "nowhere" in fails(monkeypatch, capsys, "--checkpoint", folder / "nowhere", "--out", folder / "new")


@pytest.mark.parametrize("name", ["eval", "complete"])
def test_help_does_not_start_jax(name):
    code = (
        f"import sys; sys.argv = ['x', '--help']; import tcc_jax.{name} as command\n"
        "try: command.main()\n"
        "except SystemExit as stop: assert stop.code in (0, None) and 'jax' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "--checkpoint" in shown.stdout
