"""What makes a checkpoint whole: `checkpoint.json`, written last, with its description and a checksum of every file.

A step's folder without it is a save that was cut off. It is removed first when a checkpoint is deleted. The checksum is
the SHA-256, or in a bucket the MD5 that the store keeps of every object, so that nothing has to be read back.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tcc_jax.files import sha256
from tcc_jax.storage import File, files_in, is_remote, names_in, write_object
from tcc_jax.terminal import UserError

FORMAT_VERSION = 2
FOLDER = "checkpoints"
STATE = "state"
RECORD = "checkpoint.json"

# Format 1 had no checksums; its weights can still be used.
_RECORD_1 = Path("meta", "metadata")


def step_folder(run_directory: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_directory / FOLDER / str(step)


def whole_steps(run_directory: Path) -> list[int]:
    """Return the steps of a run that have a complete checkpoint, ascending. A save that was cut off does not count."""
    folder = run_directory / FOLDER
    return sorted(int(name) for name in names_in(folder) if name.isdigit() and is_whole(folder / name))


def latest_step(run_directory: Path) -> int | None:
    """Return the newest complete checkpoint of a run, or None."""
    return max(whole_steps(run_directory), default=None)


def is_whole(folder: Path) -> bool:
    """Return whether the save of a checkpoint came to its end; `verify` tells whether it is still as it was written."""
    # One question to the store: the training loop waits for it before a save.
    names = names_in(folder)
    return RECORD in names or (_RECORD_1.parts[0] in names and (folder / _RECORD_1).is_file())


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Write the record of a checkpoint, whose other files are all there, in one piece.

    Args:
        folder: the checkpoint.
        meta: its description, JSON values.
    """
    files = {
        name: {"bytes": file.bytes} | ({"md5": file.md5} if file.md5 else {"sha256": sha256(folder / name)})
        for name, file in files_in(folder).items()
    }
    record = meta | {"files": files}
    record["record_sha256"] = _hash_of(record)
    replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the description of a checkpoint, with `files`.

    Raises:
        UserError: its save was cut off, it is damaged, or of a format this version does not read.
    """
    if not is_whole(folder):
        raise UserError(f"{folder}: the checkpoint is damaged or was never finished: {RECORD} is missing")
    path = folder / RECORD if (folder / RECORD).is_file() else folder / _RECORD_1
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: the checkpoint is damaged: {path.name} is not a description of one") from None
    if version not in (1, FORMAT_VERSION):
        raise UserError(
            f"{folder}: checkpoint format {version}, this tcc_jax reads {FORMAT_VERSION}; "
            "open it with the version that wrote it (packages.tcc-jax in its description)"
        )
    if version == FORMAT_VERSION and record.get("record_sha256") != _hash_of(record):
        raise UserError(f"{folder}: the checkpoint is damaged: {path.name} is not as it was written")
    return record


def verify(folder: Path, record: dict[str, Any]) -> None:
    """Check that every file of a checkpoint is as it was written. A checkpoint of format 1 has nothing to check.

    Raises:
        UserError: a file is missing, cut short or changed; the message names it.
    """
    found = files_in(folder)
    for name, expected in record.get("files", {}).items():
        if name not in found:
            raise UserError(f"{folder}: the checkpoint is damaged: {name} is missing")
        size = found[name].bytes
        if size != expected["bytes"]:
            raise UserError(
                f"{folder}: the checkpoint is damaged: {name} has {size:,} bytes, {expected['bytes']:,} were written"
            )
        # A checkpoint may have been copied into a bucket or out of it.
        if "md5" in expected:
            kind, same = "MD5", _md5(folder / name, found[name]) == expected["md5"]
        else:
            kind, same = "SHA-256", sha256(folder / name) == expected["sha256"]
        if not same:
            raise UserError(f"{folder}: the checkpoint is damaged: {name} is not as it was written ({kind} differs)")


def replace_text(path: Path, text: str) -> None:
    """Write a file in one rename, on the disk before it takes the place of the old one; or one object of a bucket."""
    if is_remote(path):
        write_object(path, text.encode())
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _md5(path: Path, file: File) -> str:
    if file.md5:
        return file.md5
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _hash_of(record: dict[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
