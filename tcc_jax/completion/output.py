"""Completed sets as text: a readable table, TSV, JSON or GMT, written piece by piece."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from tcc_jax.completion.evidence import Neighbour
from tcc_jax.completion.queries import Completion, note
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.files import atomic_file
from tcc_jax.terminal import table

FORMAT_VERSION = 1
Format = Literal["table", "tsv", "json", "gmt"]


def render(
    completions: Iterable[Completion], format: Format, vocabulary: Vocabulary, details: dict[str, Any]
) -> Iterator[str]:
    """Lay out completed sets.

    Args:
        completions: read one at a time.
        format: `table` for people; `tsv`, one line a gene; `json`, one document with one line a set, symbols and
            problems included; `gmt`, one line a set with its proposed genes. Only `json` holds sets without proposals.
        vocabulary: of the model.
        details: what the JSON document says beside the sets.

    Yields:
        Pieces of text, with their line ends.
    """
    layouts: dict[Format, Callable[..., Iterator[str]]] = {"table": _table, "tsv": _tsv, "gmt": _gmt}
    if format == "json":
        return _json(completions, vocabulary, details)
    return layouts[format](one for one in completions if one.proposals)


@contextlib.contextmanager
def open_output(path: str | Path | None) -> Iterator[IO[str]]:
    """Open a file that appears whole when the block ends, or not at all; None is standard output.

    Raises:
        OSError: it can't be written.
    """
    if path is None:
        yield sys.stdout
        return
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        yield file


def _table(completions: Iterable[Completion]) -> Iterator[str]:
    for place, completion in enumerate(completions):
        rows = [(one.rank, one.symbol, f"{one.probability:.6f}") for one in completion.proposals]
        blank = "\n" if place else ""
        visible = f"{len(completion.visible):,} visible gene{'s' if len(completion.visible) > 1 else ''}"
        yield f"{blank}{_cell(completion.query.name)}: {visible}\n{table(('rank', 'gene', 'probability'), rows)}\n"
        if completion.evidence is not None:
            yield "\ntraining sets most like the visible genes that hold each gene:\n"
            for one, neighbours in zip(completion.proposals, completion.evidence, strict=True):
                yield f"{one.symbol}: {_in_words(neighbours) or 'none shares a visible gene'}\n"


def _tsv(completions: Iterable[Completion]) -> Iterator[str]:
    header = ["set", "rank", "gene", "probability"]
    for place, completion in enumerate(completions):
        evidence = completion.evidence
        if place == 0:
            yield "\t".join([*header, *(["training_sets"] if evidence is not None else [])]) + "\n"
        for index, one in enumerate(completion.proposals):
            cells = [_cell(completion.query.name), str(one.rank), one.symbol, f"{one.probability:.6g}"]
            if evidence is not None:
                cells.append(_in_words(evidence[index]))
            yield "\t".join(cells) + "\n"


def _gmt(completions: Iterable[Completion]) -> Iterator[str]:
    for completion in completions:
        symbols = [one.symbol for one in completion.proposals]
        description = f"{len(symbols)} genes proposed by tcc_jax from {len(completion.visible)} visible"
        yield "\t".join([_cell(completion.query.name), description, *symbols]) + "\n"


def _json(completions: Iterable[Completion], vocabulary: Vocabulary, details: dict[str, Any]) -> Iterator[str]:
    head = json.dumps({"format_version": FORMAT_VERSION, **details}, ensure_ascii=False)
    yield head[:-1] + ', "sets": ['
    for place, completion in enumerate(completions):
        yield (",\n" if place else "\n") + json.dumps(_record(completion, vocabulary), ensure_ascii=False)
    yield "\n]}\n"


def _record(completion: Completion, vocabulary: Vocabulary) -> dict[str, Any]:
    proposals = [dataclasses.asdict(one) for one in completion.proposals]
    for proposal, neighbours in zip(proposals, completion.evidence or [], strict=False):
        proposal["training_sets"] = [dataclasses.asdict(one) for one in neighbours]
    return {
        "set": completion.query.name,
        "visible": [vocabulary.symbols[id_] for id_ in completion.visible],
        "symbols": [
            {"written": gene.written, "symbol": gene.symbol, "how": gene.how, "used": gene.id is not None}
            for gene in completion.query.symbols
        ],
        "notes": [text for gene in completion.query.symbols if (text := note(gene, vocabulary, suggest=False))],
        "proposals": proposals,
        "problem": completion.problem or None,
    }


def _in_words(neighbours: Iterable[Neighbour]) -> str:
    return "; ".join(
        f"{_cell(one.name)} ({_cell(one.library)}): {one.shared} shared, {one.size} genes, Jaccard {one.jaccard:.3f}"
        for one in neighbours
    )


def _cell(text: str) -> str:
    return " ".join(text.split())
