"""A tiny corpus, run and HGNC table for the tests of completion: 60 genes G0 .. G59 in three families of 20."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from tcc_jax.config import Config, from_dict
from tcc_jax.corpus.store import SPLITS, Corpus, open_corpus, write_corpus
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, SPECIAL_SYMBOLS, Vocabulary
from tcc_jax.model.decoder import initial_params
from tcc_jax.runs.checkpoint import VOCABULARY_FILE, describe
from tcc_jax.runs.saving import CheckpointWriter

NUM_GENES, FAMILY = 60, 20
STEP = 7


def make_corpus(folder: Path, prefix: str = "G", num_sets: int = 90) -> Corpus:
    """Write a corpus of sets drawn from one family each; the first 60 % are for training, the last 30 % for testing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    families = [NUM_SPECIAL + FAMILY * (index % 3) + np.arange(FAMILY) for index in range(num_sets)]
    sets = [rng.choice(family, rng.integers(5, 13), replace=False) for family in families]
    splits = np.repeat([0, 1, 2], [num_sets * 6 // 10, num_sets // 10, num_sets * 3 // 10]).astype(np.uint8)
    train = [genes for genes, split in zip(sets, splits, strict=True) if split == SPLITS.index("train")]
    size = NUM_SPECIAL + NUM_GENES
    symbols = (*SPECIAL_SYMBOLS, *(f"{prefix}{index}" for index in range(NUM_GENES)))
    vocabulary = Vocabulary(symbols, ("",) * size, np.bincount(np.concatenate(train), minlength=size))
    corpus = Corpus(
        path=folder,
        meta={"options": {}},
        vocabulary=vocabulary,
        names=[f"set {index}/a" for index in range(num_sets)],
        libraries=["lib"] * num_sets,
        other_names=[[] for _ in sets],
        splits=splits,
        clusters=np.arange(num_sets),
        tokens=np.concatenate(sets),
        offsets=np.concatenate([[0], np.cumsum([len(genes) for genes in sets])]),
    )
    write_corpus(folder, corpus)
    return open_corpus(folder)


def make_run(folder: Path, corpus: Corpus, row_length: int = 32, seed: int = 3, position: str = "none") -> Config:
    """Write a run directory with one checkpoint of a randomly initialised decoder."""
    config = from_dict(
        {
            "run": {"directory": str(folder)},
            "data": {"corpus": str(corpus.path)},
            "model": {"num_layers": 1, "width": 16, "num_heads": 2, "matmul_dtype": "float32", "position": position},
            "training": {"row_length": row_length},
        }
    )
    import jax

    folder.mkdir(parents=True)
    shutil.copy(corpus.path / "genes.tsv", folder / VOCABULARY_FILE)
    params = initial_params(config.model, corpus.vocabulary.size, row_length, jax.random.key(seed))
    # Larger weights than at the start of training, so that what is visible matters to the scores.
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, params)
    with CheckpointWriter(folder, keep=1) as writer:
        writer.save(STEP, {"params": params}, describe(config, corpus, STEP, 0.0))
    return config


def write_hgnc(path: Path) -> Path:
    """Write an HGNC table of G0 .. G59, G99 (approved, in no corpus), previous symbol OLD1 of G1, alias TWO of two."""
    rows = ["symbol\tprev_symbol\talias_symbol"]
    for index in (*range(NUM_GENES), 99):
        rows.append(f"G{index}\t{'OLD1' if index == 1 else ''}\t{'TWO' if index in (2, 3) else ''}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
