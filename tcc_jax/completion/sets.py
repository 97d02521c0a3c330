"""The sets to complete: symbols from a user or a GMT file, or a split of a corpus, as ids of the model's vocabulary."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tcc_jax.corpus.gmt import Problems, find_gmt_files, library_name, read_gmt
from tcc_jax.corpus.similarity import Sets, join_sets, nearest
from tcc_jax.corpus.store import SPLITS, Corpus, Split
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.terminal import UserError, log

OUTSIDE = -1
LibraryFrom = Literal["file", "description"]
_NAMED, _NAMED_ON_SCREEN = 20, 5


@dataclass(frozen=True)
class KnownSet:
    """A set as far as the vocabulary knows it.

    Attributes:
        name: the set's name.
        library: the library it comes from.
        ids: int32 ids of its genes, each once, in file order.
        outside: genes that are not in the vocabulary.
        line: int32 ids of all symbols on the set's line, each symbol once, in file order; `OUTSIDE` for one that is not
            in the vocabulary. Two symbols of one gene make its id appear twice. Empty for sets of a corpus.
    """

    name: str
    library: str
    ids: np.ndarray
    outside: int = 0
    line: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


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
    paths: Sequence[str | Path], table: SymbolTable, vocabulary: Vocabulary, library_from: LibraryFrom = "file"
) -> tuple[list[KnownSet], SymbolReport, Problems]:
    """Read GMT files or folders of them.

    Args:
        paths: GMT files and folders.
        table: maps symbols as written to approved ones.
        vocabulary: what the ids mean.
        library_from: a set's library is the file's name, or its description (the file's name where that is empty).

    Returns:
        The sets in file order (also those without a known gene), what became of their symbols, and the lines that could
        not be read.

    Raises:
        UserError: a file is missing or holds no usable set.
    """
    sets, report, problems = [], SymbolReport(), Problems()
    for path in find_gmt_files(paths):
        for gene_set in read_gmt(path, problems):
            library = gene_set.description if library_from == "description" else ""
            ids, outside, line = _known_ids(gene_set.genes, table, vocabulary, report)
            sets.append(KnownSet(gene_set.name, library or library_name(path), ids, outside, line))
    return sets, report, problems


def sets_from_corpus(corpus: Corpus, split: Split) -> list[KnownSet]:
    """Return the sets of one split of a corpus, in its order."""
    return [
        KnownSet(corpus.names[index], corpus.libraries[index], corpus.genes(index).astype(np.int32))
        for index in corpus.indices(split)
    ]


def choose_sets(sets: list[KnownSet], limit: int | None, seed: int) -> list[KnownSet]:
    """Return at most `limit` sets, chosen by the seed, in their order."""
    if limit is None or len(sets) <= limit:
        return sets
    chosen = np.random.default_rng(seed).choice(len(sets), limit, replace=False)
    return [sets[index] for index in np.sort(chosen)]


def training_sets(corpus: Corpus) -> Sets:
    """Return the training sets of a corpus as int32 ids, in memory: 4 bytes a mention."""
    train = Sets(corpus.tokens, corpus.offsets).select(corpus.splits == SPLITS.index("train"))
    return Sets(train.tokens.astype(np.int32), train.offsets)


def best_training_jaccard(
    corpus: Corpus, sets: Sequence[KnownSet], advance: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """Return [sets] float32: the largest Jaccard of each set to a training set; genes outside count in the union.

    Args:
        corpus: the prepared corpus.
        sets: whole sets, not masked ones, with ids of the corpus's vocabulary.
        advance: told the number of sets just done.
    """
    size = corpus.vocabulary.size
    # Genes that no training set can hold get numbers past the vocabulary.
    queries = join_sets([np.concatenate([one.ids, size + np.arange(one.outside)]) for one in sets])
    num_genes = size + max((one.outside for one in sets), default=0)
    return nearest(queries, training_sets(corpus), num_genes, 1.0, advance).query


def split_symbols(text: str) -> list[str]:
    """Return the symbols in a text where blanks, tabs, line ends, commas and semicolons stand between them."""
    return [symbol for symbol in re.split(r"[\s,;]+", text) if symbol]


def read_background(path: str | Path, table: SymbolTable, vocabulary: Vocabulary) -> np.ndarray:
    """Read the genes an experiment could have found, as `split_symbols` takes them from the file.

    Returns:
        [V] bool, the ids that are in the background.

    Raises:
        UserError: no such file, not a text file, or no gene of the vocabulary in it.
    """
    try:
        symbols = split_symbols(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--background {path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--background {path}: not a text file; give one gene symbol a line") from None
    ids, outside, _ = _known_ids(dict.fromkeys(symbols), table, vocabulary, SymbolReport())
    if not len(ids):
        raise UserError(f"--background {path}: no gene of the vocabulary in it; give one gene symbol a line")
    if outside:
        log(f"--background {path}: {len(ids):,} genes; {outside:,} others, outside the vocabulary, are left out")
    background_V = np.zeros(vocabulary.size, bool)
    background_V[ids] = True
    return background_V


def _known_ids(
    symbols: Iterable[str], table: SymbolTable, vocabulary: Vocabulary, report: SymbolReport
) -> tuple[np.ndarray, int, np.ndarray]:
    ids: dict[int, None] = {}
    outside: set[str] = set()
    line: list[int] = []
    for written in symbols:
        gene = find_gene(written, table, vocabulary)
        report.mentions[gene.how] += 1
        line.append(OUTSIDE if gene.id is None else gene.id)
        if gene.id is not None:
            ids[gene.id] = None
            continue
        outside.add(gene.symbol or written)
        if gene.symbol is None:
            report.not_mapped[written] += 1
        else:
            report.not_in_vocabulary[gene.symbol] += 1
    return np.array(list(ids), np.int32), len(outside), np.array(line, np.int32)


def _summary(counts: collections.Counter[str]) -> dict[str, Any]:
    return {"symbols": len(counts), "mentions": counts.total(), "most_frequent": _most(counts)}


def _most(counts: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NAMED])
