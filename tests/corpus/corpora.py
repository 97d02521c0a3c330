"""Small corpora for tests."""

import functools

import numpy as np

from tcc_jax.corpus.build import BuildOptions, build_corpus
from tcc_jax.corpus.store import open_corpus, write_corpus
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.files import atomic_folder


@functools.cache
def approved_symbols():
    """All approved symbols of the embedded table, sorted."""
    return sorted(SymbolTable.read().hgnc_ids)


def write_gmt_file(path, sets):
    path.write_text("".join(f"{name}\t\t" + "\t".join(genes) + "\n" for name, genes in sets))
    return path


def random_sets(number=300, num_genes=120, seed=0, largest=40):
    """Named sets of real symbols, sizes from 5 to `largest`."""
    symbols = approved_symbols()[1000 : 1000 + num_genes]
    random = np.random.default_rng(seed)
    return [
        (f"set {index}", random.choice(symbols, random.integers(5, largest), replace=False).tolist())
        for index in range(number)
    ]


def make_corpus(folder, sets=None, **options):
    """Prepare and open a corpus at folder/corpus."""
    folder.mkdir(exist_ok=True)
    gmt = write_gmt_file(folder / "lib.gmt", random_sets() if sets is None else sets)
    with atomic_folder(folder / "corpus") as temporary:
        write_corpus(temporary, build_corpus([gmt], BuildOptions(**options)))
    return open_corpus(folder / "corpus")
