"""From what a user gives - symbols, a GMT file, standard input - to completed sets, as a stream."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tcc_jax.completion.evidence import Evidence, Neighbour
from tcc_jax.completion.model import WINDOW, Model, Proposal, batched, unknown_gene
from tcc_jax.completion.ranker import Scorer
from tcc_jax.completion.sampler import Sampling
from tcc_jax.completion.sets import FoundGene, find_gene, split_symbols
from tcc_jax.corpus.gmt import Problems, find_gmt_files, read_gmt
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.terminal import UserError


@dataclass(frozen=True)
class Query:
    """A set to complete: its name and what became of each of its symbols."""

    name: str
    symbols: tuple[FoundGene, ...]

    @property
    def ids(self) -> np.ndarray:
        """The visible genes: int32 ids, each once, in the order given."""
        return np.array(list(dict.fromkeys(gene.id for gene in self.symbols if gene.id is not None)), np.int32)


@dataclass(frozen=True)
class Completion:
    """A completed set.

    Attributes:
        query: what was completed.
        visible: ids of the visible genes.
        proposals: what the model proposes; empty where it can't.
        evidence: for each proposal the training sets that speak for it; None unless asked for.
        problem: why there is no proposal; empty where there is one.
    """

    query: Query
    visible: np.ndarray
    proposals: list[Proposal]
    evidence: list[list[Neighbour]] | None
    problem: str


def query_of(name: str, symbols: Sequence[str], table: SymbolTable, vocabulary: Vocabulary) -> Query:
    """Look up the symbols of a set; one that is given twice counts once."""
    return Query(name, tuple(find_gene(written, table, vocabulary) for written in dict.fromkeys(symbols)))


def queries_from_gmt(
    paths: Sequence[str | Path], table: SymbolTable, vocabulary: Vocabulary, problems: Problems
) -> Iterator[Query]:
    """Read sets from GMT files, or folders of them, as they are needed.

    Args:
        paths: the files.
        table: maps symbols.
        vocabulary: of the model.
        problems: where lines that could not be read are counted.

    Raises:
        UserError: a file is missing or holds no usable set.
    """
    for path in find_gmt_files(paths):
        for gene_set in read_gmt(path, problems):
            yield query_of(gene_set.name, gene_set.genes, table, vocabulary)


def queries_from_stream(
    stream: IO[bytes], table: SymbolTable, vocabulary: Vocabulary, problems: Problems
) -> Iterator[Query]:
    """Read standard input to its end: GMT where the first line that is not blank holds a tab, else symbols of one set.

    Raises:
        UserError: nothing in it, or no usable line.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Kept on disk, so that a stream of any size is read like any other GMT file.
        path = Path(folder) / "stdin.gmt"
        with open(path, "wb") as copy:
            shutil.copyfileobj(stream, copy)
        with open(path, "rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        if not first:
            raise UserError("standard input is empty; give GMT lines, or one gene a line")
        if b"\t" in first.strip():
            yield from queries_from_gmt([path], table, vocabulary, problems)
            return
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        yield query_of("standard input", split_symbols(text), table, vocabulary)


def complete_queries(
    model: Model,
    queries: Iterable[Query],
    number: int,
    *,
    permutations: int = 1,
    sampling: Sampling | None = None,
    candidates_V: np.ndarray | None = None,
    scorer: Scorer | None = None,
    evidence: Evidence | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Completion]:
    """Complete a stream of sets in bounded memory.

    Args:
        model: what completes.
        queries: sets, of any number.
        number: genes to propose for each.
        permutations: as for `Model.complete`.
        sampling: as for `Model.complete`.
        candidates_V: as for `Model.propose`.
        scorer: as for `Model.propose`.
        evidence: finds the training sets that speak for each gene; None leaves them out.
        advance: called with the number of sets just done.

    Yields:
        A completion for each set in order; one that can't be completed has its problem instead of proposals.
    """
    for window in batched(queries, WINDOW):
        prompts = [query.ids for query in window]
        known = ((prompt, number) for prompt in prompts if len(prompt))
        found = model.propose(
            known, permutations=permutations, sampling=sampling, candidates_V=candidates_V, scorer=scorer
        )
        for query, prompt in zip(window, prompts, strict=True):
            if not len(prompt):
                problem = "no known gene" if query.symbols else "no gene"
                yield Completion(query, prompt, [], None, problem)
            else:
                ids, shares = next(found)
                why = evidence(prompt, ids) if evidence is not None else None
                # Also where the model, allowed to, ends a set at once.
                problem = "" if len(ids) else "no gene is left to propose"
                yield Completion(query, prompt, model.records(ids, shares), why, problem)
            advance(1)


def note(gene: FoundGene, vocabulary: Vocabulary, suggest: bool = True) -> str:
    """Say what was done with a symbol that is not simply an approved one; empty for one that is.

    Args:
        gene: the symbol.
        vocabulary: of the model.
        suggest: name the nearest symbols to an unknown one, which takes about a tenth of a second.
    """
    if gene.id is not None:
        return "" if gene.written == gene.symbol else f"{gene.written} is {gene.symbol} ({gene.how})"
    if gene.symbol is not None:
        same = "" if gene.written == gene.symbol else f" is {gene.symbol} ({gene.how}), which"
        return f"{gene.written}{same} is approved but not in the model's vocabulary; left out"
    if gene.how == "ambiguous":
        return f"{gene.written} is ambiguous: several genes share that name; left out"
    unknown = unknown_gene(gene.written, vocabulary) if suggest else "not in the vocabulary"
    return f"{gene.written} is {unknown}; left out"


@contextlib.contextmanager
def stdin_named() -> Iterator[None]:
    """Name standard input in an error about its lines, not the file that it was copied to."""
    try:
        yield
    except UserError as error:
        raise UserError(name_stdin(str(error))) from None


def name_stdin(text: str) -> str:
    """Return a message with standard input in place of the file that it was copied to."""
    return re.sub(r"\S*/stdin\.gmt", "standard input", text)
