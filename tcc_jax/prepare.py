"""`python -m tcc_jax.prepare`: GMT files to a prepared corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tcc_jax.corpus.build import BuildOptions, build_corpus, counts_table
from tcc_jax.corpus.store import DESCRIPTION, Corpus, write_corpus
from tcc_jax.files import atomic_folder
from tcc_jax.terminal import command, parse_arguments, table


@dataclass(frozen=True, kw_only=True)
class Arguments(BuildOptions):
    """Prepare a corpus: read GMT files, harmonise symbols to HGNC, filter, deduplicate, split, write."""

    gmt: tuple[Path, ...]
    """GMT files (.gmt, .txt, also .gz and .xz) and folders of them; a library is named after its file."""
    out: Path
    """Folder to write the corpus to."""
    overwrite: bool = False
    """Replace the output folder if it exists."""


@command
def main() -> None:
    """Run the command."""
    arguments = parse_arguments(Arguments, prog="python -m tcc_jax.prepare")
    with atomic_folder(arguments.out, marker=DESCRIPTION, replace=arguments.overwrite) as folder:
        corpus = build_corpus(arguments.gmt, arguments)
        write_corpus(folder, corpus)
    print(_summary(corpus))
    print(f"\ncorpus: {arguments.out}")


def _summary(corpus: Corpus) -> str:
    parts = [counts_table(corpus.meta["counts"])]
    rows = []
    for name, leaks in corpus.meta["leaks"].items():
        rows.append([f"{name} ({leaks['sets']:,} sets)", *leaks["with_training_set_at_jaccard"].values()])
    parts.append(table(["leaks: nearest training set at Jaccard", ">= 0.3", ">= 0.5", ">= 0.9"], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
