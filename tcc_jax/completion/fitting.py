"""What baselines are fitted with: settings chosen on the validation split, results kept on disk for the next time."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcc_jax.completion.metrics import rank_keys, recall_among
from tcc_jax.completion.protocol import MaskedSet, genes_of, mask_sets
from tcc_jax.completion.sets import sets_from_corpus
from tcc_jax.corpus.store import Corpus
from tcc_jax.storage import atomic_file
from tcc_jax.terminal import log

Arrays = dict[str, np.ndarray]


def cached(folder: str | Path, name: str, settings: dict[str, Any], fit: Callable[[], Arrays]) -> Arrays:
    """Return arrays that were fitted before with the same settings, or fit them and keep them.

    Args:
        folder: where the files are; made if needed.
        name: of the baseline.
        settings: JSON values that decide the result, the corpus hash among them.
        fit: makes the arrays. A file that is damaged is made again; one that can't be written is done without.
    """
    description = json.dumps(settings, sort_keys=True)
    path = Path(folder) / f"{name}-{hashlib.sha256(description.encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["settings"]) == description:
                return {key: file[key] for key in file.files if key != "settings"}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        log(f"{path}: damaged; fitted again")
    arrays = fit()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as binary:
            np.savez(binary, allow_pickle=False, settings=np.array(description), **arrays)
    except OSError as error:
        log(f"{path}: cannot be kept for the next time: {error.strerror or error}")
    return arrays


def validation_masks(corpus: Corpus, count: int) -> list[MaskedSet]:
    """Return up to `count` random sets of the validation split with a random 20 % visible; always the same ones."""
    masked, _ = mask_sets(sets_from_corpus(corpus, "validation"), genes_of(corpus.vocabulary.size))
    return [masked[index] for index in np.random.default_rng(0).permutation(len(masked))[:count]]


def recall_of_each(scores_BV: np.ndarray, masked: Sequence[MaskedSet]) -> np.ndarray:
    """Return the [B] recall of [B, V] scores in each masked set, with as many genes drawn as are hidden in it."""
    keys_BV = rank_keys(scores_BV, [one.visible for one in masked], genes_of(scores_BV.shape[1]))
    return np.array([recall_among(keys_V, keys_V[one.hidden]) for keys_V, one in zip(keys_BV, masked, strict=True)])
