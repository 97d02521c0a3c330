"""The sets to complete: symbols from a user or a GMT file, or a split of a corpus, as ids of the model's vocabulary."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tcc_jax.corpus.gmt import Problems, find_gmt_files, library_name, read_gmt
from tcc_jax.corpus.store import Corpus, Split
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import Vocabulary

_NAMED, _NAMED_ON_SCREEN = 20, 5


@dataclass(frozen=True)
class KnownSet:
    """A set as far as the vocabulary knows it: int32 ids, each once, and how many of its genes are outside."""

    name: str
    library: str
    ids: np.ndarray
    outside: int = 0


@dataclass
class SymbolReport:
    """What became of the symbols of all sets: a count of mentions for each way of mapping, and the ones left out."""

    mentions: collections.Counter[str] = field(default_factory=collections.Counter)
    not_mapped: collections.Counter[str] = field(default_factory=collections.Counter)
    not_in_vocabulary: collections.Counter[str] = field(default_factory=collections.Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values; of what is left out, the most frequent symbols."""
        return {
            "mentions": dict(sorted(self.mentions.items())),
            "not_mapped": _summary(self.not_mapped),
            "not_in_vocabulary": _summary(self.not_in_vocabulary),
        }

    def lines(self) -> list[str]:
        """Return what a user should know, one line each."""
        how = ", ".join(f"{count:,} {name}" for name, count in self.mentions.most_common())
        lines = [f"symbols as read: {how}"]
        for what, counts in (("not mapped", self.not_mapped), ("not in the vocabulary", self.not_in_vocabulary)):
            if counts:
                few = ", ".join(list(_most(counts))[:_NAMED_ON_SCREEN])
                lines.append(f"{what}: {len(counts):,} symbols, {counts.total():,} mentions (most often {few})")
        return lines


@dataclass(frozen=True)
class FoundGene:
    """What became of one symbol: its approved symbol, how that was found, and its id; None where there is none."""

    written: str
    symbol: str | None
    how: str
    id: int | None


def find_gene(written: str, table: SymbolTable, vocabulary: Vocabulary) -> FoundGene:
    """Look a symbol up in the vocabulary: as it is written, else by its approved symbol."""
    if written in vocabulary.ids:
        return FoundGene(written, written, "approved", vocabulary.ids[written])
    resolution = table.resolve(written)
    id_ = vocabulary.ids.get(resolution.symbol) if resolution.symbol else None
    return FoundGene(written, resolution.symbol, resolution.how, id_)


def sets_from_gmt(
    paths: Sequence[str | Path], table: SymbolTable, vocabulary: Vocabulary
) -> tuple[list[KnownSet], SymbolReport, Problems]:
    """Read GMT files or folders of them.

    Returns:
        The sets in file order (also those without a known gene), what became of their symbols, and the lines that could
        not be read.

    Raises:
        UserError: a file is missing or holds no usable set.
    """
    sets, report, problems = [], SymbolReport(), Problems()
    for path in find_gmt_files(paths):
        for gene_set in read_gmt(path, problems):
            ids, outside = _known_ids(gene_set.genes, table, vocabulary, report)
            sets.append(KnownSet(gene_set.name, library_name(path), ids, outside))
    return sets, report, problems


def sets_from_corpus(corpus: Corpus, split: Split) -> list[KnownSet]:
    """Return the sets of one split of a corpus, in its order."""
    return [
        KnownSet(corpus.names[index], corpus.libraries[index], corpus.genes(index).astype(np.int32))
        for index in corpus.indices(split)
    ]


def _known_ids(
    symbols: Iterable[str], table: SymbolTable, vocabulary: Vocabulary, report: SymbolReport
) -> tuple[np.ndarray, int]:
    ids: dict[int, None] = {}
    outside: set[str] = set()
    for written in symbols:
        gene = find_gene(written, table, vocabulary)
        report.mentions[gene.how] += 1
        if gene.id is not None:
            ids[gene.id] = None
            continue
        outside.add(gene.symbol or written)
        if gene.symbol is None:
            report.not_mapped[written] += 1
        else:
            report.not_in_vocabulary[gene.symbol] += 1
    return np.array(list(ids), np.int32), len(outside)


def _summary(counts: collections.Counter[str]) -> dict[str, Any]:
    return {"symbols": len(counts), "mentions": counts.total(), "most_frequent": _most(counts)}


def _most(counts: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NAMED])
