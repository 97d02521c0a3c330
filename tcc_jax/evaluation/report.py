"""Reports of an evaluation: tables for the terminal and the page, JSON, one line a set and seed, completions as GMT."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcc_jax.completion.masks import MaskedSet
from tcc_jax.corpus.gmt import GeneSet, write_gmt
from tcc_jax.corpus.similarity import LEAK_LEVELS, leak_counts
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.evaluation.metrics import Outcome, bootstrap, compare, mean
from tcc_jax.evaluation.options import REPORT_FILE
from tcc_jax.evaluation.page import write_page
from tcc_jax.evaluation.plots import draw_plots
from tcc_jax.terminal import one_line, table

FORMAT_VERSION = 4
FAR = 0.1
_SIZES = (10, 20, 50, 100, 200)
_LIBRARIES_SHOWN = 12


class Table(NamedTuple):
    """A table to show: every cell is a string or an int; the lines of `note`, and the plots named, stand below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    plots: Sequence[str] = ()

    def text(self) -> str:
        """Return it as plain text."""
        return f"{self.title}\n{table(self.header, self.rows)}" + (f"\n{self.note}" if self.note else "")


@dataclass(frozen=True)
class Report:
    """An evaluation, ready to be shown.

    Attributes:
        outcomes: the model first, then the baselines.
        trials: for each seed the sets that were completed, in the order of the outcomes' arrays.
        alpha: level of significance.
        seed: of the bootstrap.
        best_jaccard_N: [N] float64, each set's largest Jaccard to a training set, over the genes of the vocabulary;
            None without the corpus.
        left_out: baselines that were not run, each with the reason.
        curves: for `sweep` and `noise`, the share and the outcomes of each point.
        notes: what a reader must know to read the numbers, one sentence each.
        unread: lines of the input that are not sets, and sets that could not be evaluated, for the end of a terminal.
        details: what else is needed to repeat the evaluation, as JSON values.
    """

    outcomes: Sequence[Outcome]
    trials: Sequence[Sequence[MaskedSet]]
    alpha: float
    seed: int
    best_jaccard_N: np.ndarray | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, list[Outcome]]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    unread: Sequence[str] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def sets(self) -> Sequence[MaskedSet]:
        """The sets as the first seed masks them."""
        return self.trials[0]

    @functools.cached_property
    def methods(self) -> list[dict[str, Any]]:
        """For each method, JSON values: every metric's mean over sets with its 95 % interval, and sets significant."""
        popularity = next((one for one in self.outcomes if one.method == "popularity"), None)
        rows = []
        for outcome in self.outcomes:
            names = list(outcome.metrics)
            values_NM = np.stack([outcome.per_set(name) for name in names], axis=1)
            if popularity is not None:
                names.append("auroc_over_popularity")
                difference_N = outcome.per_set("auroc") - popularity.per_set("auroc")
                values_NM = np.column_stack([values_NM, difference_N])
            low_M, high_M = bootstrap(values_NM, self.seed)
            rows.append(
                {
                    "method": outcome.method,
                    "sets": len(self.sets),
                    "seeds": len(self.trials),
                    "significant": self._significant(outcome),
                    "metrics": {
                        name: {
                            "mean": mean(values_NM[:, column]),
                            "low": low_M[column],
                            "high": high_M[column],
                            "sets": int(np.isfinite(values_NM[:, column]).sum()),
                        }
                        for column, name in enumerate(names)
                    },
                }
            )
        return rows

    @functools.cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        """The model, and the mixture, against each other method, as `metrics.compare`: over all sets, and where
        retrieval has little to go on, of rare genes and of the sets far from training.
        """
        model, *others = self.outcomes
        pairs = [(model, other) for other in others]
        pairs += [(one, other) for one in others if one.method == "mixture" for other in others if other is not one]
        whats: list[tuple[str, str, np.ndarray | None]] = [("recall", "all", None), ("rare_recall", "all", None)]
        if self.best_jaccard_N is not None:
            whats.append(("recall", "far_from_training", self.best_jaccard_N < FAR))
        return [
            {"subset": subset, **compare(*pair, self.seed, metric, chosen_N)}
            for metric, subset, chosen_N in whats
            for pair in pairs
        ]

    @functools.cached_property
    def leaks(self) -> dict[str, Any] | None:
        """How many sets have a training set at a Jaccard of 0.3, 0.5 and 0.9; None without the corpus."""
        return None if self.best_jaccard_N is None else leak_counts(self.best_jaccard_N)

    @functools.cached_property
    def subsets(self) -> dict[str, list[dict[str, Any]]]:
        """Recall and significance by library, by hidden count, and of the sets without a training neighbour."""
        libraries = np.array([one.library for one in self.sets], object)
        by_count = sorted(set(libraries), key=lambda name: (-int((libraries == name).sum()), name))
        hidden_N = np.array([one.hidden_count for one in self.sets])
        edges = (0, *_SIZES, math.inf)
        sizes = [
            (f"{low + 1} to {high}" if high < math.inf else f"over {low}", (hidden_N > low) & (hidden_N <= high))
            for low, high in itertools.pairwise(edges)
        ]
        found = {"by_library": self._rows([(name, libraries == name) for name in by_count])}
        found["by_hidden_count"] = self._rows(sizes)
        if self.best_jaccard_N is not None:
            far_N = self.best_jaccard_N < FAR
            found["far_from_training"] = self._rows([(f"best training Jaccard under {FAR:g}", far_N)])
        return found

    @functools.cached_property
    def curve_rows(self) -> dict[str, list[dict[str, Any]]]:
        """Recall and significance at each point of `curves`, method by method."""
        return {
            name: [{"share": share, **row} for share, outcomes in points for row in self._rows_of(outcomes)]
            for name, points in self.curves.items()
        }

    def body(self) -> dict[str, Any]:
        """Return what report.json holds; numbers that are not defined are null."""
        calibrations = {one.method: asdict(one.calibration) for one in self.outcomes if one.calibration is not None}
        body = {
            "format_version": FORMAT_VERSION,
            **self.details,
            "notes": list(self.notes),
            "left_out": self.left_out,
            "methods": self.methods,
            "comparisons": self.comparisons,
            "leaks": self.leaks,
            "subsets": self.subsets,
            "curves": self.curve_rows,
            "calibration": {
                method: {name: array.tolist() for name, array in arrays.items()}
                for method, arrays in calibrations.items()
            },
        }
        return _plain(body)

    def tables(self) -> list[Table]:
        """Return the tables to show, most important first."""
        shown = [
            self._summary_table(),
            self._metrics_table(),
            self._paired_table(),
            self._hard_table(),
            self._leak_table(),
        ]
        for key, title, what, most in (
            ("by_library", "By library", "library", _LIBRARIES_SHOWN),
            ("by_hidden_count", "By number of hidden genes", "hidden genes", None),
        ):
            one = self._subset_table(title, what, self.subsets[key], most)
            shown.append(one._replace(plots=[f"recall_{key}"]))
        if "far_from_training" in self.subsets:
            title = f"Sets far from the training sets (best Jaccard under {FAR:g})"
            shown.append(self._subset_table(title, "which", self.subsets["far_from_training"]))
        for name, title in (("sweep", "Visible share"), ("noise", "Share of false genes in the prompt")):
            if name in self.curves:
                shown.append(self._curve_table(title, self.curve_rows[name])._replace(plots=[name]))
        return [one for one in shown if one.rows]

    def text(self) -> str:
        """Return the tables and the notes as plain text."""
        return "\n\n".join([*(one.text() for one in self.tables()), *(f"note: {note}" for note in self.notes)])

    @property
    def _significant_sets(self) -> str:
        return "sets significant, mean over the seeds" if len(self.trials) > 1 else "sets significant"

    def _significant(self, outcome: Outcome) -> dict[str, Any]:
        counts_S = outcome.significant(self.alpha).sum(axis=1)
        return {
            "mean": float(counts_S.mean()), "low": int(counts_S.min()), "high": int(counts_S.max()),
            "per_seed": counts_S.tolist(),
        }  # fmt: skip

    def _rows(self, subsets: Sequence[tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
        return [
            {"subset": name, **row}
            for name, chosen_N in subsets
            if chosen_N.any()
            for row in self._rows_of(self.outcomes, chosen_N)
        ]

    def _rows_of(self, outcomes: Sequence[Outcome], chosen_N: np.ndarray | None = None) -> list[dict[str, Any]]:
        rows = []
        for outcome in outcomes:
            recall_N, significant_SN = outcome.per_set("recall"), outcome.significant(self.alpha)
            if chosen_N is not None:
                recall_N, significant_SN = recall_N[chosen_N], significant_SN[:, chosen_N]
            low, high = bootstrap(recall_N[:, None], self.seed)
            rows.append(
                {
                    "method": outcome.method, "sets": len(recall_N), "recall": mean(recall_N), "low": low[0],
                    "high": high[0], "significant": float(significant_SN.sum(axis=1).mean()),
                }
            )  # fmt: skip
        return rows

    def _summary_table(self) -> Table:
        several = len(self.trials) > 1
        header = [
            "method",
            "recall",
            "95 % interval",
            f"significant at {self.alpha:g}",
            *(["range"] if several else []),
        ]
        rows: list[list[object]] = []
        for row in self.methods:
            recall, significant = row["metrics"]["recall"], row["significant"]
            count = f"{significant['mean']:,.1f}".removesuffix(".0")
            share = f"{count} ({significant['mean'] / row['sets']:.1%})"
            spread = [f"{significant['low']:,} to {significant['high']:,}"] if several else []
            rows.append([row["method"], _number(recall["mean"]), _interval(recall), share, *spread])
        meaning = [
            *(f"{name}: left out, {reason}" for name, reason in self.left_out.items()),
            "recall: share of the hidden genes that are among the drawn ones, mean over sets",
            "significant: p of the overlap, adjusted by Benjamini and Hochberg over the sets"
            + (" of a seed; mean and range over the seeds" if several else ""),
        ]
        seeds = f"{len(self.trials)} seeds" if several else "one seed"
        plots = ("significance", "recall")
        return Table(f"{len(self.sets):,} sets, {seeds}", header, rows, "\n".join(meaning), plots)

    def _metrics_table(self) -> Table:
        columns = {
            "P@10": "precision_at_10", "nDCG@100": "ndcg_at_100", "AP": "average_precision", "AUROC": "auroc",
            "over popularity": "auroc_over_popularity", "rare recall": "rare_recall",
            "nats a gene": "nats_per_hidden_gene",
        }  # fmt: skip
        rows: list[list[object]] = []
        for row in self.methods:
            values = (row["metrics"].get(name, {}).get("mean") for name in columns.values())
            rows.append([row["method"], *map(_number, values)])
        rare = self.methods[0]["metrics"]["rare_recall"]["sets"]
        meaning = [
            "AP: average precision, the mean of the precision at each hidden gene's rank",
            "AUROC over the vocabulary, equal scores by popularity; over popularity: AUROC less that of popularity",
            f"rare recall: over the {rare:,} sets that hide a rare gene, these ranked alone",
            "nats a gene: -ln of the probability that a model gives to a hidden gene, mean; lower is better",
        ]
        return Table("Other measures, means over sets", ["method", *columns], rows, "\n".join(meaning), ["calibration"])

    def _paired_table(self) -> Table:
        rows = [
            [
                f"{one['method']} against {one['baseline']}", one["won"], one["lost"], one["tied"],
                f"{one['difference']:+.4f}",
                f"{one['difference_low']:+.4f} to {one['difference_high']:+.4f}", f"{one['wilcoxon_p']:.2g}",
            ]
            for one in self.comparisons
            if (one["metric"], one["subset"]) == ("recall", "all")
        ]  # fmt: skip
        header = ("", "sets won", "lost", "tied", "recall difference", "95 % interval", "p (Wilcoxon)")
        return Table("Paired comparison of the recall of each set", header, rows)

    def _hard_table(self) -> Table:
        shown: dict[str, list[str]] = {}
        for one in self.comparisons:
            if (one["metric"], one["subset"]) != ("recall", "all"):
                cells = shown.setdefault(f"{one['method']} against {one['baseline']}", [])
                if one["won"] + one["lost"] + one["tied"]:
                    spread = f"{one['difference_low']:+.4f} to {one['difference_high']:+.4f}"
                    cells.append(f"{one['difference']:+.4f} ({spread})")
                else:
                    cells.append("no such set")
        header = ["", "rare recall", *(["recall, far sets"] if self.best_jaccard_N is not None else [])]
        rows = [(name, *cells) for name, cells in shown.items()]
        note = f"differences and 95 % intervals; far: best training Jaccard under {FAR:g}"
        return Table("Paired comparison where retrieval has little to go on", header, rows, note)

    def _leak_table(self) -> Table:
        if self.leaks is None:
            return Table("", (), ())
        counts = list(self.leaks["with_training_set_at_jaccard"].values())
        header = ("leak report", *(f"Jaccard {level:g}" for level in LEAK_LEVELS))
        rows = [(f"of {len(self.sets):,} sets, those with a training set at", *counts)]
        return Table("How near the sets are to the training sets", header, rows, "over the genes of the vocabulary")

    def _subset_table(self, title: str, what: str, rows: list[dict[str, Any]], most: int | None = None) -> Table:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["subset"], []).append(row)
        header = (what, "sets", *(outcome.method for outcome in self.outcomes))
        shown = [
            (name, group[0]["sets"], *(_recall_cell(row, 1) for row in group))
            for name, group in list(groups.items())[:most]
        ]
        left = len(groups) - len(shown)
        more = f"; {left:,} more with fewer sets are in report.json" if left else ""
        return Table(title, header, shown, f"recall ({self._significant_sets}){more}")

    def _curve_table(self, title: str, rows: list[dict[str, Any]]) -> Table:
        shown: dict[float, list[str]] = {}
        for row in rows:
            shown.setdefault(row["share"], [f"{row['share']:.0%}"]).append(_recall_cell(row, 0))
        header = (title.lower(), *(outcome.method for outcome in self.outcomes))
        first = ", first seed" if len(self.trials) > 1 else ""
        return Table(title, header, list(shown.values()), f"recall (sets significant){first}")


def write_report(folder: Path, report: Report, vocabulary: Vocabulary, completed_by: str, with_plots: bool) -> None:
    """Write report.json, per_set.tsv, completions.gmt (of a mixture too), report.html and the plots.

    Args:
        folder: an existing folder.
        report: what to write.
        vocabulary: names the drawn genes.
        completed_by: description of every set in completions.gmt.
        with_plots: draw the plots, which needs matplotlib (`plots.can_plot`).
    """
    (folder / REPORT_FILE).write_text(
        json.dumps(report.body(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    with open(folder / "per_set.tsv", "w", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(row) + "\n" for row in _per_set(report))
    for place, outcome in enumerate(report.outcomes):
        # Of the methods that are a model, the decoder or a mixture with it.
        if place == 0 or outcome.calibration is not None:
            name = "completions.gmt" if place == 0 else f"completions_{_identifier(outcome.method)}.gmt"
            with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
                write_gmt(file, _completed(report, outcome, vocabulary, completed_by))
    write_page(folder / "report.html", report, draw_plots(report, folder) if with_plots else [])


def _completed(report: Report, outcome: Outcome, vocabulary: Vocabulary, completed_by: str) -> Iterator[GeneSet]:
    for one, ids in zip(report.sets, outcome.drawn, strict=True):
        if len(ids):
            yield GeneSet(one.name, completed_by, tuple(vocabulary.symbols[id_] for id_ in ids))


def _per_set(report: Report) -> list[list[str]]:
    header = ["name", "library", "seed", "visible", "hidden", "drawn", "universe"]
    header += ["outside_vocabulary", "outside_background", "best_training_jaccard"]
    columns: list[tuple[str, Callable[[Outcome], np.ndarray], Callable[[Any], str]]] = [
        ("log10_p", lambda outcome: outcome.log_p / math.log(10), _short),
        ("log10_adjusted_p", lambda outcome: outcome.log_adjusted_p / math.log(10), _short),
        ("significant", lambda outcome: outcome.significant(report.alpha), lambda value: "yes" if value else "no"),
    ]
    popularity = next((one for one in report.outcomes if one.method == "popularity"), None)
    values: list[list[list[str]]] = []
    for outcome in report.outcomes:
        prefix = f"{_identifier(outcome.method)}_"
        metrics = dict(outcome.metrics)
        if popularity is not None:
            metrics["auroc_over_popularity"] = metrics["auroc"] - popularity.metrics["auroc"]
        for name, numbers in metrics.items():
            header.append(prefix + name)
            values.append([[_short(value) for value in row] for row in numbers])
        for name, get, show in columns:
            header.append(prefix + name)
            values.append([[show(value) for value in row] for row in get(outcome)])
    rows = [header]
    for seed, sets in enumerate(report.trials):
        for index, one in enumerate(sets):
            jaccard = "" if report.best_jaccard_N is None else f"{report.best_jaccard_N[index]:.4g}"
            counts = [seed, len(one.visible), one.hidden_count, one.drawn_count, one.universe]
            counts += [one.outside, one.outside_background]
            row = [one_line(one.name), one_line(one.library), *map(str, counts), jaccard]
            rows.append(row + [column[seed][index] for column in values])
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        # Seven digits: more would be noise of the float32 arithmetic.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _recall_cell(row: dict[str, Any], digits: int) -> str:
    return f"{row['recall']:.3f} ({row['significant']:,.{digits}f})".replace(".0)", ")")


def _interval(metric: dict[str, Any]) -> str:
    return f"{metric['low']:.3f} to {metric['high']:.3f}"


def _short(value: float) -> str:
    return f"{value:.7g}" if math.isfinite(value) else ""


def _identifier(method: str) -> str:
    return method.lower().replace("-", "_").replace(" ", "_")
