"""From GMT files to sets of approved genes: every symbol looked up once, every set judged by the share that maps."""

from __future__ import annotations

import collections
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcc_jax.corpus.gmt import Problems, library_name, read_gmt
from tcc_jax.corpus.similarity import Sets
from tcc_jax.corpus.symbols import Resolution, SymbolTable, is_date, looks_like_mouse
from tcc_jax.terminal import progress

_SHOWN = 20
_SETS_AT_ONCE = 20_000


@dataclass
class RawSets:
    """Gene sets as read: the tokens of `sets` number the spellings in `symbols`."""

    sets: Sets
    symbols: list[str]
    names: list[str]
    libraries: list[str]
    problems: Problems


@dataclass
class MappedSets:
    """Gene sets of approved genes: the tokens of `sets` number the symbols in `genes`.

    Attributes:
        sets: the sets, genes in file order, each once; those under the mapped share are gone.
        genes: approved symbols, sorted.
        names: set names.
        libraries: the library of each set.
        report: how symbols mapped, which did not, and which sets look like mouse or are in lower case (JSON values).
    """

    sets: Sets
    genes: list[str]
    names: list[str]
    libraries: list[str]
    report: dict[str, Any]


def read_sets(files: Sequence[Path]) -> RawSets:
    """Read GMT files into memory, 4 bytes a mention.

    Raises:
        UserError: a file cannot be read or holds no usable set.
    """
    numbers: dict[str, int] = collections.defaultdict(lambda: len(numbers))
    tokens, lengths = array("i"), array("q")
    names: list[str] = []
    libraries: list[str] = []
    problems = Problems()
    with progress("reading GMT files", total=len(files)) as advance:
        for file in files:
            library = library_name(file)
            seen: set[str] = set()
            for gene_set in read_gmt(file, problems):
                if gene_set.name in seen:
                    problems.add("set names repeated within a library", f"{file}: {gene_set.name}")
                seen.add(gene_set.name)
                tokens.extend([numbers[gene] for gene in gene_set.genes])
                lengths.append(len(gene_set.genes))
                names.append(gene_set.name)
                libraries.append(library)
            advance(1)
    offsets = np.concatenate([[0], np.cumsum(np.frombuffer(lengths, np.int64))]).astype(np.int64)
    return RawSets(Sets(np.frombuffer(tokens, np.int32), offsets), list(numbers), names, libraries, problems)


def map_sets(raw: RawSets, table: SymbolTable, min_mapped: float) -> MappedSets:
    """Map every set to approved symbols and drop sets of which too few genes map.

    Args:
        raw: sets as read.
        table: the HGNC table.
        min_mapped: smallest share of a set's genes that must map, 0 to 1.
    """
    resolutions = [table.resolve(symbol) for symbol in raw.symbols]
    genes = sorted({found.symbol for found in resolutions if found.symbol is not None})
    number = {gene: index for index, gene in enumerate(genes)}
    gene_of = np.array([-1 if found.symbol is None else number[found.symbol] for found in resolutions], np.int32)
    mentions = np.bincount(raw.sets.tokens, minlength=len(raw.symbols))

    mouse = np.array([looks_like_mouse(s) and f.symbol is None for s, f in zip(raw.symbols, resolutions, strict=True)])
    lower = np.array([_only_in_lower_case(s, f, table) for s, f in zip(raw.symbols, resolutions, strict=True)])
    looks_mouse, in_lower = (2 * raw.sets.sum(each[raw.sets.tokens]) >= raw.sets.lengths for each in (mouse, lower))
    mapped = gene_of[raw.sets.tokens]
    known = mapped >= 0
    mapped_counts = raw.sets.sum(known)
    # A quotient is rounded as its limit was, so that 14 of 25 reach 0.56; the product 0.56 * 25 exceeds 14.
    kept = (mapped_counts / raw.sets.lengths >= min_mapped) & (mapped_counts > 0)
    sets = _unique_within(Sets(mapped, raw.sets.offsets).keep_mentions(known).select(kept))
    return MappedSets(
        sets=sets,
        genes=genes,
        names=[name for name, keep in zip(raw.names, kept, strict=True) if keep],
        libraries=[library for library, keep in zip(raw.libraries, kept, strict=True) if keep],
        report=_report(raw, resolutions, mentions, looks_mouse, in_lower),
    )


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return `MappedSets.report` as lines for a user: symbols not mapped, dates, sets in another case."""
    lines = []
    for key, label in (("not_mapped", "most often not mapped"), ("ambiguous", "ambiguous, so not mapped")):
        if report[key]:
            lines.append(f"{label}: " + ", ".join(f"{one['symbol']} ({one['mentions']:,})" for one in report[key]))
    if report["dates"]:
        dates = (f"{one['symbol']} -> {one['mapped_to'] or 'nothing'}" for one in report["dates"])
        lines.append("spreadsheet dates: " + ", ".join(dates))
    for key, label in (("looks_like_mouse", "sets that look like mouse"), ("lower_case", "sets in lower case")):
        if (found := report.get(key)) and found["sets"]:
            where = ", ".join(f"{library} ({count:,})" for library, count in found["libraries"].items())
            lines.append(f"{label}: {found['sets']:,} in {where}; --case-insensitive matches them by name")
    return lines


def _unique_within(sets: Sets) -> Sets:
    # Two spellings in a set can be one gene: keep the first. A few sets at a time, to bound the memory of the sort.
    keep = np.ones(len(sets.tokens), bool)
    for start in range(0, len(sets), _SETS_AT_ONCE):
        offsets = sets.offsets[start : start + _SETS_AT_ONCE + 1]
        part = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        keys = (part << 32) | sets.tokens[offsets[0] : offsets[-1]].astype(np.int64)
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        keep[offsets[0] + order[again]] = False
    return sets.keep_mentions(keep)


def _only_in_lower_case(symbol: str, found: Resolution, table: SymbolTable) -> bool:
    return found.symbol is None and symbol.islower() and table.resolve(symbol.upper()).symbol is not None


def _report(
    raw: RawSets, resolutions: list[Resolution], mentions: np.ndarray, looks_mouse: np.ndarray, in_lower: np.ndarray
) -> dict[str, Any]:
    by_how: dict[str, dict[str, int]] = {}
    for found, count in zip(resolutions, mentions.tolist(), strict=True):
        entry = by_how.setdefault(found.how, {"symbols": 0, "mentions": 0})
        entry["symbols"] += 1
        entry["mentions"] += count

    def most_frequent(chosen: list[int]) -> list[dict[str, Any]]:
        chosen.sort(key=lambda index: (-mentions[index], raw.symbols[index]))
        return [{"symbol": raw.symbols[index], "mentions": int(mentions[index])} for index in chosen[:_SHOWN]]

    # Dates that could not be mapped are told too: they are lost genes.
    dates = [
        i for i, s in enumerate(raw.symbols) if is_date(s) and resolutions[i].how in ("date", "ambiguous", "unknown")
    ]

    def by_library(chosen: np.ndarray) -> dict[str, Any]:
        libraries = collections.Counter(raw.libraries[index] for index in np.flatnonzero(chosen))
        return {"sets": int(chosen.sum()), "libraries": dict(libraries.most_common(_SHOWN))}

    report = {
        "symbols": dict(sorted(by_how.items())),
        "not_mapped": most_frequent([i for i, f in enumerate(resolutions) if f.how == "unknown"]),
        "ambiguous": most_frequent([i for i, f in enumerate(resolutions) if f.how == "ambiguous"]),
        "dates": [
            {"symbol": raw.symbols[i], "mapped_to": resolutions[i].symbol, "mentions": int(mentions[i])}
            for i in sorted(dates, key=raw.symbols.__getitem__)
        ],
        "looks_like_mouse": by_library(looks_mouse),
    }
    if in_lower.any():
        # Only then: the hash of every other corpus stays what it was.
        report["lower_case"] = by_library(in_lower)
    return report
