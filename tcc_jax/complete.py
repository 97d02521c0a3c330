"""`python -m tcc_jax.complete`: propose the genes that belong with the given ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from tcc_jax.terminal import UserError, log, parse_arguments, run_command, table

if TYPE_CHECKING:
    from tcc_jax.completion.sets import FoundGene
    from tcc_jax.corpus.vocabulary import Vocabulary


@dataclass(frozen=True)
class Options:
    """Propose the genes that belong with the given ones: a table of rank, gene and probability."""

    genes: tyro.conf.Positional[tuple[str, ...]]
    """Gene symbols, such as TP53 MDM2 CDKN1A; outdated ones are mapped to their approved symbol."""
    checkpoint: str
    """A run directory (its latest step), or one step inside it (RUN/checkpoints/STEP)."""
    number: int = 20
    """Genes to propose."""
    hgnc: str | None = None
    """HGNC table that maps the symbols; the embedded one unless set."""


def main() -> None:
    """Run the command."""
    run_command(_main)


def _main() -> None:
    options = parse_arguments(Options, prog="python -m tcc_jax.complete")
    if not options.genes:
        raise UserError("no gene given; name at least one, such as TP53")
    if options.number < 1:
        raise UserError(f"--number {options.number}: must be at least 1")
    from tcc_jax.completion.model import load
    from tcc_jax.completion.sets import find_gene
    from tcc_jax.corpus.symbols import SymbolTable

    model = load(options.checkpoint)
    symbols = SymbolTable.read(options.hgnc)
    found = [find_gene(written, symbols, model.vocabulary) for written in dict.fromkeys(options.genes)]
    notes = [note for gene in found if (note := _note(gene, model.vocabulary))]
    known = list(dict.fromkeys(gene.symbol for gene in found if gene.id is not None and gene.symbol))
    if not known:
        raise UserError("no known gene: " + "; ".join(notes))
    for note in notes:
        log(note)
    if len(known) > model.prompt_limit:
        log(f"{len(known):,} genes are more than a row holds: the model sees a random {model.prompt_limit:,} of them")
    proposals = model.complete(known, options.number)
    print(table(("rank", "gene", "probability"), [(p.rank, p.symbol, f"{p.probability:.6f}") for p in proposals]))


def _note(gene: FoundGene, vocabulary: Vocabulary) -> str:
    from tcc_jax.completion.model import unknown_gene

    if gene.id is not None:
        return "" if gene.written == gene.symbol else f"{gene.written} is {gene.symbol} ({gene.how})"
    if gene.symbol is not None:
        same = "" if gene.written == gene.symbol else f" is {gene.symbol} ({gene.how}), which"
        return f"{gene.written}{same} is approved but not in the model's vocabulary; left out"
    if gene.how == "ambiguous":
        return f"{gene.written} is ambiguous: several genes share that name; left out"
    return f"{gene.written} is {unknown_gene(gene.written, vocabulary)}; left out"


if __name__ == "__main__":
    main()
