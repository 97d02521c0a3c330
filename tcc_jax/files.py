"""Files: atomic output folders, checksums, compressed text, and where the embedded data is."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tcc_jax.storage import as_path, is_remote
from tcc_jax.terminal import UserError, undo_if_stopped


def embedded(name: str) -> Path:
    """Return the path of an embedded data file: inside the installed package, or data/ of the repository."""
    package = Path(__file__).resolve().parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{name}: the embedded data file is missing; reinstall tcc-jax")


def cache_folder() -> Path:
    """Return where copies and fits that can be made again are kept: $XDG_CACHE_HOME/tcc_jax, or ~/.cache/tcc_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcc_jax"


def keep_compilations() -> None:
    """Have JAX, which is not imported yet, keep what it compiles for the next time; what the environment says wins."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compilations"))
    # The programs of a completion compile in less than the second that JAX would ask for.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def open_binary(path: str | Path) -> IO[bytes]:
    """Open a plain, .gz or .xz file (by its ending) for reading bytes."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path, "rb")
    return open(path, "rb")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, of this machine or of a bucket, as 64 hexadecimal digits."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, marker: str = "", replace: bool = False) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    Args:
        path: the folder to make. Parents are made too, and removed again if the work fails.
        marker: the file that every folder of this kind holds, and those of no other kind.
        replace: take the place of an existing folder, if it holds the marker; otherwise an existing, non-empty one is
            an error.

    Yields:
        An empty temporary folder beside `path`, moved into place in one rename when the block ends.

    Raises:
        UserError: `path` exists and may not be replaced, or it cannot be made.
    """
    if is_remote(path):
        raise UserError(f"{path}: must be a folder of this machine; copy it to the bucket from there")
    # Through links, so that the folder they point to is what appears or is replaced.
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another output folder")
    if path.exists() and any(path.iterdir()):
        if not replace:
            raise UserError(f"{path}: already exists; choose another output folder or pass --overwrite")
        # Replacing is for earlier results of the same kind, never for somebody's data.
        if not (path / marker).is_file():
            raise UserError(f"{path}: holds no {marker}, so not overwritten; choose another output folder")
    # Both known before anything is made, so that a signal at any moment finds all there is to remove.
    missing = [parent for parent in path.parents if not parent.exists()]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")

    def undo() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()

    try:
        with undo_if_stopped(undo):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
            except OSError as error:
                raise UserError(f"{path}: cannot write here: {error.strerror}") from None
            yield temporary
            _move_into_place(temporary, path)
    except BaseException as error:
        undo()
        if isinstance(error, OSError) and error.filename is None:
            # A full disk is reported without a name; say which output it was.
            raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
        raise


def check_input_file(path: str | Path, flag: str = "") -> None:
    """Raise `UserError` where there is no file to read: before the work, not after it."""
    if not Path(path).exists():
        raise UserError(f"{flag} {path}: no such file".strip())
    if Path(path).is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file".strip())


def check_output_file(path: str | Path) -> None:
    """Raise `UserError` where no file can come to be: before the work, not after it."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: no such folder; make it first")


def _move_into_place(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    # rename() cannot replace a folder that is not empty: the old one steps aside, and back if anything goes wrong.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))

    def undo() -> None:
        if not path.exists():
            os.rename(aside / path.name, path)
        shutil.rmtree(aside)

    with undo_if_stopped(undo):
        try:
            os.rename(path, aside / path.name)
            os.rename(new, path)
        except BaseException:
            undo()
            raise
        shutil.rmtree(aside)
