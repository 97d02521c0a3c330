"""The small files of a run in a bucket: written in a folder of this machine, and copied from there as they change."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tcc_jax.storage import copy_file, write_object

EVERY_SECONDS = 10.0


class Mirror:
    """Copies the files of a local folder into a bucket, each whole, as soon as `sync` finds them changed.

    Hidden files are left out. A file that is gone from the folder stays in the bucket.

    Args:
        local: the folder.
        remote: the folder of the bucket.
        names: files of the bucket to begin with, where they exist.
        first: nothing is copied before this file is there; None begins at once.
    """

    def __init__(self, local: Path, remote: Path, names: Iterable[str], first: str | None = None) -> None:
        self.local, self._remote, self._first = local, remote, first
        self._lock = threading.Lock()
        for name in names:
            # What a run that starts does not have yet.
            with contextlib.suppress(FileNotFoundError):
                copy_file(remote / name, local / name)
        self._copied = self._versions()

    def sync(self) -> None:
        """Copy what has changed.

        Raises:
            OSError: a file cannot be written; it is tried again the next time.
        """
        with self._lock:
            if self._first and not (self.local / self._first).exists():
                return
            for path, version in self._versions().items():
                if self._copied.get(path) != version:
                    write_object(self._remote / path.relative_to(self.local).as_posix(), path.read_bytes())
                    self._copied[path] = version

    def _versions(self) -> dict[Path, tuple[int, int]]:
        versions = {}
        for path in sorted(self.local.rglob("[!.]*")):
            # Taken before the content is read: what is written in between is copied the next time.
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    versions[path] = (path.stat().st_mtime_ns, path.stat().st_size)
        return versions


@contextlib.contextmanager
def mirrored(
    remote: Path,
    names: Iterable[str],
    first: str | None,
    warn: Callable[[str], None],
    every_seconds: float = EVERY_SECONDS,
) -> Iterator[Mirror]:
    """Keep a temporary local folder and a folder of a bucket alike; what cannot be copied is told and tried again.

    Args:
        remote: the folder of the bucket.
        names: files of the bucket to begin with, where they exist.
        first: nothing is copied before this file is there; None begins at once.
        warn: where failures are told, once until a copy succeeds.
        every_seconds: time between two looks at the folder; one object takes about one write a second.
    """
    with tempfile.TemporaryDirectory(prefix="tcc_jax-run-") as folder:
        mirror, done, failed = Mirror(Path(folder), remote, names, first), threading.Event(), False

        def attempt() -> None:
            nonlocal failed
            try:
                mirror.sync()
                failed = False
            except OSError as error:
                if not failed:
                    warn(f"warning: {error}; tried again until it can")
                failed = True

        def watch() -> None:
            while not done.wait(every_seconds):
                attempt()

        thread = threading.Thread(target=watch, name="mirror", daemon=True)
        thread.start()
        try:
            yield mirror
        finally:
            done.set()
            thread.join()
            attempt()
