"""What is written down while training: one JSON object a line, in RUN/metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import threading
import time
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


class Window:
    """Sums over the steps since the last line of metrics: the line's loss is their mean, and so are its rates.

    Args:
        sums: what `sums` gave at the checkpoint the run goes on from, so that the next line is that of a run that was
            never stopped.
    """

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self._began: float | None = None
        self._reset()
        if sums:
            self.loss_sum, self.scored, self.skipped = sums["loss_sum"], sums["scored"], int(sums["skipped"])

    def add(self, metrics: dict[str, Any]) -> None:
        """Add one step's metrics, as `train_step` gives them; the loss of a skipped update does not count."""
        if metrics["skipped"]:
            self.skipped += 1
        else:
            self.loss_sum += float(metrics["loss_sum"])
            self.scored += float(metrics["scored"])
        if self._began is None:
            # The first step of a process is mostly compilation: the clock of the rates starts behind it.
            self._began = time.monotonic()
            return
        self.tokens += int(metrics["tokens"])
        self.sets += int(metrics["sets"])

    def sums(self) -> dict[str, float]:
        """Return what a checkpoint must hold of a line that is not full yet; floats survive JSON to the bit."""
        return {"loss_sum": self.loss_sum, "scored": self.scored, "skipped": self.skipped}

    def leave_out(self, seconds: float) -> None:
        """Take time spent on something else than training, just now, off the clock of the rates."""
        if self._began is not None:
            self._began += seconds

    def take(self) -> dict[str, Any]:
        """Return the values of a line and start afresh.

        Returns:
            `loss` (nats per scored position; None if every update was skipped), `skipped_steps`, `tokens_per_second`
            (useful), `sets_per_second`.
        """
        now = time.monotonic()
        seconds = now - (self._began or now)
        rates = (self.tokens / seconds, self.sets / seconds) if self.tokens and seconds > 0 else (0.0, 0.0)
        values = {
            "loss": self.loss_sum / self.scored if self.scored else None,
            "skipped_steps": self.skipped,
            "tokens_per_second": round(rates[0], 1),
            "sets_per_second": round(rates[1], 2),
        }
        self._began = now
        self._reset()
        return values

    def _reset(self) -> None:
        self.loss_sum, self.scored, self.skipped, self.tokens, self.sets = 0.0, 0.0, 0, 0, 0


class SpikeDetector:
    """Tells a loss that leaps out of its recent range: over the running mean by six standard deviations.

    Mean and variance are exponential with a memory of 100 steps; the first 20 steps of a process are only learned from.
    """

    _MEMORY, _WARM_UP, _DEVIATIONS = 100, 20, 6.0

    def __init__(self) -> None:
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def look(self, loss: float) -> float | None:
        """Return the running mean if `loss` (finite) is a spike, else None; then learn from it."""
        self._count += 1
        leap = loss - self._mean
        # The floor keeps a loss that hardly moves from being called a spike for a last digit.
        limit = self._DEVIATIONS * math.sqrt(self._variance) + 0.01 * abs(self._mean)
        spike = self._mean if self._count > self._WARM_UP and leap > limit else None
        weight = max(1 / self._count, 1 / self._MEMORY)
        self._mean += weight * leap
        self._variance = (1 - weight) * (self._variance + weight * leap * leap)
        return spike


def _read(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return values if isinstance(values, dict) else {}
    except ValueError:
        # A line cut short by a kill: never kept.
        return {}
