"""Saves checkpoints in the background and keeps the right ones; a save that fails is reported and the run goes on.

RUN/checkpoints/STEP is whole once `checkpoint.json` is in it, which is written last and removed first: its description,
and a checksum of every file, the SHA-256, or in a bucket the MD5 that the store keeps of every object, so that nothing
has to be read back. A step's folder without it is a save that was cut off.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tcc_jax.files import sha256
from tcc_jax.runs.hosts import all_or_none
from tcc_jax.storage import File, absolute, files_in, names_in, put_on_disk, remove_folder, replace_text
from tcc_jax.terminal import UserError, log

FORMAT_VERSION = 2
FOLDER = "checkpoints"
STATE = "state"
RECORD = "checkpoint.json"
# Orbax logs what fails in its threads with a traceback of several pages; it is told here, in one line.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# Orbax opens a folder of a bucket only if it holds this.
_ORBAX_IS_DONE = "commit_success.txt"


class CheckpointWriter:
    """Saves checkpoints in the background; leaving the `with` block waits for the last one.

    One is written whole or not at all: Orbax writes the arrays, then `checkpoint.json` seals them. Old ones are removed
    only after a new one is sealed. With several hosts every one calls `save` and writes its part; the first one seals
    if no other has failed, and removes. Orbax's own checkpointers are not used, since their barriers would make the
    others wait for a host that failed.

    Args:
        run_directory: the run; saves that were cut off are removed from it.
        keep: checkpoints kept, newest first.
        keep_every: checkpoints of multiples of this step are kept for ever; 0 keeps none of them.
        recalls: step -> validation recall; the best of the steps that have a checkpoint is kept. Read at every save.
        check: called before anything is sealed or removed, in the background; if it raises, that is left undone.
        before_seal: called before a checkpoint is sealed, in the background; if it raises, the save has failed.
        saved: called with the step of every checkpoint that is sealed, in the background, on all hosts.
        note: where finished saves are told.
        warn: where failures are told.

    Attributes:
        saved_step: the newest step sealed by this writer, or None.
        failure: why the newest save failed, or None if it did not; the same on all hosts.
        pause_seconds: how long the newest `save` held its caller up.
    """

    def __init__(
        self,
        run_directory: Path,
        keep: int,
        *,
        keep_every: int = 0,
        recalls: Mapping[int, float] | None = None,
        check: Callable[[], None] = lambda: None,
        before_seal: Callable[[], None] = lambda: None,
        saved: Callable[[int], None] = lambda step: None,
        note: Callable[[str], None] = lambda message: None,
        warn: Callable[[str], None] = log,
    ) -> None:
        self._run_directory, self._folder = run_directory, run_directory / FOLDER
        self._keep, self._keep_every, self._recalls = keep, keep_every, {} if recalls is None else recalls
        self._check, self._before_seal, self._saved, self._note, self._warn = check, before_seal, saved, note, warn
        self._arrays = ocp.StandardCheckpointHandler()
        self._background: threading.Thread | None = None
        self.saved_step: int | None = None
        self.failure: str | None = None
        self.pause_seconds = 0.0
        if jax.process_index() == 0:
            self._tidy(one_more=False)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begin to save; the arrays are safe to overwrite when this returns. Waits for a save still under way.

        Args:
            step: the step the state belongs to.
            state: tree of arrays.
            meta: the description, JSON values (`tcc_jax.runs.checkpoint.describe`).
        """
        began, copied = time.monotonic(), threading.Event()
        self.wait()
        self._background = threading.Thread(target=self._work, args=(step, state, meta, began, copied), name="save")
        self._background.start()
        copied.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any; `saved_step` and `failure` then tell how it went."""
        if self._background:
            self._background.join()
            self._background = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._arrays.close()

    def _work(self, step: int, state: Any, meta: dict[str, Any], began: float, copied: threading.Event) -> None:
        folder = self._folder / str(step)
        failure = _attempt(lambda: self._write(folder / STATE, state, began, copied))
        copied.set()
        failure = all_or_none(failure, lambda: _attempt(lambda: self._seal(folder, meta)))
        if failure:
            self.failure = f"step {step:,} could not be saved: {failure}"
            self._warn(f"warning: {self.failure}; checkpoints saved before are whole, the run goes on")
        else:
            self.failure, self.saved_step = None, step
            self._saved(step)
            seconds = time.monotonic() - began
            self._note(f"step {step:,} is saved ({seconds:.2f} s, {self.pause_seconds:.2f} s of pause)")
        if jax.process_index() == 0 and (problem := _attempt(lambda: self._tidy(one_more=not failure))):
            self._warn(f"warning: {self._folder}: old checkpoints could not be removed: {problem}")

    def _write(self, folder: Path, state: Any, began: float, copied: threading.Event) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Has copied the arrays when it returns; threads of its own write them.
        writes = asyncio.run(self._arrays.async_save(epath.Path(absolute(folder)), args=ocp.args.StandardSave(state)))
        self.pause_seconds = time.monotonic() - began
        copied.set()
        for write in writes or []:
            write.result()

    def _seal(self, folder: Path, meta: dict[str, Any]) -> None:
        self._check()
        self._arrays.finalize(epath.Path(absolute(folder / STATE)))
        (folder / STATE / _ORBAX_IS_DONE).write_text("")
        self._before_seal()
        seal(folder, meta)

    def _tidy(self, *, one_more: bool) -> None:
        self._check()
        steps = whole_steps(self._run_directory)
        if one_more:
            for step in set(steps) - steps_to_keep(steps, self._keep, self._keep_every, self._recalls):
                # What a kill leaves behind is then a save that was cut off.
                (self._folder / str(step) / RECORD).unlink(missing_ok=True)
                steps.remove(step)
        for name in names_in(self._folder):
            if name.isdigit() and int(name) not in steps and (self._folder / name).is_dir():
                remove_folder(self._folder / name)


def steps_to_keep(steps: Iterable[int], keep: int, keep_every: int, recalls: Mapping[int, float]) -> set[int]:
    """Return which checkpoints stay: the newest `keep`, multiples of `keep_every`, and the one with the best recall.

    Args:
        steps: steps that have a checkpoint.
        keep: how many of the newest.
        keep_every: 0 keeps no multiples.
        recalls: step -> validation recall; of equal ones the earlier step is the best.
    """
    steps = sorted(steps)
    # A copy, since the training thread adds to it.
    best = best_step({step: recall for step, recall in dict(recalls).items() if step in steps})
    return set(steps[-keep:]) | {step for step in steps if step == best or (keep_every and step % keep_every == 0)}


def best_step(recalls: Mapping[int, float]) -> int | None:
    """Return the step with the best recall, of equal ones the earliest; None without any."""
    return min(recalls, key=lambda step: (-recalls[step], step), default=None)


def step_folder(run_directory: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_directory / FOLDER / str(step)


def whole_steps(run_directory: Path) -> list[int]:
    """Return the steps of a run that have a complete checkpoint, ascending. A save that was cut off does not count."""
    folder = run_directory / FOLDER
    return sorted(int(name) for name in names_in(folder) if name.isdigit() and RECORD in names_in(folder / name))


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Write the record of a checkpoint, whose other files are all there and then on the disk, in one piece.

    Args:
        folder: the checkpoint.
        meta: its description, JSON values.
    """
    files = {
        name: {"bytes": file.bytes} | ({"md5": file.md5} if file.md5 else {"sha256": sha256(folder / name)})
        for name, file in files_in(folder).items()
    }
    folders = {parent for name in files for parent in Path(name).parents}
    put_on_disk(*map(folder.joinpath, [*files, *map(str, folders)]), folder.parent)
    record = meta | {"files": files}
    record["record_sha256"] = _hash_of(record)
    replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the description of a checkpoint, with `files`.

    Raises:
        UserError: its save was cut off, it is damaged, or of a format this version does not read.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version = record["format_version"]
    except FileNotFoundError:
        raise UserError(f"{folder}: the checkpoint is damaged or was never finished: {RECORD} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: the checkpoint is damaged: {RECORD} is not a description of one") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: checkpoint format {version}, this tcc_jax reads {FORMAT_VERSION}; "
            "open it with the version that wrote it (packages.tcc-jax in its description)"
        )
    if record.get("record_sha256") != _hash_of(record):
        raise UserError(f"{folder}: the checkpoint is damaged: {RECORD} is not as it was written")
    return record


def verify(folder: Path, record: dict[str, Any]) -> None:
    """Check that every file of a checkpoint is as it was written.

    Raises:
        UserError: a file is missing, cut short or changed; the message names it.
    """
    found = files_in(folder)
    for name, expected in record["files"].items():
        damage = ""
        if name not in found:
            damage = "is missing"
        elif found[name].bytes != expected["bytes"]:
            damage = f"has {found[name].bytes:,} bytes, {expected['bytes']:,} were written"
        # A checkpoint may have been copied into a bucket or out of it.
        elif "md5" in expected and _md5(folder / name, found[name]) != expected["md5"]:
            damage = "is not as it was written (MD5 differs)"
        elif "sha256" in expected and sha256(folder / name) != expected["sha256"]:
            damage = "is not as it was written (SHA-256 differs)"
        if damage:
            raise UserError(f"{folder}: the checkpoint is damaged: {name} {damage}")


def _attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        # Orbax and TensorStore wrap the system's words in several long lines: the end of the first has the reason.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return reason if len(reason) <= 200 else f"{reason[:60]} ... {reason[-140:]}"
    return ""


def _md5(path: Path, file: File) -> str:
    if file.md5:
        return file.md5
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _hash_of(record: dict[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
