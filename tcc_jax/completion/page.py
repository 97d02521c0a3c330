"""The report as one HTML page that needs nothing beside it: tables, notes, and the plots inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tcc_jax.completion.report import Report, Table

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


class Plot(NamedTuple):
    """A plot that was drawn: the name of its files without ending, and what it shows in one sentence."""

    name: str
    caption: str


def write_page(path: Path, report: Report, plots: Sequence[Plot]) -> None:
    """Write the report as one HTML page; the plots' PNG files lie beside it and are put inside.

    Every name that comes from data is escaped, and the page runs no script.
    """
    title = "Completion of gene sets"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        *(f"<p>{html.escape(note)}</p>" for note in report.notes),
        *(_table(one) for one in report.tables()),
        *(_figure(plot, path.parent) for plot in plots),
        _skipped(report),
        "</body></html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = ["".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    title = html.escape(table.title)
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _figure(plot: Plot, folder: Path) -> str:
    image = base64.b64encode((folder / f"{plot.name}.png").read_bytes()).decode()
    caption = html.escape(plot.caption)
    source = f"data:image/png;base64,{image}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _skipped(report: Report) -> str:
    skipped = report.details.get("skipped", [])
    items = [f"<li>{html.escape('{library}/{name}: {reason}'.format(**one))}</li>" for one in skipped]
    return f"<h2>Sets that were skipped</h2><ul>{''.join(items)}</ul>" if items else ""


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
