"""Fitted baselines on disk: arrays and settings in one .npz, found again by what they were fitted on and how."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tcc_jax.terminal import log

Arrays = dict[str, np.ndarray]


def default_folder() -> Path:
    """Return where fitted baselines are kept: $XDG_CACHE_HOME/tcc_jax, or ~/.cache/tcc_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcc_jax"


def cached(folder: str | Path, name: str, settings: dict[str, Any], fit: Callable[[], Arrays]) -> Arrays:
    """Return arrays that were fitted before with the same settings, or fit them and keep them.

    Args:
        folder: where the files are; made if needed.
        name: of the baseline.
        settings: JSON values that decide the result, the corpus hash among them.
        fit: makes the arrays. A file that is damaged is made again.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as binary:
            np.savez(binary, allow_pickle=False, settings=np.array(description), **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return arrays
