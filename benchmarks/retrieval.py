"""How long the lookups take: `python -m benchmarks.retrieval CORPUS`, set-kNN and the relevance model.

Sets of the test split show a random 20 % of their genes and are completed from the training sets. Prints seconds of the
clock and of the processor, and the largest memory of the process. Run from the repository's root.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.baselines.relevance import RelevanceModel
from tcc_jax.completion.masks import mask_sets
from tcc_jax.completion.ranker import batched
from tcc_jax.completion.sets import choose_sets, sets_from_corpus
from tcc_jax.corpus.store import open_corpus
from tcc_jax.corpus.vocabulary import genes_of
from tcc_jax.terminal import command, parse_arguments, table


@dataclass(frozen=True)
class Options:
    """Time the lookups that `eval` measures a model against."""

    corpus: tyro.conf.Positional[Path]
    """A prepared corpus."""
    sets: int = 1000
    """Sets to complete, of the test split."""
    knn: tuple[int, float] = (2000, 6.0)
    """Neighbours and power of set-kNN."""


@command
def main() -> None:
    """Run the command."""
    options = parse_arguments(Options, prog="python -m benchmarks.retrieval")
    corpus = open_corpus(options.corpus)
    sets = choose_sets(sets_from_corpus(corpus, "test"), options.sets, 0)
    visible = [one.visible for one in mask_sets(sets, genes_of(corpus.vocabulary.size))[0]]
    clock, processor = time.perf_counter(), time.process_time()
    rows = []

    def lap(what: str) -> None:
        nonlocal clock, processor
        rows.append([what, f"{time.perf_counter() - clock:.2f}", f"{time.process_time() - processor:.2f}"])
        clock, processor = time.perf_counter(), time.process_time()

    index = TrainingIndex(corpus)
    lap("index")
    for name, scorer in (("set-kNN", SetNeighbours(index, *options.knn)), ("relevance", RelevanceModel(index))):
        lap(f"{name}: build")
        for batch in batched(visible, 128):
            scorer(batch)
        lap(f"{name}: score")
    # Linux counts in units of 1,024 bytes.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(visible):,} sets against {len(index):,} training sets; {memory:.2f} GiB at most")
    print(table(("part", "seconds", "of the processor"), rows))


if __name__ == "__main__":
    main()
