import csv
import html
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tcc_jax import eval as command
from tcc_jax.corpus.store import open_corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.evaluation.metrics import METRICS, run_method
from tests.completion.tiny import NUM_GENES, STEP, make_corpus, make_run, write_hgnc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    make_run(folder / "run", make_corpus(folder / "corpus"))
    write_hgnc(folder / "hgnc.tsv")
    return folder


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


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
    assert report["format_version"] == 4 and report["checkpoint"]["step"] == STEP
    assert report["sets_evaluated"] == 27 and len(rows) == 3 * 27 and report["skipped"] == []
    for name in (*METRICS, "rare_recall", "nats_per_hidden_gene", "auroc_over_popularity"):
        assert f"model_{name}" in rows[0] and (f"popularity_{name}" in rows[0]) == ("nats" not in name)
    assert all(
        float(row["model_precision_at_10"]) * 10 <= float(row["model_hits"]) for row in rows if int(row["drawn"]) >= 10
    )
    methods = {row["method"]: row for row in report["methods"]}
    assert list(methods) == ["model", "popularity", "random", "set-kNN", "relevance"]
    assert report["left_out"] == dict.fromkeys(["EASE", "auto-encoder"], "run with --baselines all")
    # Sets are drawn from families of 20 genes: neighbours know them, chance and popularity don't.
    recalls = {name: row["metrics"]["recall"] for name, row in methods.items()}
    assert recalls["set-kNN"]["mean"] > 0.25 > recalls["random"]["mean"]
    for name, prefix in (
        ("model", "model_"),
        ("popularity", "popularity_"),
        ("set-kNN", "set_knn_"),
        ("relevance", "relevance_"),
    ):
        recall = [int(row[f"{prefix}hits"]) / int(row["hidden"]) for row in rows]
        np.testing.assert_allclose(np.mean(recall), recalls[name]["mean"], rtol=1e-6)
        per_seed = [sum(row[f"{prefix}significant"] == "yes" for row in rows if row["seed"] == seed) for seed in "012"]
        assert methods[name]["significant"]["per_seed"] == per_seed
        assert recalls[name]["low"] <= recalls[name]["mean"] <= recalls[name]["high"]
    lines = [line.split("\t") for line in (out / "completions.gmt").read_text().splitlines()]
    assert [line[0] for line in lines] == [row["name"] for row in rows[:27]]
    assert {line[1] for line in lines} == {f"completed by tcc_jax step {STEP}"}
    assert [len(line) - 2 for line in lines] == [int(row["hidden"]) for row in rows[:27]]
    compared = [(row["metric"], row["subset"], row["baseline"]) for row in report["comparisons"]]
    whats = (("recall", "all"), ("rare_recall", "all"), ("recall", "far_from_training"))
    assert compared == [(*what, name) for what in whats for name in list(methods)[1:]]
    assert report["leaks"]["sets"] == 27 and "nats_per_hidden_gene" in methods["model"]["metrics"]
    corpus = open_corpus(folder / "corpus")
    counts = corpus.vocabulary.counts
    tested = sorted(counts[sorted({id_ for index in corpus.indices("test") for id_ in corpus.genes(index)})])
    held = tested[len(tested) // 3 - 1]
    share = f"{np.mean(counts[NUM_SPECIAL:] <= held):.0%}"
    assert f"rare are genes held by at most {held} training sets ({share} of the vocabulary)" in report["notes"]
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    documented = [name for name in (*report, *rows[0]) if not name.startswith(("model_", "popularity_", "random_"))]
    for name in (name for name in documented if not name.startswith(("set_knn_", "relevance_"))):
        assert f"`{name}`" in readme, name
    page = html.unescape((out / "report.html").read_text())
    for words in (
        f"checkpoint: {folder / 'run'}, step {STEP}<", f"sets: 27 of 27 from test split of {folder / 'corpus'}<",
        "options: the defaults<", f"version: tcc_jax {report['versions']['tcc-jax']}<",
    ):  # fmt: skip
        assert f"<li>{words}" in page
    pytest.importorskip("matplotlib")
    assert (out / "significance.png").stat().st_size > 10_000 and (out / "significance.svg").exists()
    shown = capsys.readouterr().out
    assert (
        f"a random 20% of the genes of each set are visible, at least one, and as many are drawn as are hidden; the "
        f"universe is the {NUM_GENES} genes that can be drawn" in shown
    )
    for word in ("popularity", "set-kNN", "EASE: left out, run with --baselines all", "leak report", "sets won"):
        assert word in shown


def test_all_baselines_sweep_and_noise(folder, monkeypatch, capsys):
    arguments = ("--checkpoint", folder / "run", "--seeds", 1, "--baselines", "all", "--autoencoder-steps", 3,
                 "--ease-genes", 40, "--sweep", "--noise", "--limit", 9)  # fmt: skip
    run(monkeypatch, *arguments, "--out", folder / "all")
    report = json.loads((folder / "all/report.json").read_text())
    names = ["model", "popularity", "random", "set-kNN", "relevance", "EASE", "auto-encoder"]
    assert [row["method"] for row in report["methods"]] == names and report["left_out"] == {}
    assert report["sets_evaluated"] == 9
    flags = "--limit 9 --baselines all --ease-genes 40 --autoencoder-steps 3 --sweep --noise --seeds 1"
    assert f"<li>options: {flags}</li>" in (folder / "all/report.html").read_text()
    curves = report["curves"]
    assert [row["share"] for row in curves["sweep"]][:: len(names)] == [0.05, 0.1, 0.2, 0.5, 0.8]
    assert [row["share"] for row in curves["noise"]][:: len(names)] == [0, 0.2, 0.5]
    # 20 % visible without false genes is the evaluation itself.
    recall = [row["metrics"]["recall"]["mean"] for row in report["methods"]]
    assert [row["recall"] for row in curves["noise"]][: len(names)] == recall
    assert [row["recall"] for row in curves["sweep"]][2 * len(names) : 3 * len(names)] == recall
    # In sets of this size 5 and 10 % are one gene.
    for name, different in (("sweep", 4), ("noise", 3)):
        recalls = [row["recall"] for row in curves[name]]
        assert len({tuple(recalls[at : at + len(names)]) for at in range(0, len(recalls), len(names))}) == different
    shown = capsys.readouterr().out
    assert "the 40 most frequent of 60 genes" in shown and "configuration of GSFM" in shown and "tuned on" in shown


def test_points_of_the_curves_that_are_the_evaluation_itself_are_not_run_again(folder, monkeypatch):
    methods, real = [], run_method
    monkeypatch.setattr("tcc_jax.evaluation.evaluate.run_method", lambda *a: methods.append(a[0]) or real(*a))
    run(monkeypatch, "--checkpoint", folder / "run", "--seeds", 2, "--sweep", "--noise", "--out", folder / "curves")
    # The evaluation, four more shares and two more of noise.
    assert methods.count("model") == 1 + 4 + 2
    report, rows = json.loads((folder / "curves/report.json").read_text()), read_table(folder / "curves/per_set.tsv")
    first = [row for row in rows if row["seed"] == "0"]
    for row in (report["curves"]["noise"][0], report["curves"]["sweep"][2 * 5]):
        assert row["method"] == "model"
        np.testing.assert_allclose(row["recall"], np.mean([float(one["model_recall"]) for one in first]), rtol=1e-6)
        assert row["significant"] == sum(one["model_significant"] == "yes" for one in first)


def test_another_seed_fits_nothing_again(folder, monkeypatch):
    arguments = ("--checkpoint", folder / "run", "--seeds", 1, "--baselines", "all", "--autoencoder-steps", 3,
                 "--ease-genes", 40, "--limit", 9)  # fmt: skip
    run(monkeypatch, *arguments, "--out", folder / "seed 0")
    for fit in ("baselines.autoencoder._fit", "baselines.ease._fit_ease", "completion.tuning._tune"):
        monkeypatch.setattr(f"tcc_jax.{fit}", None)
    run(monkeypatch, *arguments, "--seed", 1, "--out", folder / "seed 1")


def test_mixture_and_given_neighbours(folder, monkeypatch, capsys):
    arguments = ("--checkpoint", folder / "run", "--seeds", 1, "--mixture", "--limit", 9)
    run(monkeypatch, *arguments, "--knn", 3, 2.5, "--out", folder / "mixed")
    report = json.loads((folder / "mixed/report.json").read_text())
    names = ["model", "popularity", "random", "set-kNN", "relevance", "mixture"]
    assert [row["method"] for row in report["methods"]] == names and list(report["left_out"]) == [
        "EASE",
        "auto-encoder",
    ]
    compared = [(row["method"], row["baseline"]) for row in report["comparisons"]]
    assert compared == 3 * compared[: len(compared) // 3]
    assert compared[: len(compared) // 3] == [("model", name) for name in names[1:]] + [
        ("mixture", name) for name in names[1:5]
    ]
    shown = capsys.readouterr().out
    assert "nearest 3 training sets, idf cosine to the power 2.5, as given" in shown
    assert "note: mixture: log(" in shown and "log(1 p" not in shown and "mixture against set-kNN" in shown
    assert "mixture_recall" in read_table(folder / "mixed/per_set.tsv")[0]
    with_nats = [row["method"] for row in report["methods"] if "nats_per_hidden_gene" in row["metrics"]]
    assert with_nats == ["model", "mixture"] == list(report["calibration"])
    drawn = {name: (folder / "mixed" / name).read_text() for name in ("completions.gmt", "completions_mixture.gmt")}
    sizes = [[line.count("\t") for line in text.splitlines()] for text in drawn.values()]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 9 and len(set(drawn.values())) == 2


def test_more_visible_genes_than_a_row_holds(folder, monkeypatch, capsys):
    monkeypatch.setattr("tcc_jax.completion.model.Model.prompt_limit", property(lambda self: 31))
    (folder / "long.gmt").write_text("long\t\t" + "\t".join(f"G{index}" for index in range(60)) + "\n")
    run(monkeypatch, "--checkpoint", folder / "run", "--hgnc", folder / "hgnc.tsv", "--gmt", folder / "long.gmt",
        "--out", folder / "long", "--visible", 0.9)  # fmt: skip
    report = json.loads((folder / "long/report.json").read_text())
    assert report["prompts_cut"] == 1
    assert "1 sets show more than 31 genes: the model sees a random subset" in capsys.readouterr().out
    # Six are left, and all of them are drawn: the genes that the model was not shown stay visible.
    row = read_table(folder / "long/per_set.tsv")[0]
    assert (row["visible"], row["model_hits"], row["drawn"]) == ("54", "6", "6")


def tcc_files(folder, name, universe=100):
    sets = {"first": "G1 G2 NOPE G3 G4 G5", "nothing drawn": "G7 G8 G9", "unknown": "NOPE G3 G4 NOPE2"}
    lines = [f"{set_name}\tTheLibrary\t" + "\t".join(genes.split()) for set_name, genes in sets.items()]
    # A title is no set: it has no place among those that are counted.
    (folder / f"{name}.gmt").write_text("\n".join(["a title", *lines]) + "\n")
    rows = [
        "name\thits\tmissed\textra\tneither",
        f"first\t1\t2\t5\t{universe - 8}",
        f"nothing drawn\t0\t2\t0\t{universe - 2}",
        f"unknown\t3\t0\t4\t{universe - 7}",
    ]
    (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return ("--checkpoint", folder / "run", "--hgnc", folder / "hgnc.tsv", "--gmt", folder / f"{name}.gmt",
            "--protocol", "tcc", "--drawn-counts", folder / f"{name}.tsv", "--out", folder / name)  # fmt: skip


@pytest.mark.parametrize(
    ("drawn", "counts", "universe"),
    [("recorded", [6, 0, 7], 100), ("hidden", [3, 2, 3], 100), ("hidden", [3, 2, 3], 60)],
)
def test_tcc_protocol(folder, monkeypatch, capsys, drawn, counts, universe):
    arguments = tcc_files(folder, f"tcc-{drawn}-{universe}", universe)
    run(monkeypatch, *arguments, "--drawn", drawn, "--library-from", "description")
    out = folder / f"tcc-{drawn}-{universe}"
    report, rows = json.loads((out / "report.json").read_text()), read_table(out / "per_set.tsv")
    assert [int(row["drawn"]) for row in rows] == counts and [int(row["hidden"]) for row in rows] == [3, 2, 3]
    assert [one["name"] for one in report["skipped"]] == ["a title"]
    assert [int(row["visible"]) for row in rows] == [2, 1, 0] and {row["library"] for row in rows} == {"TheLibrary"}
    if drawn == "recorded":
        assert float(rows[1]["model_log10_p"]) == 0 and rows[1]["model_recall"] == "0"
        assert "1 sets, for which the original drew nothing, have p = 1" in " ".join(report["notes"])
    shown = capsys.readouterr().out
    assert f"the recorded universe is {universe}, and 60 genes can be drawn" in shown
    assert ("padding lowers every p" in shown) == (universe > 60)
    # 3 of 3 hidden genes with 7 drawn from 100: p = 2e-4 (from 60: 1e-3); the others are not.
    assert "the recorded tables: 1 of 3 sets significant at 0.05, recall 0.444" in shown
    completed = [line.split("\t") for line in (out / "completions.gmt").read_text().splitlines()]
    assert [len(line) - 2 for line in completed] == [count for count in counts if count]


def test_no_hidden_gene_is_in_the_vocabulary(folder, monkeypatch):
    (folder / "unknown.gmt").write_text("one\t\tG1\tG2\tNOPE\ntwo\t\tG3\tNOPE\tNOPE2\n")
    (folder / "unknown.tsv").write_text("name\thits\tmissed\textra\tneither\none\t0\t1\t3\t96\ntwo\t0\t2\t3\t95\n")
    run(monkeypatch, "--checkpoint", folder / "run", "--hgnc", folder / "hgnc.tsv", "--gmt", folder / "unknown.gmt",
        "--protocol", "tcc", "--drawn-counts", folder / "unknown.tsv", "--out", folder / "unknown")  # fmt: skip
    report = json.loads((folder / "unknown/report.json").read_text())
    assert report["methods"][0]["metrics"]["recall"]["mean"] == 0
    pytest.importorskip("matplotlib")
    # What has no hit has no place on a logarithmic scale.
    assert (folder / "unknown/recall.png").exists() and not (folder / "unknown/calibration.png").exists()


def test_other_drawn_counts_are_refused(folder, monkeypatch, capsys):
    arguments = tcc_files(folder, "wrong")
    path = folder / "wrong.tsv"
    path.write_text(path.read_text().replace("unknown", "other"))
    assert f"{path}: line 4: set 'other'" in fails(monkeypatch, capsys, *arguments)
    assert not (folder / "wrong").exists()


def test_a_background_file(folder, monkeypatch):
    (folder / "background.txt").write_text("\n".join(f"G{index}" for index in range(30)))
    arguments = ("--checkpoint", folder / "run", "--hgnc", folder / "hgnc.tsv", "--out", folder / "background")
    run(monkeypatch, *arguments, "--background", folder / "background.txt", "--seeds", 1)
    report = json.loads((folder / "background/report.json").read_text())
    assert report["genes_that_can_be_drawn"] == 30 and report["skipped"]
    # Sets of the corpus have no gene outside its vocabulary.
    outside = [int(row["outside_background"]) for row in read_table(folder / "background/per_set.tsv")]
    assert report["genes_outside_background"] == sum(outside) > 0 == report["genes_outside_vocabulary"]
    notes = " ".join(report["notes"])
    assert f"{sum(outside)} genes of the vocabulary outside it" in notes and "genes outside the vocabulary" not in notes
    drawn = [line.split("\t")[2:] for line in (folder / "background/completions.gmt").read_text().splitlines()]
    assert all(int(gene[1:]) < 30 for genes in drawn for gene in genes)


def test_symbols_of_another_case(folder, monkeypatch, capsys):
    (folder / "mouse.gmt").write_text("m\t\t" + "\t".join(f"g{index}" for index in range(20)) + "\n")
    arguments = ("--checkpoint", folder / "run", "--hgnc", folder / "hgnc.tsv", "--gmt", folder / "mouse.gmt",
                 "--seeds", 1, "--out", folder / "mouse")  # fmt: skip
    assert "no set has two genes in the model's vocabulary" in fails(monkeypatch, capsys, *arguments)
    run(monkeypatch, *arguments, "--case-insensitive")
    report = json.loads((folder / "mouse/report.json").read_text())
    assert report["source"]["symbols"]["mentions"] == {"case": 20} and report["sets_evaluated"] == 1


def test_gmt_with_awkward_sets_and_without_the_corpus(folder, monkeypatch, capsys):
    genes = [f"G{index}" for index in range(20)]
    lines = [
        ["../a/b", "", *genes],
        ["one gene", "", "G1", "NOPE"],
        ["none", "", "NOPE", "NOPE2"],
        ["old, ambiguous, absent", "", "OLD1", "G2", "G3", "TWO", "G99", "NOPE", "G1"],
        ["empty", "", ""],
        ["everything", "", *(f"G{index}" for index in range(60))],
    ]
    gmt = folder / "awkward.gmt"
    gmt.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    moved = (folder / "corpus").rename(folder / "elsewhere")
    try:
        run(monkeypatch, "--checkpoint", folder / "run/checkpoints" / str(STEP), "--gmt", gmt,
            "--hgnc", folder / "hgnc.tsv", "--out", folder / "awkward", "--seed", 3, "--seeds", 1)  # fmt: skip
    finally:
        moved.rename(folder / "corpus")
    report = json.loads((folder / "awkward/report.json").read_text())
    rows = read_table(folder / "awkward/per_set.tsv")
    assert [row["name"] for row in rows] == ["../a/b", "old, ambiguous, absent", "everything"]
    assert [one["name"] for one in report["skipped"]] == ["one gene", "none", "empty"]
    # OLD1 and G1 are one gene; TWO, G99 and NOPE are left out and counted.
    assert (rows[1]["visible"], rows[1]["hidden"], rows[1]["outside_vocabulary"]) == ("1", "2", "3")
    assert rows[2]["visible"] == "12" and rows[2]["model_hits"] == "48" and float(rows[2]["model_log10_p"]) == 0
    assert list(report["left_out"]) == ["set-kNN", "relevance", "EASE", "auto-encoder"] and report["leaks"] is None
    assert [row["method"] for row in report["methods"]] == ["model", "popularity", "random"]
    symbols = report["source"]["symbols"]
    assert symbols["mentions"]["previous"] == 1 and symbols["mentions"]["ambiguous"] == 1
    assert symbols["not_mapped"]["most_frequent"] == {"NOPE": 3, "NOPE2": 1, "TWO": 1}
    assert symbols["not_in_vocabulary"]["most_frequent"] == {"G99": 1}
    # 12 of the 60 genes are shown, as many as fit; the whole vocabulary leaves nothing to be wrong about.
    shown = capsys.readouterr()
    assert "set-kNN: left out, the corpus" in shown.out and "the leak report are left out" in shown.out
    assert shown.err.splitlines()[-5:-1] == [
        f"sets without genes: 1 (first: {gmt}:5)",
        "skipped awkward/one gene: 1 of its 2 genes in the vocabulary; 2 are needed",
        "skipped awkward/none: 0 of its 2 genes in the vocabulary; 2 are needed",
        "skipped awkward/empty: no gene",
    ]


def test_the_report_is_in_place_before_it_is_printed(folder, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--checkpoint", folder / "run", "--out", folder / "closed", "--split", "validation")
    assert stop.value.code == 141 and (folder / "closed/report.json").exists()


def test_same_input_gives_the_same_bytes(folder, monkeypatch):
    for name in ("first", "second"):
        run(monkeypatch, "--checkpoint", folder / "run", "--out", folder / name, "--split", "validation")
    for name in ("per_set.tsv", "completions.gmt", "report.html"):
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
    (out / "corpus.json").write_text("{}")
    assert "holds no report.json, so not overwritten" in fails(monkeypatch, capsys, *arguments, "--overwrite")
    (out / "corpus.json").unlink()
    (out / "report.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(monkeypatch, *arguments, "--overwrite")
    assert sorted(file.name for file in out.iterdir()) == [
        "completions.gmt", "per_set.tsv", "report.html", "report.json",
    ]  # fmt: skip
    error = capsys.readouterr().err
    # Before the evaluation, not after it; an installation that is broken is said to be.
    assert error.startswith("no plots: matplotlib ") and ("matplotlib.figure" in error or "not installed" in error)


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
        (["--visible", "1"], "--visible 1.0: must be above 0 and under 1"),
        (["--alpha", "0"], "--alpha 0.0: must be above 0 and under 1"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999: must lie between 0 and 4,294,967,295"),
        (["--corpus", "missing"], "missing"),
        (["--visible", "many"], "visible"),
        (["--seeds", "0"], "--seeds 0"),
        (["--seeds", "100000000000"], "--seeds 100000000000: at most 1,000"),
        (["--ease-genes", "0"], "--ease-genes"),
        (["--ease-penalty", "0"], "--ease-penalty"),
        (["--ease-penalty", "1e300"], "--ease-penalty 1e+300: must be a number above 0 and under 1e38"),
        (["--baselines", "all", "--ease-penalty", "1e-30"], "--ease-penalty 1e-30: no weights can be computed"),
        (["--autoencoder-steps", "0"], "--autoencoder-steps"),
        (["--limit", "0"], "--limit"),
        (["--knn", "5"], "--knn: no type matching {None}|{INT FLOAT} could be instantiated from ['5']; see python"),
        (["--knn", "0", "3"], "--knn"),
        (["--knn", "500", "0"], "--knn"),
        (["--background", "missing.txt"], "--background missing.txt: no such file"),
        (["--background", "."], "--background .: is a folder; name a file"),
        (["--drawn-counts", "counts.tsv"], "--protocol tcc"),
        (["--protocol", "tcc"], "--drawn-counts"),
        *(
            (
                ["--protocol", "tcc", "--gmt", "x.gmt", "--drawn-counts", "x.tsv", *option],
                f"{option[0]} goes with the def",
            )
            for option in (["--sweep"], ["--visible", "0.5"], ["--seeds", "1"], ["--background", "x.txt"])
        ),
        (["--gmt", "x.gmt", "--split", "train"], "--split goes with the sets of a corpus; leave out --gmt"),
        (["--library-from", "description"], "--library-from goes with --gmt"),
        (["--case-insensitive"], "--case-insensitive goes with --gmt or --background"),
        (["--drawn", "hidden"], "--drawn goes with --protocol tcc"),
        (["--ease-genes", "40"], "--ease-genes goes with --baselines all"),
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


def test_an_empty_split(folder, monkeypatch, capsys):
    monkeypatch.setattr("tcc_jax.evaluation.evaluate.sets_from_corpus", lambda corpus, split: [])
    error = fails(monkeypatch, capsys, "--checkpoint", folder / "run", "--out", folder / "new")
    assert f"the test split of {folder / 'corpus'} is empty" in error


def test_what_is_missing_is_found_before_the_model_is_opened(folder, monkeypatch, capsys):
    for flag in ("--background", "--hgnc"):
        error = fails(monkeypatch, capsys, "--checkpoint", folder / "nowhere", "--out", folder / "new", flag, "missing")
        assert error == f"error: {flag} missing: no such file"


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
