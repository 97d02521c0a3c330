"""What `complete` does: sets in, completed sets out as a stream of text, and what became of them to standard error."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from tcc_jax.baselines import Scorer
from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.relevance import RelevanceModel
from tcc_jax.completion.mixture import tuned_mixture
from tcc_jax.completion.model import AMBIGUOUS, WINDOW, Model, Proposal, load, unknown_gene
from tcc_jax.completion.options import CompleteOptions, Format
from tcc_jax.completion.ranker import batched
from tcc_jax.completion.sampler import Sampling
from tcc_jax.completion.sets import (
    FoundGene,
    GeneFinder,
    KnownSet,
    read_background,
    read_sets,
    read_stream,
    split_symbols,
)
from tcc_jax.corpus.gmt import Problems
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.files import cache_folder
from tcc_jax.storage import atomic_file
from tcc_jax.terminal import Advance, UserError, log, log_lines, one_line, progress, table

FORMAT_VERSION = 1
_LISTED = 20
# Training sets that are named for a proposed gene.
_SETS_OF_EVIDENCE = 3


@dataclass(frozen=True)
class Neighbour:
    """A training set that holds a proposed gene.

    Attributes:
        name: of the set.
        library: it comes from.
        shared: visible genes that are in it.
        size: its genes.
        jaccard: shared genes over the genes of the visible ones and the set together.
    """

    name: str
    library: str
    shared: int
    size: int
    jaccard: float


@dataclass(frozen=True)
class Completion:
    """A completed set.

    Attributes:
        query: what was completed; its genes were visible.
        proposals: what the model proposes; empty where it can't.
        evidence: for each proposal the training sets that speak for it; None unless asked for.
        problem: why there is no proposal; empty where there is one.
    """

    query: KnownSet
    proposals: list[Proposal]
    evidence: list[list[Neighbour]] | None
    problem: str


def write_completions(options: CompleteOptions, format: Format) -> None:
    """Complete what the options name and write it where they say, in bounded memory.

    Raises:
        UserError: an input that can't be used, or no set that could be completed; nothing is written then.
    """
    sampling = None
    if options.decode == "sample":
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.stop_at_end, options.seed)
    model = load(options.checkpoint)
    model.seed = options.seed
    symbols = SymbolTable.read(options.hgnc, options.case_insensitive)
    finder, problems = GeneFinder(symbols, model.vocabulary), Problems()
    candidates_V = None if options.background is None else read_background(options.background, finder)
    evidence, scorer = None, model.scorer(options.permutations)
    if options.why or options.mixture:
        corpus, missing = model.corpus(options.corpus, required=options.mixture or options.corpus is not None)
        if corpus is None:
            log(f"--why is left out: {missing}")
        else:
            index = TrainingIndex(corpus)
            evidence = Evidence(index) if options.why else None
            if options.mixture:
                scorer = tuned_mixture(model, RelevanceModel(index), cache_folder())
                log(scorer.describe())
    details = {
        "checkpoint": {"path": options.checkpoint, "step": model.checkpoint.step},
        "decode": "mixture" if options.mixture else options.decode,
        "number": options.number,
    }
    with progress("completing") as advance, _open_output(options.out) as file:
        queries = _queries(options, finder, problems)
        completions = _complete(model, queries, options.number, scorer, sampling, candidates_V, evidence, advance)
        watched = _watched(completions, model, problems, options.number if sampling else None)
        for piece in _render(watched, format, model.vocabulary, details):
            file.write(piece)


class Evidence:
    """Finds the training sets that speak for proposed genes.

    Args:
        index: the training sets.
    """

    def __init__(self, index: TrainingIndex) -> None:
        self._index = index

    def __call__(self, visible: np.ndarray, proposed: Iterable[int]) -> list[list[Neighbour]]:
        """Return for each proposed gene the training sets that hold it and a visible gene, by falling Jaccard.

        Args:
            visible: ids of the visible genes, each once.
            proposed: ids of the proposed genes.
        """
        shared, jaccard = self._index.shared(visible)
        evidence = []
        for gene in proposed:
            holding = self._index.holding(gene)
            holding = holding[shared[holding] > 0]
            best = holding[np.lexsort((holding, -jaccard[holding]))[:_SETS_OF_EVIDENCE]]
            evidence.append([self._neighbour(place, int(shared[place]), float(jaccard[place])) for place in best])
        return evidence

    def _neighbour(self, place: int, shared: int, jaccard: float) -> Neighbour:
        corpus, number, size = self._index.corpus, self._index.numbers[place], int(self._index.lengths[place])
        return Neighbour(corpus.names[number], corpus.libraries[number], shared, size, jaccard)


def _queries(options: CompleteOptions, finder: GeneFinder, problems: Problems) -> Iterable[KnownSet]:
    if options.gmt:
        return read_sets(options.gmt, finder, problems, keep_empty=True)
    if options.genes == ("-",):
        return read_stream(sys.stdin.buffer, finder, problems)
    return [finder.known_set("query", "", split_symbols(" ".join(options.genes)))]


def _complete(
    model: Model,
    queries: Iterable[KnownSet],
    number: int,
    scorer: Scorer,
    sampling: Sampling | None,
    candidates_V: np.ndarray | None,
    evidence: Evidence | None,
    advance: Advance,
) -> Iterator[Completion]:
    # One that can't be completed has its problem instead of proposals, and does not stop the others.
    for window in batched(queries, WINDOW):
        known = ((query.ids, number) for query in window if len(query.ids))
        # Counted where they are done: by the batch, and those without a known gene below.
        found = model.propose(known, scorer, sampling, candidates_V, advance)
        for query in window:
            if not len(query.ids):
                yield Completion(query, [], None, "no known gene" if query.symbols else "no gene")
                advance(1)
            else:
                ids, shares = next(found)
                why = evidence(query.ids, ids) if evidence is not None else None
                # Also where the model, allowed to, ends a set at once.
                problem = "" if len(ids) else "no gene is left to propose"
                yield Completion(query, model.records(ids, shares), why, problem)


def _watched(
    completions: Iterable[Completion], model: Model, problems: Problems, sampled: int | None
) -> Iterator[Completion]:
    """Pass completions on, then list what became of symbols and which sets could not be completed, or not in full.

    With `sampled`, the genes asked for, they are drawn one after the other instead of ranked.
    """
    notes: collections.Counter[str] = collections.Counter()
    read, cut, failed, shown = 0, 0, 0, []
    crowded, example = 0, ""
    first: Completion | None = None
    for completion in completions:
        first = first or completion
        read += 1
        given = len(completion.query.ids)
        if sampled is None:
            cut += given > model.prompt_limit
        elif given and ((room := model.room_to_draw(given, sampled)).shown < given or room.missing):
            crowded += 1
            parts = f"{room.shown:,} of {given:,} genes shown, at most {room.drawn:,} of {sampled:,} drawn"
            example = example or f"{completion.query.name}: {parts}"
        if completion.problem:
            failed += 1
            if failed <= _LISTED:
                shown.append(f"{completion.query.name}: {completion.problem}")
        if read > 1:
            notes.update(_notes(completion.query))
        yield completion
    if first is not None:
        # The nearest symbols are looked for where there is a single set: it takes a moment for each unknown one.
        notes.update(_notes(first.query, model.vocabulary if read == 1 else None))
    listed = notes.most_common(_LISTED)
    more = f"and {len(notes) - len(listed):,} more symbols" if len(notes) > len(listed) else ""
    if first is not None and read == failed == 1:
        raise UserError("; ".join(filter(None, [first.problem, *(text for text, _ in listed), more])))
    log_lines(problems.lines())
    for text, count in listed:
        log(text + (f" ({count:,} sets)" if count > 1 else ""))
    if more:
        log(f"{more}; --format json lists them with each set")
    if cut:
        part = f"the model sees a random {model.prompt_limit:,} of them"
        log(f"{cut:,} of {read:,} sets hold more genes than a row: {part}")
    if crowded:
        part = "a random part of their genes was shown, or fewer can come back"
        log(f"{crowded:,} of {read:,} sets do not fit in a row together with what is drawn: {part} ({example})")
    if failed:
        log(f"{failed:,} of {read:,} sets could not be completed:")
        log_lines(f"  {line}" for line in shown)
        if failed > len(shown):
            log(f"  and {failed - len(shown):,} more; --format json lists them")
    if failed == read:
        raise UserError(f"none of the {read:,} sets could be completed")


def _notes(query: KnownSet, vocabulary: Vocabulary | None = None) -> list[str]:
    """Say what was done with each symbol that is not simply an approved one.

    With a vocabulary, also name the nearest ones, for as many notes as are listed.
    """
    notes: list[str] = []
    for gene in query.symbols:
        if note := _note(gene, vocabulary if len(notes) < _LISTED else None):
            notes.append(note)
    return notes


def _note(gene: FoundGene, vocabulary: Vocabulary | None) -> str:
    if gene.id is not None:
        return "" if gene.written == gene.symbol else f"{gene.written} is {gene.symbol} ({gene.how})"
    if gene.symbol is not None:
        same = "" if gene.written == gene.symbol else f" is {gene.symbol} ({gene.how}), which"
        return f"{gene.written}{same} is approved but not in the model's vocabulary; left out"
    if gene.how == "ambiguous":
        return f"{gene.written} is {AMBIGUOUS}; left out"
    unknown = "not in the vocabulary" if vocabulary is None else unknown_gene(gene.written, vocabulary)
    return f"{gene.written} is {unknown}; left out"


@contextlib.contextmanager
def _open_output(path: str | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        yield file


def _render(
    completions: Iterable[Completion], format: Format, vocabulary: Vocabulary, details: dict[str, Any]
) -> Iterator[str]:
    if format == "json":
        return _json(completions, vocabulary, details)
    # Only JSON holds sets without proposals.
    layout = {"table": _table, "tsv": _tsv, "gmt": _gmt}[format]
    return layout(one for one in completions if one.proposals)


def _table(completions: Iterable[Completion]) -> Iterator[str]:
    for place, completion in enumerate(completions):
        rows = [(one.rank, one.symbol, f"{one.probability:.6f}") for one in completion.proposals]
        blank = "\n" if place else ""
        count = len(completion.query.ids)
        visible = f"{count:,} visible gene{'s' if count > 1 else ''}"
        yield f"{blank}{one_line(completion.query.name)}: {visible}\n{table(('rank', 'gene', 'probability'), rows)}\n"
        if completion.evidence is not None:
            yield "\ntraining sets most like the visible genes that hold each gene:\n"
            for one, neighbours in zip(completion.proposals, completion.evidence, strict=True):
                yield f"{one.symbol}: {_in_words(neighbours) or 'none shares a visible gene'}\n"


def _tsv(completions: Iterable[Completion]) -> Iterator[str]:
    for place, completion in enumerate(completions):
        evidence = completion.evidence
        if place == 0:
            header = ["set", "rank", "gene", "probability", *(["training_sets"] if evidence is not None else [])]
            yield "\t".join(header) + "\n"
        for index, one in enumerate(completion.proposals):
            cells = [one_line(completion.query.name), str(one.rank), one.symbol, f"{one.probability:.6g}"]
            if evidence is not None:
                cells.append(_in_words(evidence[index]))
            yield "\t".join(cells) + "\n"


def _gmt(completions: Iterable[Completion]) -> Iterator[str]:
    for completion in completions:
        symbols = [one.symbol for one in completion.proposals]
        description = f"{len(symbols)} genes proposed by tcc_jax from {len(completion.query.ids)} visible"
        yield "\t".join([one_line(completion.query.name), description, *symbols]) + "\n"


def _json(completions: Iterable[Completion], vocabulary: Vocabulary, details: dict[str, Any]) -> Iterator[str]:
    # One document, one line a set. What comes before the first proposal waits for it: without any, nothing is written.
    head = json.dumps({"format_version": FORMAT_VERSION, **details}, ensure_ascii=False)
    waiting, proposed = [head[:-1] + ', "sets": ['], False
    for place, completion in enumerate(completions):
        waiting.append((",\n" if place else "\n") + json.dumps(_record(completion, vocabulary), ensure_ascii=False))
        proposed = proposed or bool(completion.proposals)
        if proposed:
            yield "".join(waiting)
            waiting.clear()
    yield "".join([*waiting, "\n]}\n"])


def _record(completion: Completion, vocabulary: Vocabulary) -> dict[str, Any]:
    proposals = [dataclasses.asdict(one) for one in completion.proposals]
    for proposal, neighbours in zip(proposals, completion.evidence or [], strict=False):
        proposal["training_sets"] = [dataclasses.asdict(one) for one in neighbours]
    query = completion.query
    return {
        "set": query.name,
        "visible": [vocabulary.symbols[id_] for id_ in query.ids],
        "symbols": [
            {"written": gene.written, "symbol": gene.symbol, "how": gene.how, "used": gene.id is not None}
            for gene in query.symbols
        ],
        "notes": _notes(query),
        "proposals": proposals,
        "problem": completion.problem or None,
    }


def _in_words(neighbours: Sequence[Neighbour]) -> str:
    return "; ".join(
        f"{one_line(one.name)} ({one_line(one.library)}): {one.shared} shared, {one.size} genes, "
        f"Jaccard {one.jaccard:.3f}"
        for one in neighbours
    )
