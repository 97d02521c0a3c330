"""Files: atomic output folders, checksums, compressed text, and where the embedded data is."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tcc_jax.terminal import UserError


def embedded(name: str) -> Path:
    """Return the path of an embedded data file: inside the installed package, or data/ of the repository."""
    package = Path(__file__).resolve().parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{name}: the embedded data file is missing; reinstall tcc-jax")


def open_binary(path: str | Path) -> IO[bytes]:
    """Open a plain, .gz or .xz file (by its ending) for reading bytes."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path, "rb")
    return open(path, "rb")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    Args:
        path: the folder to make. Parents are made too, and removed again if the work fails.
        replace: take the place of an existing folder; otherwise an existing, non-empty one is an error.

    Yields:
        An empty temporary folder beside `path`, moved into place in one rename when the block ends.

    Raises:
        UserError: `path` exists and `replace` is false, or it cannot be made.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another output folder")
    if path.exists() and not replace and any(path.iterdir()):
        raise UserError(f"{path}: already exists; choose another output folder or pass --overwrite")
    made = _make_parents(path.absolute())
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        _remove_folders(made)
        raise UserError(f"{path}: cannot write here: {error.strerror}") from None
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            # rename() cannot replace a folder that is not empty: move the old one aside first.
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.absolute().parent))
            os.rename(path, old / "old")
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_folders(made)
        if isinstance(error, OSError) and error.filename is None:
            # A full disk is reported without a name; say which output it was.
            raise UserError(f"{path}: cannot write: {error.strerror}") from None
        raise


def _make_parents(path: Path) -> list[Path]:
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make the folder: {error.strerror}") from None
    return missing


def _remove_folders(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
