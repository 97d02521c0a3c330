"""What is fitted once is kept on disk for the next time."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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
    description, path = json.dumps(settings, sort_keys=True), _path(folder, name, settings)
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


def is_kept(folder: str | Path, name: str, settings: dict[str, Any]) -> bool:
    """Return whether there is a file of what was fitted with these settings."""
    return _path(folder, name, settings).exists()


def _path(folder: str | Path, name: str, settings: dict[str, Any]) -> Path:
    description = json.dumps(settings, sort_keys=True)
    return Path(folder) / f"{name}-{hashlib.sha256(description.encode()).hexdigest()[:16]}.npz"
