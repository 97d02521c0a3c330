"""HGNC symbols: what a gene is called today, from any name it had, without guessing.

A symbol is approved, else a previous symbol, else an alias, and only where that names one gene.
"""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tcc_jax.files import check_input_file, embedded, open_binary
from tcc_jax.terminal import UserError

EMBEDDED_TABLE = "hgnc.tsv.xz"

How = Literal["approved", "previous", "alias", "case", "date", "ensembl", "entrez", "ambiguous", "unknown"]

# The names of the columns in the two layouts that HGNC offers: the custom download and hgnc_complete_set.txt.
_COLUMNS = {
    "symbol": ("Approved symbol", "symbol"),
    "hgnc_id": ("HGNC ID", "hgnc_id"),
    "status": ("Status", "status"),
    "previous": ("Previous symbols", "prev_symbol"),
    "alias": ("Alias symbols", "alias_symbol"),
    "ensembl": ("Ensembl gene ID", "ensembl_gene_id"),
    "entrez": ("NCBI Gene ID(supplied by NCBI)", "NCBI Gene ID", "entrez_id"),
}
_REQUIRED = ("symbol", "previous", "alias")
_MANY = re.compile(r"\s*[|,]\s*")
_ENSEMBL = re.compile(r"^(ENSG\d{11})(\.\d+)?$")
_DATE = re.compile(r"^(?:(\d{1,2})[-/ ]([A-Za-z]{3})|([A-Za-z]{3})[-/ ](\d{1,2}))$")
# Symbols that a spreadsheet turns into a day of the month, by month.
_MONTHS: dict[str, tuple[str, ...]] = {"mar": ("MARCH", "MARC", "MAR"), "sep": ("SEPT", "SEP")}
_MONTHS |= {m.lower(): (m,) for m in ("JAN", "FEB", "APR", "MAY", "JUN", "JUL", "AUG", "OCT", "NOV", "DEC")}
# Mouse and rat symbols start with a capital and go on in lower case: Trp53, H2-K1, 1700001A01Rik.
_MOUSE = re.compile(r"^(?:[A-Z][A-Za-z0-9.-]*[a-z][A-Za-z0-9.-]*|[0-9A-Z]+Rik)$")


@dataclass(frozen=True)
class Resolution:
    """What became of a symbol: the approved symbol (None if there is none) and how it was found."""

    symbol: str | None
    how: How


class SymbolTable:
    """Any symbol -> approved symbol.

    Attributes:
        hgnc_ids: approved symbol -> HGNC id.
        case_insensitive: also match symbols that differ by case, such as mouse symbols.
    """

    def __init__(self, rows: Iterable[dict[str, str]], case_insensitive: bool = False) -> None:
        """Index the rows of a table: dicts with the keys of `_COLUMNS`, several values joined by `|` or `, `."""
        self.case_insensitive = case_insensitive
        self.hgnc_ids: dict[str, str] = {}
        self._previous: dict[str, set[str]] = {}
        self._alias: dict[str, set[str]] = {}
        self._ensembl: dict[str, set[str]] = {}
        self._entrez: dict[str, set[str]] = {}
        for row in rows:
            # Withdrawn entries and symbols name nothing that is in use; some layouts say so in the symbol itself.
            if "withdrawn" in row.get("status", "").lower() + row["symbol"].lower() or not row["symbol"]:
                continue
            symbol = row["symbol"]
            self.hgnc_ids[symbol] = row.get("hgnc_id", "")
            for index, column in (
                (self._previous, "previous"),
                (self._alias, "alias"),
                (self._ensembl, "ensembl"),
                (self._entrez, "entrez"),
            ):
                for value in filter(None, _MANY.split(row.get(column, "").strip())):
                    index.setdefault(value, set()).add(symbol)
        approved = {symbol: {symbol} for symbol in self.hgnc_ids}
        self._exact = (("approved", approved), ("previous", self._previous), ("alias", self._alias))
        self._upper = tuple(_merge_case(index) for _, index in self._exact)
        self._cache: dict[str, Resolution] = {}

    @classmethod
    def read(cls, path: str | Path | None = None, case_insensitive: bool = False) -> SymbolTable:
        """Read an HGNC table, plain, .gz or .xz, in either layout; None reads the embedded one.

        Raises:
            UserError: no such file, not a table of HGNC's, or no approved symbol in it.
        """
        path = embedded(EMBEDDED_TABLE) if path is None else Path(path)
        check_input_file(path)
        try:
            with open_binary(path) as file:
                lines = [line.rstrip("\r") for line in file.read().decode("utf-8-sig").split("\n")]
        except UnicodeDecodeError:
            raise UserError(f"{path}: not an HGNC table: no text in UTF-8") from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error):
            raise UserError(f"{path}: damaged or not really compressed; get the HGNC table again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read the HGNC table: {error.strerror or error}") from None
        header = lines[0].split("\t")
        columns = {}
        for key, names in _COLUMNS.items():
            found = [header.index(name) for name in names if name in header]
            if found:
                columns[key] = found[0]
            elif key in _REQUIRED:
                raise UserError(f"{path}: line 1: no column {' or '.join(map(repr, names))}; not an HGNC table")
        table = cls((_row(line, columns) for line in lines[1:]), case_insensitive)
        if not table.hgnc_ids:
            raise UserError(f"{path}: no approved symbol in the table")
        return table

    def resolve(self, symbol: str) -> Resolution:
        """Return the approved symbol for any symbol, Ensembl gene id, Entrez id or spreadsheet date.

        Symbols all in capitals match whatever their case in the table (`C1ORF112`); others, such as the mouse's
        `Trp53`, only if the table is case-insensitive. A name that several genes share is ambiguous, never guessed.
        """
        if symbol not in self._cache:
            self._cache[symbol] = self._resolve(symbol)
        return self._cache[symbol]

    def _resolve(self, symbol: str) -> Resolution:
        # No gene is called by a number, but a few have one as an alias (52 for SCARNA10; Entrez id 52 is ACP1).
        if symbol.isdigit() and symbol in self._entrez:
            return _only(self._entrez[symbol], "entrez")
        by_name = self._by_name(symbol)
        if by_name.how != "unknown":
            return by_name
        if match := _ENSEMBL.match(symbol):
            return _only(self._ensembl.get(match[1]), "ensembl")
        if match := _DATE.match(symbol):
            return self._by_date(match)
        return by_name

    def _by_name(self, symbol: str) -> Resolution:
        for how, index in self._exact:
            if symbol in index:
                return _only(index[symbol], how)  # type: ignore[arg-type]
        if self.case_insensitive or symbol == symbol.upper():
            for index in self._upper:
                if symbol.upper() in index:
                    return _only(index[symbol.upper()], "case")
        return Resolution(None, "unknown")

    def _by_date(self, match: re.Match[str]) -> Resolution:
        day, month = (match[1], match[2]) if match[1] else (match[4], match[3])
        names = [f"{stem}{int(day)}" for stem in _MONTHS.get(month.lower(), ())]
        # Aliases count only where no approved or previous symbol fits: 2-Sep is SEPT2, whatever SEP2 also stood for.
        for indexes in (self._exact[:2], self._exact[2:]):
            genes = set().union(*(index.get(name, set()) for _, index in indexes for name in names))
            if genes:
                return _only(genes, "date")
        return Resolution(None, "unknown")


def is_date(symbol: str) -> bool:
    """Say whether a symbol is a day of the year, as spreadsheets make of `SEPT2` and its like (`2-Sep`)."""
    match = _DATE.match(symbol)
    return match is not None and (match[2] or match[3]).lower() in _MONTHS


def looks_like_mouse(symbol: str) -> bool:
    """Say whether a symbol is spelled as mouse and rat symbols are (`Trp53`, `1700001A01Rik`)."""
    return bool(_MOUSE.match(symbol))


def _row(line: str, columns: dict[str, int]) -> dict[str, str]:
    fields: Sequence[str] = line.split("\t")
    return {key: fields[column].strip().strip('"') if column < len(fields) else "" for key, column in columns.items()}


def _only(genes: set[str] | None, how: How) -> Resolution:
    if not genes:
        return Resolution(None, "unknown")
    return Resolution(next(iter(genes)), how) if len(genes) == 1 else Resolution(None, "ambiguous")


def _merge_case(index: dict[str, set[str]]) -> dict[str, set[str]]:
    merged: dict[str, set[str]] = {}
    for symbol, genes in index.items():
        merged.setdefault(symbol.upper(), set()).update(genes)
    return merged
