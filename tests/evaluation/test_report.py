import csv
import dataclasses
import html.parser
import json

import numpy as np
import pytest

from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.baselines.popularity import popularity, random_genes
from tcc_jax.completion.masks import mask_sets
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.corpus.vocabulary import genes_of
from tcc_jax.evaluation import plots
from tcc_jax.evaluation.metrics import run_method
from tcc_jax.evaluation.options import EvaluateOptions
from tcc_jax.evaluation.protocol import rarest_third
from tcc_jax.evaluation.report import FORMAT_VERSION, Report, write_report
from tests.completion.tiny import make_corpus

NASTY = "<script>alert('a\"&b')</script>/..\\π"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("report") / "corpus")


def make_report(corpus, **changes):
    sets = [
        dataclasses.replace(one, name=f"{NASTY}\t{place}", library=f"{NASTY} {place % 2}")
        for place, one in enumerate(sets_from_corpus(corpus, "test"))
    ]
    genes, rare = genes_of(corpus.vocabulary.size), rarest_third(corpus.vocabulary.counts, sets)
    trials = [mask_sets(sets, genes, seed=seed)[0] for seed in range(2)]
    scorers = {
        "model": SetNeighbours(TrainingIndex(corpus)),
        "popularity": popularity(corpus.vocabulary),
        NASTY: random_genes(corpus.vocabulary),
    }
    outcomes = [run_method(name, scorers[name], trials, genes, rare, name == "model") for name in scorers]
    fields = {
        "best_jaccard_N": np.linspace(0, 1, len(sets)),
        "left_out": {"EASE": f"no {NASTY}"},
        "curves": {"sweep": [(0.1, outcomes), (0.5, outcomes)], "noise": [(0.0, outcomes)]},
        "notes": [NASTY],
        "details": {
            "options": dataclasses.asdict(EvaluateOptions(NASTY, "out", (NASTY, "b.gmt"), visible=0.3, knn=(7, 2.0))),
            "checkpoint": {"path": NASTY, "step": 1234}, "corpus": None, "versions": {"tcc-jax": "9"},
            "sets_evaluated": 5, "sets_read": 6, "skipped": [{"name": NASTY, "library": NASTY, "reason": NASTY}],
        },
        **changes,
    }  # fmt: skip
    return Report(outcomes, trials, 0.05, 0, **fields)


def test_subsets_and_leaks_are_those_of_a_slow_count(corpus):
    report = make_report(corpus)
    outcome, count = report.outcomes[0], len(report.sets)
    assert report.leaks == {
        "sets": count,
        "with_training_set_at_jaccard": {
            level: sum(value >= float(level) for value in np.linspace(0, 1, count)) for level in ("0.3", "0.5", "0.9")
        },
    }
    recall = outcome.metrics["recall"].mean(axis=0)
    far = [place for place in range(count) if np.linspace(0, 1, count)[place] < 0.1]
    row = report.subsets["far_from_training"][0]
    assert row["sets"] == len(far) and row["method"] == "model"
    np.testing.assert_allclose(row["recall"], recall[far].mean())
    np.testing.assert_allclose(row["significant"], outcome.significant(0.05)[:, far].sum() / 2)
    assert row["low"] <= row["recall"] <= row["high"]
    libraries = {row["subset"]: row["sets"] for row in report.subsets["by_library"]}
    assert libraries == {f"{NASTY} 0": (count + 1) // 2, f"{NASTY} 1": count // 2}
    hidden = [len(one.hidden) for one in report.sets]
    sizes = {row["subset"]: row["sets"] for row in report.subsets["by_hidden_count"]}
    assert sizes["1 to 10"] == sum(size <= 10 for size in hidden) and sum(sizes.values()) == count
    significant = report.methods[0]["significant"]
    assert significant["per_seed"] == outcome.significant(0.05).sum(axis=1).tolist()
    assert significant["low"] <= significant["mean"] <= significant["high"]
    over = report.methods[0]["metrics"]["auroc_over_popularity"]["mean"]
    auroc = [np.mean(one.metrics["auroc"]) for one in report.outcomes[:2]]
    np.testing.assert_allclose(over, auroc[0] - auroc[1])


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_files(corpus, tmp_path):
    report = make_report(corpus)
    write_report(tmp_path, report, corpus.vocabulary, "completed", plots.can_plot())
    text = (tmp_path / "report.json").read_text()
    body = json.loads(text)
    assert body["format_version"] == FORMAT_VERSION == 4 and "NaN" not in text
    assert [row["method"] for row in body["methods"]] == ["model", "popularity", NASTY]
    assert len(body["curves"]["sweep"]) == 6 and body["left_out"] == {"EASE": f"no {NASTY}"}
    assert list(body["calibration"]) == ["model"]
    assert sum(body["calibration"]["model"]["genes"]) == sum(60 - len(one.visible) for one in report.sets)
    with open(tmp_path / "per_set.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 2 * len(report.sets) and {len(row) for row in rows} == {len(rows[0])}
    assert None not in rows[0] and rows[1]["name"] == f"{NASTY} 1"
    assert [int(row["model_hits"]) for row in rows] == report.outcomes[0].metrics["hits"].ravel().tolist()
    assert [int(row["universe"]) for row in rows] == [one.universe for sets in report.trials for one in sets]
    over = [float(row["model_auroc"]) - float(row["popularity_auroc"]) for row in rows]
    np.testing.assert_allclose([float(row["model_auroc_over_popularity"]) for row in rows], over, atol=1e-6)
    page = Tags()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and NASTY in page.text and f"no {NASTY}" in page.text
    for words in (
        f"{NASTY}, step 1,234",
        f"5 of 6 from {NASTY} b.gmt",
        ": --visible 0.3 --knn 7 2.0version: tcc_jax 9",
    ):
        assert words in page.text
    # Nothing is loaded from elsewhere: the plots are inside.
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    pytest.importorskip("matplotlib")
    names = {"significance", "recall", "recall_by_hidden_count", "recall_by_library", "sweep", "noise", "calibration"}
    assert {path.stem for path in tmp_path.glob("*.png")} == {path.stem for path in tmp_path.glob("*.svg")} == names
    assert len(page.sources) == len(names)


def test_the_same_report_gives_the_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, make_report(corpus, curves={}), corpus.vocabulary, "completed", plots.can_plot())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_without_the_corpus_or_curves(corpus):
    report = make_report(corpus, best_jaccard_N=None, curves={}, left_out={})
    text = report.text()
    assert report.leaks is None and "leak report" not in text and "far_from_training" not in report.subsets
    assert "model" in text and "left out" not in text
    # The columns whose names do not say it are explained.
    assert all(f"{name}: " in text for name in ("AP", "over popularity", "nats a gene", "rare recall", "significant"))


def test_a_method_looks_the_same_in_every_report_and_unlike_all_others():
    # All that `evaluate` has.
    names = {"model", "popularity", "random", "set-kNN", "relevance", "EASE", "auto-encoder", "mixture"}
    assert set(plots._STYLES) == names
    for looks in zip(*plots._STYLES.values(), plots._OTHER_STYLE, strict=True):
        assert len(set(looks)) == len(names) + 1


def test_the_significance_plot_shows_adjusted_p_values(corpus):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    report = make_report(corpus)
    plots._significance(report, figure)
    # The legend lies outside, over no curve.
    assert figure.legends and figure.axes[0].get_legend() is None
    lines = [line.get_ydata() for line in figure.axes[0].get_lines()]
    # Two of each method, the model last: the sets that are not significant, then those that are.
    for outcome, place in zip(report.outcomes, range(2 * len(report.outcomes), 0, -2), strict=True):
        heights = -outcome.log_adjusted_p[0] / np.log(10)
        significant = (heights >= -np.log10(0.05)).sum()
        pale, bold = lines[place - 2 : place]
        assert len(bold) == significant and (significant or outcome.method != "model")
        # The pale line begins where the other ends.
        whole = np.concatenate([bold, pale[min(significant, 1) :]])
        np.testing.assert_allclose(whole, np.sort(heights)[::-1], atol=1e-6)
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_no_mark_lies_on_the_frame_and_no_interval_on_another(corpus):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    report = make_report(corpus)
    recall, one_group, curve = Figure(), Figure(), Figure()
    plots._recall(report, recall)
    rows = report.subsets["by_library"]
    plots._groups(report, one_group, rows, [rows[0]["subset"]], "library")
    assert recall.axes[0].get_ylim() == (len(report.outcomes) - 0.5, -0.5)
    assert one_group.axes[0].get_ylim() == (0.5, -0.5)
    plots._curve(report, curve, report.curve_rows["sweep"], "share")
    places = [line.get_xdata()[0] for line in (bars.lines[0] for bars in curve.axes[0].containers)]
    assert len(set(places)) == len(report.outcomes)
    np.testing.assert_allclose(np.mean(places), 10)
