"""The page of a report, report.html: one file with the tables and the plots inside."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcc_jax.evaluation.options import EvaluateOptions
from tcc_jax.evaluation.plots import Plot
from tcc_jax.terminal import cell

if TYPE_CHECKING:
    from tcc_jax.evaluation.report import Report, Table

# Options that say where things are, not what is measured, or that have a line of their own.
_NO_PROTOCOL = ("checkpoint", "out", "gmt", "corpus", "split", "cache", "overwrite")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; }
img { max-width: 100%; }
.note, figcaption { color: #555; white-space: pre-line; }
"""


def write_page(path: Path, report: Report, plots: Sequence[Plot]) -> None:
    """Write the page: what was evaluated, the tables, each plot near its own, and what was left out.

    Nothing beside it is needed, every name that comes from data is escaped, and no script runs.

    Args:
        path: the file.
        report: what to show.
        plots: the plots to embed, drawn in the file's folder.
    """
    title, tables = "Completion of gene sets", report.tables()
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        _evaluated(report.details),
        *(part for one in tables[:1] for part in _with_plots(one, plots, path.parent)),
        f"<h2>What must be known of these numbers</h2><ul>{notes}</ul>" if notes else "",
        *(part for one in tables[1:] for part in _with_plots(one, plots, path.parent)),
        _left_out(report),
        "</body></html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _evaluated(details: dict[str, Any]) -> str:
    # What tells this report from another: the model, the sets, and whatever is not as it is by default.
    if "options" not in details:
        return ""
    options, checkpoint, corpus = details["options"], details["checkpoint"], details["corpus"]
    source = " ".join(options["gmt"]) or f"{options['split']} split of {details['source']['corpus']}"
    facts = {
        "checkpoint": f"{checkpoint['path']}, step {checkpoint['step']:,}",
        "sets": f"{details['sets_evaluated']:,} of {details['sets_read']:,} from {source}",
        "training corpus": corpus["path"] if corpus else "not found",
        "options": " ".join(_changed(options)) or "the defaults",
        "version": f"tcc_jax {details['versions']['tcc-jax']}",
    }
    items = "".join(f"<li>{name}: {html.escape(str(value))}</li>" for name, value in facts.items())
    return f"<h2>What was evaluated</h2><ul>{items}</ul>"


def _changed(options: dict[str, Any]) -> Iterator[str]:
    for field in dataclasses.fields(EvaluateOptions):
        value = options[field.name]
        if field.name not in _NO_PROTOCOL and value != field.default:
            flag, values = f"--{field.name.replace('_', '-')}", value if isinstance(value, tuple) else (value,)
            yield flag if value is True else " ".join([flag, *map(str, values)])


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = ["".join(f"<td>{html.escape(cell(value))}</td>" for value in row) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    title = html.escape(table.title)
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _with_plots(table: Table, plots: Sequence[Plot], folder: Path) -> Iterator[str]:
    yield _html_table(table)
    yield from (_figure(plot, folder) for plot in plots if plot.name in table.plots)


def _figure(plot: Plot, folder: Path) -> str:
    image = base64.b64encode((folder / f"{plot.name}.png").read_bytes()).decode()
    caption = html.escape(plot.caption)
    source = f"data:image/png;base64,{image}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _left_out(report: Report) -> str:
    problems = report.details.get("source", {}).get("problems", {})
    lines = [f"{kind}: {count:,}" for kind, count in problems.items()]
    lines += ["skipped {library}/{name}: {reason}".format(**one) for one in report.details.get("skipped", [])]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>What was wrong with the input</h2><ul>{items}</ul>" if items else ""
