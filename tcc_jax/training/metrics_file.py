"""RUN/metrics.jsonl: what is written down while training, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class MetricsFile:
    """A file of JSON lines, each with its `step`; opening it drops the lines of steps that will be taken again.

    Lines that cannot be written (a full disk) wait in memory for the next `write` or `sync`, so the file has no gap.

    Args:
        path: the file; made if it is missing.
        step: the step the run starts or resumes from.
        report: where a failure to write is told, once.
        writes: with several hosts only one writes; the others remember what they would have written.

    Attributes:
        recalls: step -> validation recall, of the lines in the file.
        evaluated: steps that have a validation loss in the file.
    """

    def __init__(
        self, path: Path, step: int, report: Callable[[str], None] = lambda message: None, *, writes: bool = True
    ) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _read(line).get("step", math.inf) <= step]
        self.recalls: dict[int, float] = {}
        self.evaluated: set[int] = set()
        for values in map(_read, kept):
            self._remember(values)
        if writes:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = os.open(path if writes else os.devnull, os.O_WRONLY | os.O_APPEND)
        self._unwritten, self._lock = b"", threading.Lock()
        self._report, self._reported, self._writes = report, False, writes

    def write(self, **values: Any) -> None:
        """Append one line; the operating system has it when this returns, unless the disk is full."""
        self._remember(values)
        with self._lock:
            self._unwritten += json.dumps(values).encode() + b"\n"
            try:
                self._flush()
                self._reported = False
            except OSError as error:
                if not self._reported:
                    self._report(f"warning: metrics cannot be written: {error.strerror}; they are kept in memory")
                self._reported = True

    def sync(self) -> None:
        """Put all lines on the disk, so that a checkpoint never is ahead of its metrics.

        Raises:
            OSError: they cannot be written.
        """
        with self._lock:
            self._flush()
            if self._writes:
                os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def _remember(self, values: dict[str, Any]) -> None:
        if "validation_loss" in values:
            self.evaluated.add(values["step"])
        if values.get("validation_recall") is not None:
            self.recalls[values["step"]] = values["validation_recall"]


def _read(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return values if isinstance(values, dict) else {}
    except ValueError:
        # A line cut short by a kill: never kept.
        return {}
