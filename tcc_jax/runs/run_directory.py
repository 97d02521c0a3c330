"""A run directory and the story it tells: who may write into it, how it was started, how it goes.

config.json       the configuration, as of the latest start
environment.json  every start: time, command, host, versions, devices, the step it went on from
train.log         what was said on standard error
metrics.jsonl     losses and rates (`tcc_jax.training.metrics`)
genes.tsv         what the ids mean
checkpoints/STEP  `tcc_jax.runs.checkpoint`; STEP.damaged was put aside by --resume last-good
skipped/          batches whose loss was not finite, when that stopped the run
status.json       state, step, time: replaced whole, for scripts that poll

In a bucket everything but the checkpoints is written in a folder of this machine, and copied from there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tcc_jax.config import Config
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.runs.checkpoint import VOCABULARY_FILE, latest_step, packages
from tcc_jax.runs.hosts import all_or_none
from tcc_jax.runs.locks import LOCK_FILE, OWNER_FILE, hold
from tcc_jax.storage import check_bucket, copy_file, is_remote, names_in, replace_text, write_object
from tcc_jax.terminal import UserError, log

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
LOG_FILE = "train.log"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
STATUS_VERSION = 1
_KEPT = (CONFIG_FILE, ENVIRONMENT_FILE, LOG_FILE, METRICS_FILE)
_LAST = ("finished", "stopped", "failed")
_BEFORE_THE_FIRST_STEP = {LOCK_FILE, OWNER_FILE, STATUS_FILE, LOG_FILE}
# What a process killed inside `atomic_file` or `check_shared` leaves behind.
_HALF_WRITTEN = re.compile(r"\.([a-z]+\.jsonl?|shared)\.\d+\.tmp")
# A network file system may show a new file some seconds late.
_SEEN_SECONDS = 10.0
_COPY_SECONDS = 10.0
_ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "SLURM_JOB_ID")


class RunDirectory:
    """A run directory held by this process; with several hosts only the first one writes.

    Args:
        path: the folder, which may lie in a bucket.
        steps: of the whole run, for status.json.
        is_held: whether the folder is still held, as `tcc_jax.runs.locks.hold` gives it.
        mirror: what keeps the small files of a run in a bucket.

    Attributes:
        path: the folder, where the checkpoints are.
        local: where all other files are written: the same folder, or the one that is copied into the bucket.
        is_held: as above.
    """

    def __init__(self, path: Path, steps: int, is_held: Callable[[], bool], mirror: Mirror | None) -> None:
        self.path, self.local, self.is_held = path, mirror.local if mirror else path, is_held
        self._mirror = mirror
        self._writes = jax.process_index() == 0
        self._status: dict[str, Any] = {"format_version": STATUS_VERSION, "state": "", "step": 0, "steps": steps}
        self.saved(latest_step(path) if self._writes else None)
        self._written = -math.inf

    def status(self, state: str, **values: Any) -> None:
        """Replace status.json; where only numbers change, at most once a second.

        Args:
            state: starting, compiling, training, evaluating, saving, and at the end finished, stopped or failed. A
                process that was killed leaves what it did last: `pid`, `host` and an old `time` tell.
            values: `step` (taken), `loss`, `message`. The file also has `checkpoint` (latest step saved, or null).
        """
        # Not the wall clock, which may be set back.
        now = time.monotonic()
        changed = state != self._status["state"] or "message" in values
        self._status |= {"state": state} | values
        if not self._writes or (not changed and now - self._written < 1) or not self.is_held():
            return
        self._written = now
        stamp = {"pid": os.getpid(), "host": socket.gethostname(), "time": _time()}
        # A full disk must not end a run for the sake of its status.
        with contextlib.suppress(OSError):
            replace_text(self.local / STATUS_FILE, json.dumps(self._status | stamp) + "\n", durable=False)
        if state in _LAST:
            # The process may end before the bucket is looked after again.
            with contextlib.suppress(OSError):
                self.sync()

    def saved(self, step: int | None) -> None:
        """Say in every status from now on that the latest checkpoint is of this step; None says that there is none."""
        self._status["checkpoint"] = step

    def log(self, message: str) -> None:
        """Print a line on standard error and add it to train.log."""
        log(message)
        self.note(message)

    def note(self, message: str) -> None:
        """Add a line to train.log alone."""
        if self._writes and self.is_held():
            with contextlib.suppress(OSError), open(self.local / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(f"{_time()} {message}\n")

    def check(self) -> None:
        """Check that the folder is still held.

        Raises:
            UserError: it was removed, renamed or replaced, perhaps by another run; nothing more is written into it.
        """
        if not self.is_held():
            raise UserError(f"{self.path}: removed, renamed or replaced while this run was writing into it")

    def sync(self) -> None:
        """Copy what has changed into the bucket of a run that lies in one.

        Raises:
            OSError: it cannot be written.
        """
        if self._mirror:
            self._mirror.sync()

    def describe(self, config: Config, vocabulary: Vocabulary, step: int) -> None:
        """Write config.json and genes.tsv, and add this start, which goes on from `step`, to environment.json."""
        if not self._writes:
            return
        replace_text(self.local / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
        vocabulary.write(self.local / VOCABULARY_FILE)
        path = self.local / ENVIRONMENT_FILE
        try:
            starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
        except (OSError, ValueError, KeyError, TypeError):
            starts = []
        starts.append(
            {
                "time": _time(),
                "step": step,
                "command": sys.argv,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "system": platform.platform(),
                "python": platform.python_version(),
                "packages": packages(),
                "devices": [device.device_kind for device in jax.devices()],
                "processes": jax.process_count(),
                "variables": {name: text for name, text in os.environ.items() if name.startswith(_ENVIRONMENT)},
            }
        )
        replace_text(path, json.dumps({"format_version": 1, "starts": starts}, indent=1) + "\n")


@contextlib.contextmanager
def open_run_directory(path: Path, steps: int) -> Iterator[RunDirectory]:
    """Make the run directory if it is not there, and hold it; a folder made here is removed if nothing came of it.

    Raises:
        UserError: a bucket that cannot be listed, a file, a folder that is no run, or a run another process works on.
    """
    check_bucket(path)
    if not path.is_dir() and (path.exists() or os.path.islink(path)):
        raise UserError(f"{path}: is a file or a broken link; choose another run.directory")
    is_run = (path / CONFIG_FILE).exists() or jax.process_index() > 0
    if not is_run and not all(_is_ours(name) for name in names_in(path)):
        raise UserError(f"{path}: not empty and not a run of tcc_jax; choose another run.directory")
    made = []
    if not is_remote(path):
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        is_held = stack.enter_context(hold(path, _overtaken)) if jax.process_index() == 0 else lambda: True
        # A start that fails before the configuration is written leaves nothing in the bucket.
        first = CONFIG_FILE if jax.process_index() == 0 else None
        mirror = stack.enter_context(Mirror(path, _KEPT, first, log)) if is_remote(path) else None
        directory = RunDirectory(path, steps, is_held, mirror)
        if jax.process_index() == 0:
            for name in names_in(directory.local):
                if _HALF_WRITTEN.fullmatch(name):
                    (directory.local / name).unlink(missing_ok=True)
        try:
            yield directory
        except BaseException as error:
            directory.status("failed", message=" ".join(str(error).split()) or type(error).__name__)
            if made and directory.is_held() and not (path / CONFIG_FILE).exists():
                _remove(path, made)
            raise


def check_shared(path: Path) -> None:
    """Check that a run directory is one folder for all processes: each looks for a file that the first one makes.

    Raises:
        UserError: some see another folder; all processes raise it, and it names them.
    """
    if jax.process_count() == 1 or is_remote(path):
        return

    def mark(number: int) -> Path:
        return path / f".shared.{number}.tmp"

    number = secrets.randbits(31)
    if jax.process_index() == 0:
        mark(number).touch()
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    end = time.monotonic() + _SEEN_SECONDS
    while not (seen := mark(number).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    others = all_or_none("" if seen else f"{socket.gethostname()} has another", lambda: "")
    if jax.process_index() == 0:
        mark(number).unlink(missing_ok=True)
    if others:
        raise UserError(f"{path}: must be one folder that all processes see; {others}")


class Mirror:
    """Copies the files of a temporary local folder into a bucket, each whole, as it finds them changed.

    To be used as a context, in which a thread looks every few seconds; what cannot be copied is told and tried again.
    Hidden files are left out. A file that is gone from the folder stays in the bucket.

    Args:
        remote: the folder of the bucket.
        names: files of the bucket to begin with, where they exist.
        first: nothing is copied before this file is there; None begins at once.
        warn: where failures are told, once until a copy succeeds.
        every_seconds: time between two looks at the folder; one object takes about one write a second.

    Attributes:
        local: the local folder.
    """

    def __init__(
        self,
        remote: Path,
        names: Iterable[str],
        first: str | None,
        warn: Callable[[str], None],
        every_seconds: float = _COPY_SECONDS,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tcc_jax-run-")
        self.local, self._remote, self._first = Path(self._folder.name), remote, first
        self._warn, self._every_seconds, self._failed = warn, every_seconds, False
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mirror", daemon=True)
        for name in names:
            # What a run that starts does not have yet.
            with contextlib.suppress(FileNotFoundError):
                copy_file(remote / name, self.local / name)
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

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._attempt()
        self._folder.cleanup()

    def _watch(self) -> None:
        while not self._done.wait(self._every_seconds):
            self._attempt()

    def _attempt(self) -> None:
        try:
            self.sync()
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._warn(f"warning: {error}; tried again until it can")
            self._failed = True

    def _versions(self) -> dict[Path, tuple[int, int]]:
        versions = {}
        for path in sorted(self.local.rglob("[!.]*")):
            # Taken before the content is read: what is written in between is copied the next time.
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    versions[path] = (path.stat().st_mtime_ns, path.stat().st_size)
        return versions


def _is_ours(name: str) -> bool:
    return name in _BEFORE_THE_FIRST_STEP or _HALF_WRITTEN.fullmatch(name) is not None


def _overtaken(reason: str) -> None:
    log(f"error: {reason}; ending at once, before the files of two runs mix")
    os._exit(1)


def _remove(path: Path, made: list[Path]) -> None:
    for name in _BEFORE_THE_FIRST_STEP:
        (path / name).unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _time() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
