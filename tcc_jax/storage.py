"""Paths of this machine and of a bucket (gs://BUCKET/FOLDER), used alike, and what has to differ between the two.

A bucket has objects and no folders: an object is written whole or not at all, is never appended to, and a listing goes
by how names begin. Paths in it are `etils.epath.Path`, as Orbax has them, which behave as `pathlib.Path` does.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from tcc_jax.terminal import UserError, undo_if_stopped

_CHUNK = 16 * 2**20


class File(NamedTuple):
    """A file as a listing shows it: its size, and the MD5 of its content (hexadecimal) where the store knows it."""

    bytes: int
    md5: str | None = None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path lies in a bucket."""
    return os.fspath(path).startswith("gs:/")


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path, of this machine or of a bucket, from its text; a path stays what it is.

    Raises:
        UserError: another kind of address, no bucket in it, or the packages for buckets are missing.
    """
    text = os.fspath(path)
    if not is_remote(text):
        if "://" in text:
            raise UserError(f"{text}: must be a path of this machine or gs://BUCKET/FOLDER")
        return Path(text)
    # pathlib makes one slash of two.
    text = re.sub("^gs:/+", "gs://", text)
    if text == "gs://":
        raise UserError(f"{text}: must be gs://BUCKET/FOLDER")
    _store()
    from etils import epath

    return cast(Path, epath.Path(text))


def absolute(path: Path) -> Path:
    """Return `path.absolute()`, which epath gets wrong in a bucket, where every path is absolute."""
    return path if is_remote(path) else path.absolute()


def check_bucket(path: Path) -> None:
    """Ask for what is at a path in a bucket; a path of this machine needs no such question.

    Raises:
        UserError: no such bucket, no permission to list it, or it cannot be reached.
    """
    if not is_remote(path):
        return
    bucket, _, prefix = _key(path).partition("/")
    try:
        _store().call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no bucket {bucket}; make it first, or mend the path") from None
    except Exception as error:
        raise UserError(
            f"{path}: the bucket cannot be listed: {_reason(error)}; check your permissions and credentials "
            "(gcloud auth application-default login)"
        ) from None


def names_in(folder: Path) -> list[str]:
    """Return the names of what is in a folder, in no order; none if there is no such folder."""
    if not is_remote(folder):
        return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    try:
        entries = [entry.rstrip("/") for entry in _store().ls(_key(folder), detail=False)]
    except FileNotFoundError:
        return []
    # The console makes folders by an object of their name.
    return [entry.rpartition("/")[2] for entry in entries if entry != _key(folder)]


def files_in(folder: Path) -> dict[str, File]:
    """Return the files in a folder and in the folders below it, by their name inside it, sorted."""
    if not is_remote(folder):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): File(path.stat().st_size) for path in paths}
    found = _store().find(_key(folder), detail=True)
    return {
        name.removeprefix(f"{_key(folder)}/"): File(about["size"], _hexadecimal(about.get("md5Hash")))
        for name, about in sorted(found.items())
        if not name.endswith("/")
    }


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it; one of this machine may still be written into for a moment.

    Raises:
        OSError: not all of it could be removed.
    """
    if is_remote(folder):
        _store().rm(_key(folder), recursive=True)
        return
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
    shutil.rmtree(folder)


def rename_folder(folder: Path, new: Path) -> None:
    """Rename a folder: at once on this machine, object by object in a bucket."""
    if is_remote(folder):
        _store().mv(f"{_key(folder)}/", f"{_key(new)}/", recursive=True)
    else:
        folder.rename(new)


def copy_file(source: Path, target: Path, advance: Callable[[int], object] = lambda count: None) -> None:
    """Copy a file from anywhere to this machine.

    Args:
        source: the file.
        target: the copy.
        advance: called with the bytes just copied.
    """
    with source.open("rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            advance(len(chunk))


def write_object(path: Path, content: bytes) -> None:
    """Write an object of a bucket; gcsfs tries again for half a minute where an error may pass.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    try:
        _store().pipe_file(_key(path), content)
    except Exception as error:
        raise OSError(f"{path}: cannot be written: {_reason(error)}") from error


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder in $TMPDIR that is gone after the block, or when a signal ends the command."""
    temporary = tempfile.TemporaryDirectory(prefix="tcc_jax-")
    with temporary as folder, undo_if_stopped(temporary.cleanup):
        yield Path(folder)


@contextlib.contextmanager
def atomic_file(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Write a file of this machine so that it appears whole or not at all.

    Args:
        path: the file; one that is there is replaced, a link's target instead of the link. A pipe or a device, which a
            rename would remove, is written to as it is.
        durable: put it on the disk before it takes the place of the old one, and its name before this returns.

    Yields:
        A path to write to: one beside it, moved into place in one rename when the block ends.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    # /dev/stdout and the like resolve to no path of theirs: these are asked for, and written, as they are named.
    in_place = path.exists() and not path.is_file()
    temporary = path if in_place else target.with_name(f".{target.name}.{os.getpid()}.tmp")

    def undo() -> None:
        if not in_place:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    try:
        with undo_if_stopped(undo):
            yield temporary
            if in_place:
                return
            if durable:
                put_on_disk(temporary)
            os.replace(temporary, target)
            if durable:
                put_on_disk(target.parent)
    except OSError as error:
        # A full disk is reported without a name; an error without a number has words of its own.
        if error.errno and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        undo()


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file as `atomic_file` does, or one object of a bucket.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    if is_remote(path):
        write_object(path, text.encode())
        return
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def put_on_disk(*paths: Path) -> None:
    """Wait until the content of files, and the names in folders, outlast a power cut; a bucket sees to that itself."""
    for path in paths:
        if not is_remote(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                # Some network file systems do not know what that is for a folder.
                if error.errno != errno.EINVAL:
                    raise
            finally:
                os.close(descriptor)


def read_small(path: Path) -> str:
    """Return the text of a small file that somebody may replace meanwhile: of a bucket, in one request."""
    return _store().cat_file(_key(path)).decode() if is_remote(path) else path.read_text(encoding="utf-8")


@contextlib.contextmanager
def on_this_machine(folder: Path, *names: str) -> Iterator[Path]:
    """Yield a folder that has these files of `folder`: itself, or a temporary copy of what is in a bucket.

    Raises:
        UserError: a file of a bucket is missing.
    """
    if not is_remote(folder):
        yield folder
        return
    with temporary_folder() as temporary:
        for name in names:
            try:
                copy_file(folder / name, temporary / name)
            except FileNotFoundError:
                raise UserError(f"{folder / name}: no such file") from None
        yield temporary


def _key(path: Path) -> str:
    return os.fspath(path).removeprefix("gs://")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _hexadecimal(md5: str | None) -> str | None:
    return base64.b64decode(md5).hex() if md5 else None


@functools.cache
def _store() -> Any:
    # The JSON API alone, which all but zonal buckets speak: gcsfs would else ask over gRPC what kind each bucket is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # TensorStore and other machines write too: a listing that is remembered is a wrong one.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # It logs every error it raises, with a traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        return fsspec.filesystem("gs")
    except ImportError:
        raise UserError('gs:// paths need another package: pip install "tcc-jax[gcs]"') from None
