"""The plots of a report, as PNG and SVG: significance, recall, sizes and libraries, curves, calibration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tcc_jax.terminal import log, one_line

if TYPE_CHECKING:
    from tcc_jax.evaluation.metrics import Outcome
    from tcc_jax.evaluation.report import Report

# Colour and mark of each method, the same in every report. The colours are Okabe & Ito's, which colour-blind readers
# tell apart; the marks differ in shape as well.
_STYLES = {
    "model": ("#0072B2", "o"),
    "popularity": ("#E69F00", "s"),
    "random": ("#999999", "x"),
    "set-kNN": ("#009E73", "^"),
    "relevance": ("#CC79A7", "D"),
    "EASE": ("#D55E00", "v"),
    "auto-encoder": ("#56B4E9", "P"),
    "mixture": ("#000000", "*"),
}
_OTHER_STYLE = ("#F0E442", ".")
_TICKS = (0, 0.5, *(digit * 10**power for power in range(5) for digit in (1, 2, 5)))
_LIBRARIES_SHOWN = 10
_NAME_SHOWN = 40


class Plot(NamedTuple):
    """A plot that was drawn: the name of its files without ending, and what it shows in one sentence."""

    name: str
    caption: str


def can_plot() -> bool:
    """Say whether matplotlib (the `plots` extra) can be imported; where it can't, why is logged."""
    try:
        # All that drawing needs, compiled parts included.
        for name in ("figure", "ticker", "backends.backend_agg", "backends.backend_svg"):
            importlib.import_module(f"matplotlib.{name}")
    except Exception as error:  # One that was built for another NumPy raises more than ImportError.
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            log('no plots: matplotlib is not installed (pip install "tcc-jax[plots]")')
        else:
            log(f"no plots: matplotlib cannot be imported ({type(error).__name__}: {one_line(str(error))})")
        return False
    return True


def draw_plots(report: Report, folder: Path) -> list[Plot]:
    """Draw every plot the report has the numbers for, as NAME.png and NAME.svg in the folder."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []

    def draw(name: str, caption: str, size: tuple[float, float], paint: Callable[..., None], *what: Any) -> None:
        figure = Figure(figsize=size, layout="constrained")
        # The same report gives the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "tcc_jax", "font.size": 10}):
            paint(report, figure, *what)
            figure.savefig(folder / f"{name}.png", dpi=130)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        drawn.append(Plot(name, caption))

    intervals, count = "with bootstrap 95 % intervals over sets.", len(report.outcomes)
    overlap = "Overlap of drawn and hidden genes, set by set, each method in its own order."
    draw("significance", overlap, (8, 4.7 + 0.1 * count), _significance)
    draw("recall", f"Mean recall of each method, {intervals}", (8, 1.2 + 0.4 * count), _recall)
    for key, what in (("by_hidden_count", "number of hidden genes"), ("by_library", "library")):
        names = list(dict.fromkeys(row["subset"] for row in report.subsets[key]))[:_LIBRARIES_SHOWN]
        size = (8, 1.6 + len(names) * (0.15 + 0.1 * count))
        draw(f"recall_{key}", f"Mean recall by {what}, {intervals}", size, _groups, report.subsets[key], names, what)
    labels = {"sweep": "visible share of a set", "noise": "share of false genes in the prompt"}
    for name, rows in report.curve_rows.items():
        caption = f"Mean recall by {labels[name]}, {intervals} Methods stand side by side around each share."
        draw(name, caption, (8, 4.5), _curve, rows, labels[name])
    calibrated = [one for one in report.outcomes if one.calibration is not None and one.calibration.frequency.any()]
    if calibrated:
        caption = (
            "Calibration: expected hits of a gene against how often it is hidden; bins without a hit are not shown."
        )
        draw("calibration", caption, (6, 5.5), _calibration, calibrated)
    return drawn


def _significance(report: Report, figure: Any) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    ranks = np.arange(1, len(report.sets) + 1)
    # The model is drawn last, on top.
    for outcome in reversed(report.outcomes):
        heights = np.sort(np.maximum(-outcome.log_adjusted_p[0] / math.log(10), 0.0))[::-1]
        count = int(outcome.significant(report.alpha)[0].sum())
        name, mark = _STYLES.get(outcome.method, _OTHER_STYLE)
        colour = np.array(to_rgb(name))
        style: dict[str, Any] = {"marker": mark, "markersize": 5, "linewidth": 1.2}
        # A mark for some sets only, on a line through all: methods that lie close stay apart.
        every = max(1, len(ranks) // 25)
        label = f"{outcome.method}: {count:,} of {len(ranks):,} significant"
        pale = tuple(0.35 * colour + 0.65)
        # The pale part begins, without a mark, at the last significant set and under it: the line is whole.
        joint = max(count - 1, 0)
        axes.plot(ranks[joint:], heights[joint:], color=pale, markevery=(min(count, 1), every), **style)
        axes.plot(ranks[:count], heights[:count], color=tuple(colour), label=label, markevery=every, **style)
    threshold = -math.log10(report.alpha)
    axes.axhline(threshold, color="0.3", linewidth=1, linestyle="--")
    axes.annotate(
        f"adjusted\np = {report.alpha:g}", (1.0, threshold), xycoords=("axes fraction", "data"),
        xytext=(4, 0), textcoords="offset points", ha="left", va="center", color="0.3", fontsize=9,
    )  # fmt: skip
    # Linear up to 1 and logarithmic above: p = 1 has a place, and one set at 1e-200 does not flatten the rest.
    axes.set_yscale("symlog", linthresh=1)
    top = max(1.2 * axes.dataLim.ymax, 2 * threshold)
    axes.set_yticks([tick for tick in _TICKS if tick <= top], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.05, top)
    # Ticks at whole sets from the first on, and room for the whole of the first and the last mark.
    ticks = MaxNLocator(integer=True, steps=(1, 2, 5, 10)).tick_values(1, len(ranks))
    axes.set_xticks(sorted({max(1, int(tick)) for tick in ticks if tick <= len(ranks)}))
    margin = max(0.5, 0.015 * len(ranks))
    axes.set_xlim(1 - margin, len(ranks) + margin)
    axes.set_xlabel(f"sets, most significant first, each method in its own order{_first_seed(report)}")
    axes.set_ylabel("-log10 of the adjusted p-value")
    axes.set_title("Overlap of drawn and hidden genes; pale: not significant")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False)


def _recall(report: Report, figure: Any) -> None:
    axes = figure.add_subplot()
    for place, row in enumerate(report.methods):
        recall = row["metrics"]["recall"]
        _point(axes, recall["mean"], recall["low"], recall["high"], place, row["method"], label=None)
        axes.annotate(
            f"{recall['mean']:.3f}", (recall["high"], place), xytext=(6, 0), textcoords="offset points", va="center"
        )
    _rows_of(axes, [row["method"] for row in report.methods])
    axes.set_xlim(right=1.12 * max(row["metrics"]["recall"]["high"] for row in report.methods) + 0.01)
    _from_zero(axes)
    axes.set_xlabel("recall at the drawn count, mean over sets and 95 % interval")
    axes.set_title("Share of the hidden genes that are found")


def _groups(report: Report, figure: Any, rows: list[dict[str, Any]], names: Sequence[str], what: str) -> None:
    axes = figure.add_subplot()
    count = len(report.outcomes)
    for place, outcome in enumerate(report.outcomes):
        chosen = [row for row in rows if row["method"] == outcome.method and row["subset"] in names]
        for row in chosen:
            height = names.index(row["subset"]) + (place - (count - 1) / 2) * 0.7 / count
            label = outcome.method if row is chosen[0] else None
            _point(axes, row["recall"], row["low"], row["high"], height, outcome.method, label)
    sizes = {row["subset"]: row["sets"] for row in rows}
    shown = [name if len(name) <= _NAME_SHOWN else name[: _NAME_SHOWN - 1] + "…" for name in names]
    _rows_of(axes, [f"{text}\n{sizes[name]:,} sets" for text, name in zip(shown, names, strict=True)])
    _from_zero(axes)
    axes.set_xlabel("recall at the drawn count, mean over sets and 95 % interval")
    axes.set_title(f"Recall by {what}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _curve(report: Report, figure: Any, rows: Sequence[dict[str, Any]], label: str) -> None:
    axes = figure.add_subplot()
    shares = np.array([100 * share for share in dict.fromkeys(row["share"] for row in rows)])
    # The methods stand side by side around each share, lest the intervals hide one another.
    count = len(report.outcomes)
    apart = min(0.012 * np.ptp(shares), 0.7 * np.diff(shares).min(initial=np.inf) / count)
    shifts = (np.arange(count) - (count - 1) / 2) * apart
    for outcome, shift in zip(report.outcomes, shifts, strict=True):
        points = [row for row in rows if row["method"] == outcome.method]
        means, low, high = (np.array([row[key] for row in points]) for key in ("recall", "low", "high"))
        colour, mark = _STYLES.get(outcome.method, _OTHER_STYLE)
        axes.errorbar(
            shares + shift, means, (means - low, high - means), color=colour, marker=mark,
            capsize=3, markersize=5, linewidth=1.2, label=outcome.method,
        )  # fmt: skip
    axes.set_ylim(bottom=-0.015 * axes.get_ylim()[1])
    axes.set_xticks(shares)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{label} [%]")
    axes.set_ylabel("recall at the drawn count")
    axes.set_title(f"Recall by {label}\n(mean over sets, 95 % interval{_first_seed(report)})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _calibration(report: Report, figure: Any, outcomes: Sequence[Outcome]) -> None:
    axes = figure.add_subplot()
    least, most = math.inf, 1.0
    for outcome in outcomes:
        calibration = outcome.calibration
        assert calibration is not None
        enough = calibration.frequency > 0
        expected, frequency = calibration.expected[enough], calibration.frequency[enough]
        low, high = _wilson(frequency, calibration.genes[enough])
        colour, mark = _STYLES.get(outcome.method, _OTHER_STYLE)
        axes.errorbar(
            expected, frequency, np.maximum((frequency - low, high - frequency), 0), color=colour,
            marker=mark, markersize=5, linestyle="none", capsize=3, label=f"{outcome.method}: genes in bins",
        )  # fmt: skip
        least, most = min(least, expected.min(), frequency.min()), max(most, expected.max())
    # A gene is hidden once at most, whatever the softmax expects of it.
    axes.plot([least, 1, most], [least, 1, 1], color="0.4", linestyle="--", linewidth=1, label="perfectly calibrated")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("expected hits of a gene: its share of the probability x the hidden count")
    axes.set_ylabel("share of these genes that are hidden")
    axes.set_title(f"Calibration, with 95 % intervals{_first_seed(report)}")
    axes.legend(frameon=False, loc="upper left")


def _first_seed(report: Report) -> str:
    return "; first seed" if len(report.trials) > 1 else ""


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Wilson's score interval (1927): unlike share +- 1.96 deviations it stays between 0 and 1, for a log scale.
    z2 = 1.96**2 / count
    half = np.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)


def _point(axes: Any, value: float, low: float, high: float, height: float, method: str, label: str | None) -> None:
    colour, mark = _STYLES.get(method, _OTHER_STYLE)
    axes.errorbar(
        [value], [height], xerr=[[max(value - low, 0)], [max(high - value, 0)]], color=colour,
        marker=mark, markersize=5, capsize=3, linestyle="none", label=label,
    )  # fmt: skip


def _from_zero(axes: Any) -> None:
    # A little below, so that a mark at 0 is whole.
    axes.set_xlim(left=-0.015 * axes.get_xlim()[1])


def _rows_of(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    # The first on top; half a row beyond the ends, so that no mark lies on the frame.
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
