"""Gene sets as ids of the model's vocabulary: symbols of a user, GMT files, standard input, or a split of a corpus."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tcc_jax.corpus.gmt import Problems, find_gmt_files, library_name, read_gmt, read_lines
from tcc_jax.corpus.store import Corpus, Split
from tcc_jax.corpus.symbols import Resolution, SymbolTable
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.files import check_input_file
from tcc_jax.terminal import UserError, log

OUTSIDE = -1
LibraryFrom = Literal["file", "description"]
_NAMED, _NAMED_ON_SCREEN = 20, 5
# What `symbols.How` does not say by itself.
_HOW = {"case": "in another case", "date": "read as dates", "ensembl": "Ensembl ids", "entrez": "Entrez ids"}


@dataclass(frozen=True)
class FoundGene:
    """What became of one symbol: its approved symbol, how that was found, and its id; None where there is none."""

    written: str
    symbol: str | None
    how: str
    id: int | None


@dataclass(frozen=True)
class KnownSet:
    """A set as far as the vocabulary knows it.

    Attributes:
        name: the set's name.
        library: the library it comes from.
        ids: int32 ids of its genes, each once, in file order.
        outside: genes that are not in the vocabulary.
        symbols: what became of each symbol on the set's line, in file order; empty for sets of a corpus.
    """

    name: str
    library: str
    ids: np.ndarray
    outside: int = 0
    symbols: tuple[FoundGene, ...] = ()

    @property
    def line(self) -> np.ndarray:
        """int32 ids of `symbols`, `OUTSIDE` where there is none: an id stands twice where two symbols are one gene."""
        return np.array([OUTSIDE if gene.id is None else gene.id for gene in self.symbols], np.int32)


class GeneFinder:
    """Finds symbols in a vocabulary: as they are written, else by their approved symbol.

    Args:
        table: maps symbols as written to approved ones.
        vocabulary: what the ids mean.
    """

    def __init__(self, table: SymbolTable, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._table = table
        # Symbols repeat: each is looked up, and held in memory, once.
        self._found: dict[str, FoundGene] = {}

    def gene(self, written: str) -> FoundGene:
        """Look one symbol up."""
        if written not in self._found:
            ids = self.vocabulary.ids
            known = Resolution(written, "approved") if written in ids else self._table.resolve(written)
            self._found[written] = FoundGene(written, known.symbol, known.how, ids.get(known.symbol or ""))
        return self._found[written]

    def known_set(self, name: str, library: str, symbols: Iterable[str]) -> KnownSet:
        """Look the symbols of a set up; one that is given twice counts once."""
        genes = tuple(self.gene(written) for written in dict.fromkeys(symbols))
        ids = dict.fromkeys(gene.id for gene in genes if gene.id is not None)
        outside = {gene.symbol or gene.written for gene in genes if gene.id is None}
        return KnownSet(name, library, np.array(list(ids), np.int32), len(outside), genes)


def read_sets(
    paths: Sequence[str | Path],
    finder: GeneFinder,
    problems: Problems,
    library_from: LibraryFrom = "file",
    keep_empty: bool = False,
) -> Iterator[KnownSet]:
    """Read sets from GMT files, or folders of them, as they are needed.

    Args:
        paths: the files and folders.
        finder: looks their symbols up.
        problems: where lines that could not be read are counted.
        library_from: a set's library is the file's name, or its description (the file's name where that is empty).
        keep_empty: also yield what has a name and no gene.

    Yields:
        The sets in file order, also those without a known gene.

    Raises:
        UserError: a file is missing or holds no usable set.
    """
    for path in find_gmt_files(paths):
        for gene_set in read_gmt(path, problems, keep_empty):
            library = gene_set.description if library_from == "description" else ""
            yield finder.known_set(gene_set.name, library or library_name(path), gene_set.genes)


def read_stream(stream: Iterator[bytes], finder: GeneFinder, problems: Problems) -> Iterator[KnownSet]:
    """Read standard input: GMT where the first line that is not blank holds a tab, else symbols of one set.

    GMT is read line by line, as it comes.

    Raises:
        UserError: nothing in it, or no usable line.
    """
    head: list[bytes] = []
    for line in stream:
        head.append(line)
        if line.strip():
            break
    else:
        raise UserError("standard input is empty; give GMT lines, or one gene a line")
    lines = itertools.chain(head, stream)
    if b"\t" not in line:
        text = b"".join(lines).decode("utf-8-sig", errors="replace")
        yield finder.known_set("standard input", "", split_symbols(text))
        return
    for gene_set in read_lines(lines, "standard input", problems, keep_empty=True):
        yield finder.known_set(gene_set.name, "standard input", gene_set.genes)


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


def summarise_symbols(sets: Iterable[KnownSet]) -> tuple[dict[str, Any], list[str]]:
    """Say what became of the symbols of all sets.

    Returns:
        JSON values: mentions by the way of mapping, and of what is left out the most frequent symbols; and what a user
        should know of that, one line each.
    """
    mentions: collections.Counter[str] = collections.Counter()
    left_out = {"not_mapped": collections.Counter[str](), "not_in_vocabulary": collections.Counter[str]()}
    for gene in (gene for one in sets for gene in one.symbols):
        mentions[gene.how] += 1
        if gene.id is None:
            left_out["not_in_vocabulary" if gene.symbol else "not_mapped"][gene.symbol or gene.written] += 1
    summary: dict[str, Any] = {"mentions": dict(sorted(mentions.items()))}
    counted = (f"{count:,} {_HOW.get(how, how)}" for how, count in mentions.most_common())
    lines = [f"symbols as read: {', '.join(counted)}"]
    for name, counts in left_out.items():
        most = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NAMED])
        summary[name] = {"symbols": len(counts), "mentions": counts.total(), "most_frequent": most}
        if counts:
            few = ", ".join(list(most)[:_NAMED_ON_SCREEN])
            what = {"not_mapped": "not mapped", "not_in_vocabulary": "not in the vocabulary"}[name]
            lines.append(f"{what}: {len(counts):,} symbols, {counts.total():,} mentions (most often {few})")
    return summary, lines


def split_symbols(text: str) -> list[str]:
    """Return the symbols in a text where blanks, tabs, line ends, commas and semicolons stand between them."""
    return [symbol for symbol in re.split(r"[\s,;]+", text) if symbol]


def read_background(path: str | Path, finder: GeneFinder) -> np.ndarray:
    """Read the genes an experiment could have found, as `split_symbols` takes them from the file.

    Returns:
        [V] bool, the ids that are in the background.

    Raises:
        UserError: no such file, not a text file, or no gene of the vocabulary in it.
    """
    check_input_file(path, "--background")
    try:
        symbols = split_symbols(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"--background {path}: not a text file; give one gene symbol a line") from None
    known = finder.known_set("", "", symbols)
    if not len(known.ids):
        raise UserError(f"--background {path}: no gene of the vocabulary in it; give one gene symbol a line")
    if known.outside:
        others = f"{known.outside:,} others, outside the vocabulary, are left out"
        log(f"--background {path}: {len(known.ids):,} genes; {others}")
    background_V = np.zeros(finder.vocabulary.size, bool)
    background_V[known.ids] = True
    return background_V
