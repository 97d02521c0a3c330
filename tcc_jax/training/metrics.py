"""What is written down while training: one JSON object a line, in RUN/metrics.jsonl."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class MetricsFile:
    """A file of JSON lines, each with its `step`; opening it drops the lines of steps that will be taken again.

    Args:
        path: the file; made if it is missing.
        step: the step the run starts or resumes from.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **values: Any) -> None:
        """Append one line; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Window:
    """Sums over the steps since the last line of metrics: the line's loss is their mean, and so are its rates."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._reset()

    def add(self, metrics: dict[str, Any]) -> None:
        """Add one step's metrics, as `train_step` gives them."""
        self.loss_sum += float(metrics["loss_sum"])
        self.scored += float(metrics["scored"])
        if self._began is None:
            # The first step of a process is mostly compilation: the clock of the rates starts behind it.
            self._began = time.monotonic()
            return
        self.tokens += int(metrics["tokens"])
        self.sets += int(metrics["sets"])

    def leave_out(self, seconds: float) -> None:
        """Take time spent on something else than training, just now, off the clock of the rates."""
        if self._began is not None:
            self._began += seconds

    def take(self) -> dict[str, float]:
        """Return `loss` (nats per scored position), `tokens_per_second` (useful), `sets_per_second`; start afresh."""
        now = time.monotonic()
        seconds = now - (self._began or now)
        rates = (self.tokens / seconds, self.sets / seconds) if self.tokens else (0.0, 0.0)
        values = {
            "loss": self.loss_sum / max(self.scored, 1),
            "tokens_per_second": round(rates[0], 1),
            "sets_per_second": round(rates[1], 2),
        }
        self._began = now
        self._reset()
        return values

    def _reset(self) -> None:
        self.loss_sum, self.scored, self.tokens, self.sets = 0.0, 0.0, 0, 0


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        # A line cut short by a kill: never kept.
        return float("inf")
