"""`python -m tcc_jax.complete`: propose the genes that belong with the given ones."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from tcc_jax.files import cache_folder
from tcc_jax.storage import as_path
from tcc_jax.terminal import UserError, log, parse_arguments, progress, run_command

if TYPE_CHECKING:
    from tcc_jax.completion.mixture import Mixture
    from tcc_jax.completion.model import Model
    from tcc_jax.completion.output import Format
    from tcc_jax.completion.queries import Completion, Query
    from tcc_jax.corpus.gmt import Problems
    from tcc_jax.corpus.store import Corpus
    from tcc_jax.corpus.symbols import SymbolTable

_LISTED = 20
_FORMATS = ("table", "tsv", "json", "gmt")


@dataclass(frozen=True)
class Options:
    """Propose the genes that belong with the given ones.

    Genes on the command line are one set; so are those on standard input (`-`), one a line, unless its first line holds
    a tab: then it is GMT. Notes on symbols and sets that could not be completed go to standard error.
    """

    genes: tyro.conf.Positional[tuple[str, ...]]
    """Gene symbols, such as TP53 MDM2 CDKN1A, or - for standard input; outdated ones are mapped to the approved."""
    checkpoint: str
    """A run directory (its latest step), or one step inside it (RUN/checkpoints/STEP)."""
    gmt: tuple[str, ...] = ()
    """GMT files, or folders of them, whose sets to complete."""
    number: int = 20
    """Genes to propose for each set."""
    background: str | None = None
    """File of the only symbols that may be proposed, such as those on an array or expressed in a tissue."""
    decode: Literal["rank", "sample"] = "rank"
    """Rank all genes at once, or draw them one after the other, each given those before (a joint draw)."""
    permutations: int = 1
    """Ranking: average over this many random orders of the visible genes; 1 takes them as given."""
    temperature: float = 1.0
    """Sampling: divides the logits; 0 always draws the most likely gene."""
    top_k: int = 50
    """Sampling: draw among this many most likely genes."""
    top_p: float = 1.0
    """Sampling: and among the fewest of these that hold this share of their probability."""
    stop_at_end: bool = False
    """Sampling: let the model end a set before --number genes are drawn."""
    seed: int = 0
    """Sampling: chooses the genes, together with those visible. Ranking: chooses the permutations."""
    why: bool = False
    """Name the training sets most like the visible genes that hold each proposed one; needs the corpus."""
    mixture: bool = False
    """Ranking: by the model together with set-kNN and EASE, weighed on the validation split; needs the corpus. What is
    fitted is kept in $XDG_CACHE_HOME/tcc_jax or ~/.cache/tcc_jax; the first time takes minutes."""
    corpus: str | None = None
    """The prepared corpus for --why and --mixture; the one the checkpoint was trained on unless set."""
    format: Literal["table", "tsv", "json", "gmt"] | None = None
    """Output; unless set, by the ending of --out, else a table on a terminal and TSV otherwise."""
    out: str | None = None
    """File to write, whole or not at all; standard output unless set."""
    hgnc: str | None = None
    """HGNC table that maps the symbols; the embedded one unless set."""


def main() -> None:
    """Run the command."""
    run_command(_main)


def _main() -> None:
    options = parse_arguments(Options, prog="python -m tcc_jax.complete")
    _check(options)
    from tcc_jax.completion.evidence import Evidence
    from tcc_jax.completion.model import load
    from tcc_jax.completion.output import open_output, render
    from tcc_jax.completion.queries import complete_queries, stdin_named
    from tcc_jax.completion.sampler import Sampling
    from tcc_jax.completion.sets import read_background
    from tcc_jax.corpus.gmt import Problems
    from tcc_jax.corpus.symbols import SymbolTable

    sampling = None
    if options.decode == "sample":
        sampling = Sampling(
            options.temperature, options.top_k, options.top_p, options.stop_at_end, options.seed
        )  # fmt: skip
    model = load(options.checkpoint)
    model.seed = options.seed
    symbols, problems = SymbolTable.read(options.hgnc), Problems()
    candidates_V = None
    if options.background is not None:
        candidates_V = read_background(options.background, symbols, model.vocabulary)
    corpus = _corpus(options, model) if options.why or options.mixture else None
    evidence = None if corpus is None or not options.why else Evidence(corpus)
    scorer = None if corpus is None or not options.mixture else _mixture(options, model, corpus)
    details = {
        "checkpoint": {"path": options.checkpoint, "step": model.checkpoint.step},
        "decode": "mixture" if options.mixture else options.decode,
        "number": options.number,
    }
    with progress("completing") as advance, stdin_named(), open_output(options.out) as file:
        completions = complete_queries(
            model,
            _queries(options, model, symbols, problems),
            options.number,
            permutations=options.permutations,
            sampling=sampling,
            candidates_V=candidates_V,
            scorer=scorer,
            evidence=evidence,
            advance=advance,
        )
        for piece in render(_watched(completions, model, problems), _format(options), model.vocabulary, details):
            file.write(piece)


def _check(options: Options) -> None:
    given = (bool(options.genes), bool(options.gmt))
    if given == (False, False):
        raise UserError("no gene given; name at least one, such as TP53, or a file with --gmt, or - for standard input")
    if given == (True, True):
        raise UserError("genes and --gmt are both given; choose one")
    if "-" in options.genes and len(options.genes) > 1:
        raise UserError("- (standard input) and other genes are both given; choose one")
    for name in ("number", "permutations"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.mixture and (options.decode == "sample" or options.permutations > 1):
        raise UserError("--mixture ranks by one pass; leave out --decode sample and --permutations")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: must lie between 0 and {2**32 - 1}")
    if options.out is not None and Path(options.out).is_dir():
        raise UserError(f"{options.out}: is a folder; name a file")


def _format(options: Options) -> Format:
    if options.format is not None:
        return options.format
    ending = Path(options.out or "").suffix.removeprefix(".")
    if ending in _FORMATS:
        return ending  # type: ignore[return-value]
    return "table" if options.out is None and sys.stdout.isatty() else "tsv"


def _queries(options: Options, model: Model, symbols: SymbolTable, problems: Problems) -> Iterable[Query]:
    from tcc_jax.completion.queries import queries_from_gmt, queries_from_stream, query_of
    from tcc_jax.completion.sets import split_symbols

    if options.gmt:
        return queries_from_gmt(options.gmt, symbols, model.vocabulary, problems)
    if options.genes == ("-",):
        return queries_from_stream(sys.stdin.buffer, symbols, model.vocabulary, problems)
    return [query_of("query", split_symbols(" ".join(options.genes)), symbols, model.vocabulary)]


def _watched(completions: Iterable[Completion], model: Model, problems: Problems) -> Iterator[Completion]:
    """Pass completions on, then list what became of symbols and which sets could not be completed."""
    from tcc_jax.completion.queries import name_stdin, note

    notes: collections.Counter[str] = collections.Counter()
    read, cut, failed, shown = 0, 0, 0, []
    first: Completion | None = None
    for completion in completions:
        first = first or completion
        read += 1
        cut += len(completion.visible) > model.prompt_limit
        if completion.problem:
            failed += 1
            if failed <= _LISTED:
                shown.append(f"{completion.query.name}: {completion.problem}")
        if read > 1:
            notes.update(filter(None, (note(gene, model.vocabulary, False) for gene in completion.query.symbols)))
        yield completion
    if first is not None:
        # The nearest symbols are looked for where there is a single set: it takes a moment for each unknown one.
        notes.update(filter(None, (note(gene, model.vocabulary, read == 1) for gene in first.query.symbols)))
    listed = notes.most_common(None if read == 1 else _LISTED)
    if read == failed == 1:
        raise UserError("; ".join([f"{first and first.problem}", *(text for text, _ in listed)]))
    for line in problems.lines():
        log(name_stdin(line))
    for text, count in listed:
        log(text + (f" ({count:,} sets)" if count > 1 else ""))
    if len(notes) > len(listed):
        log(f"and {len(notes) - len(listed):,} more symbols; --format json lists them with each set")
    if cut:
        part = f"the model sees a random {model.prompt_limit:,} of them"
        log(f"{cut:,} of {read:,} sets hold more genes than a row: {part}")
    if failed:
        log(f"{failed:,} of {read:,} sets could not be completed:")
        for line in shown:
            log(f"  {line}")
        if failed > len(shown):
            log(f"  and {failed - len(shown):,} more; --format json lists them")
    if failed == read:
        raise UserError(f"none of the {read:,} sets could be completed")


def _corpus(options: Options, model: Model) -> Corpus | None:
    from tcc_jax.corpus.store import open_corpus

    path = options.corpus or model.checkpoint.config.data.corpus
    if options.corpus is None and not options.mixture and not as_path(path).exists():
        log(f"--why is left out: the corpus {path} is not there; name it with --corpus")
        return None
    corpus = open_corpus(path)
    if corpus.vocabulary.hash != model.vocabulary.hash:
        raise UserError(
            f"{path}: has another vocabulary than checkpoint {options.checkpoint}; name the one it was trained on"
        )
    return corpus


def _mixture(options: Options, model: Model, corpus: Corpus) -> Mixture:
    from tcc_jax.completion.baselines import Ease, tuned_neighbours
    from tcc_jax.completion.mixture import tuned_mixture

    folder = cache_folder()
    mixture = tuned_mixture(model, Ease(corpus, folder), tuned_neighbours(corpus, folder), corpus, folder)
    log(mixture.describe())
    return mixture


if __name__ == "__main__":
    main()
