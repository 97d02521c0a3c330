"""What is measured while training: sums over the steps of a line, and losses that leap."""

from __future__ import annotations

import math
import time
from typing import Any


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
