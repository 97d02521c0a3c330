"""Reports of an evaluation: a table for the terminal, JSON, one line a set, completed sets as GMT, and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcc_jax.completion.protocol import MaskedSet, Outcome, bootstrap_interval
from tcc_jax.corpus.gmt import GeneSet, write_gmt
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.terminal import table

FORMAT_VERSION = 1
# Okabe & Ito's colours, which colour-blind readers tell apart; the marks differ in shape as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_MARKS = ("o", "s", "^", "D")
_TICKS = (0, 0.5, *(digit * 10**power for power in range(5) for digit in (1, 2, 5)))


@dataclass(frozen=True)
class Report:
    """An evaluation, ready to be shown.

    Attributes:
        outcomes: the model first, then the baselines.
        sets: the sets that were completed, in the order of the outcomes' arrays.
        alpha: level of significance.
        seed: of the bootstrap.
        details: what else is needed to repeat the evaluation, as JSON values.
    """

    outcomes: Sequence[Outcome]
    sets: Sequence[MaskedSet]
    alpha: float
    seed: int
    details: dict[str, Any]

    def summary(self) -> list[dict[str, Any]]:
        """Return for each method its totals over all sets."""
        hidden = sum(len(masked.hidden) for masked in self.sets)
        rows = []
        for outcome in self.outcomes:
            low, high = bootstrap_interval(outcome.recall, self.seed)
            rows.append(
                {
                    "method": outcome.method,
                    "sets": len(self.sets),
                    "hidden": hidden,
                    "hits": int(outcome.hits.sum()),
                    "recall": float(outcome.recall.mean()),
                    "recall_low": low,
                    "recall_high": high,
                    "significant": int(outcome.significant(self.alpha).sum()),
                }
            )
        return rows

    def table(self) -> str:
        """Return the summary as plain text, a line for each method."""
        header = ("method", "sets", "hidden", "hits", "recall", "95 % interval", f"significant at {self.alpha:g}")
        rows = [
            (
                row["method"],
                row["sets"],
                row["hidden"],
                row["hits"],
                f"{row['recall']:.4f}",
                f"{row['recall_low']:.4f} to {row['recall_high']:.4f}",
                f"{row['significant']:,} ({row['significant'] / row['sets']:.1%})",
            )
            for row in self.summary()
        ]
        return table(header, rows)


def write_report(folder: Path, report: Report, vocabulary: Vocabulary, completed_by: str) -> None:
    """Write report.json, per_set.tsv, completions.gmt and, with matplotlib, significance.png and .svg.

    Args:
        folder: an existing folder.
        report: what to write.
        vocabulary: names the drawn genes.
        completed_by: description of every set in completions.gmt.
    """
    body = {"format_version": FORMAT_VERSION, **report.details, "methods": report.summary()}
    (folder / "report.json").write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / "per_set.tsv", "w", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(row) + "\n" for row in _per_set(report))
    with open(folder / "completions.gmt", "w", encoding="utf-8", newline="\n") as file:
        drawn = report.outcomes[0].drawn
        write_gmt(
            file,
            (
                GeneSet(masked.name, completed_by, tuple(vocabulary.symbols[id_] for id_ in ids))
                for masked, ids in zip(report.sets, drawn, strict=True)
            ),
        )
    if can_plot():
        _plot_significance(report, folder)


def can_plot() -> bool:
    """Say whether matplotlib (the `plots` extra) is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _per_set(report: Report) -> list[list[str]]:
    columns = ["hits", "recall", "log10_p", "log10_adjusted_p", "significant"]
    header = ["name", "library", "visible", "hidden", "outside_vocabulary", *columns]
    for outcome in report.outcomes[1:]:
        header += [f"{_identifier(outcome.method)}_{column}" for column in columns]
    rows = [header]
    values = [_columns(outcome, report.alpha) for outcome in report.outcomes]
    for index, masked in enumerate(report.sets):
        row = [_cell(masked.name), _cell(masked.library)]
        row += [str(count) for count in (len(masked.visible), len(masked.hidden), masked.outside)]
        rows.append(row + [column[index] for method in values for column in method])
    return rows


def _columns(outcome: Outcome, alpha: float) -> list[list[str]]:
    return [
        [str(hits) for hits in outcome.hits],
        [f"{recall:.6g}" for recall in outcome.recall],
        [f"{log_p / math.log(10):.7g}" for log_p in outcome.log_p],
        [f"{log_p / math.log(10):.7g}" for log_p in outcome.log_adjusted_p],
        ["yes" if significant else "no" for significant in outcome.significant(alpha)],
    ]


def _cell(text: str) -> str:
    return " ".join(text.split())


def _identifier(method: str) -> str:
    return method.lower().replace("-", "_").replace(" ", "_")


def _plot_significance(report: Report, folder: Path) -> None:
    import matplotlib
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    ranks = np.arange(1, len(report.sets) + 1)
    # The model is drawn last, on top.
    for place, outcome in reversed(list(enumerate(report.outcomes))):
        heights = np.sort(np.maximum(-outcome.log_adjusted_p / math.log(10), 0.0))[::-1]
        count = int(outcome.significant(report.alpha).sum())
        colour = np.array(to_rgb(_COLOURS[place % len(_COLOURS)]))
        style: dict[str, Any] = {
            "marker": _MARKS[place % len(_MARKS)],
            "markersize": 5 if place == 0 else 3,
            "linestyle": "none",
        }
        label = f"{outcome.method}: {count:,} of {len(ranks):,} significant"
        axes.plot(ranks[:count], heights[:count], color=tuple(colour), label=label, **style)
        axes.plot(ranks[count:], heights[count:], color=tuple(0.35 * colour + 0.65), **style)
    threshold = -math.log10(report.alpha)
    axes.axhline(threshold, color="0.3", linewidth=1, linestyle="--")
    axes.annotate(
        f"adjusted p = {report.alpha:g}", (1.0, threshold), xycoords=("axes fraction", "data"),
        xytext=(-4, 3), textcoords="offset points", ha="right", va="bottom", color="0.3", fontsize=9,
    )  # fmt: skip
    # Linear up to 1 and logarithmic above: p = 1 has a place, and one set at 1e-200 does not flatten the rest.
    axes.set_yscale("symlog", linthresh=1)
    top = max(axes.get_ylim()[1], 2 * threshold)
    axes.set_yticks([tick for tick in _TICKS if tick <= top], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.05, top)
    axes.set_xlabel("sets, most significant first (each method in its own order)")
    axes.set_ylabel("-log10 of the adjusted p-value")
    axes.set_title("Overlap of drawn and hidden genes; pale marks are not significant")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "tcc_jax"}):
        figure.savefig(folder / "significance.png", dpi=160)
        figure.savefig(folder / "significance.svg", metadata={"Date": None})
