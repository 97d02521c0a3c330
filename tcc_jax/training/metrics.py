"""What is measured while training: sums over the steps of a line, what the devices do, losses that leap, profiles."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from tcc_jax.config import Config
from tcc_jax.training.flops import flops_per_token, peak_flops


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
        self.keys += float(metrics["keys"])
        self.positions += float(metrics["scored"])

    def waited(self, seconds: float) -> None:
        """Count time the loop has just spent waiting for the loader."""
        if self._began is not None:
            self.wait_seconds += seconds

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
            (useful), `sets_per_second`, `per_token` (keys that a useful token attends to, and positions scored for it;
            None if not measured) and `data_wait` (share of the time).
        """
        now = time.monotonic()
        seconds = now - (self._began or now)
        rates = (self.tokens / seconds, self.sets / seconds) if self.tokens and seconds > 0 else (0.0, 0.0)
        values = {
            "loss": self.loss_sum / self.scored if self.scored else None,
            "skipped_steps": self.skipped,
            "tokens_per_second": round(rates[0], 1),
            "sets_per_second": round(rates[1], 2),
            "per_token": (self.keys / self.tokens, self.positions / self.tokens) if self.tokens else None,
            "data_wait": round(self.wait_seconds / seconds, 4) if seconds > 0 else 0.0,
        }
        self._began = now
        self._reset()
        return values

    def _reset(self) -> None:
        self.loss_sum, self.scored, self.skipped, self.tokens, self.sets = 0.0, 0.0, 0, 0, 0
        self.keys, self.positions, self.wait_seconds = 0.0, 0.0, 0.0


def model_flops_utilization(
    config: Config,
    vocabulary_size: int,
    devices: Sequence[jax.Device],
    tokens_per_second: float,
    keys_per_token: float | None = None,
    scored_per_token: float | None = None,
) -> float | None:
    """Return the share of the devices' peak that useful arithmetic takes (MFU), or None without a recorded peak.

    Useful tokens per second x FLOPs per token / (devices x peak in bfloat16); the FLOPs of a token, with their formula,
    are those of `tcc_jax.training.flops.flops_per_token`, the peaks are in its table `PEAK_FLOPS`. A line of metrics
    has it twice: `mfu` counts T / 2 keys for a token, as is the custom for text; `mfu_segments` counts the keys that a
    token has in its own segment, which is what was asked for.

    Args:
        config: the run.
        vocabulary_size: V, before padding.
        devices: those of the mesh, all of one kind.
        tokens_per_second: useful ones, over all devices.
        keys_per_token: None for T / 2.
        scored_per_token: None for all places of a row; only cut points need it.
    """
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    flops = tokens_per_second * flops_per_token(config, vocabulary_size, keys_per_token, scored_per_token)
    return round(flops / (peak * len(devices)), 5)


def memory_bytes() -> tuple[int, int]:
    """Return the memory in use on the fullest device of this host, and the most that any has held so far.

    On a CPU both are of this process.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(entry["bytes_in_use"] for entry in stats), max(entry["peak_bytes_in_use"] for entry in stats)
    # Linux counts in units of 1,024 bytes, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else peak, peak


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


class Profile:
    """A window of whole steps recorded by JAX's profiler, for TensorBoard; leaving the `with` block ends it at last.

    Args:
        window: the steps; a run that goes on from behind it records nothing, one from inside it the rest.
        folder: where the profile goes; made if it is missing.
        report: told where the profile is, or why there is none.
    """

    def __init__(self, window: range, folder: Path, report: Callable[[str], None]) -> None:
        self._window, self._folder, self._report = window, folder, report
        self._steps: list[int] = []

    def before(self, step: int, state: Any) -> None:
        """Begin to record if the window begins with this step, once the devices are through with `state`, its input."""
        if step in self._window:
            if not self._steps:
                jax.block_until_ready(state)
                jax.profiler.start_trace(self._folder)
            self._steps.append(step)

    def after(self, step: int, state: Any) -> None:
        """End the recording if the window ends with this step, once the devices are through with `state`."""
        if self._steps and step == self._window[-1]:
            jax.block_until_ready(state)
            self._end()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._steps:
            self._end()

    def _end(self) -> None:
        steps, self._steps = f"{self._steps[0]} to {self._steps[-1]}", []
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._report(f"warning: the profile could not be written: {' '.join(str(error).split())[:200]}")
        else:
            self._report(
                f"profile of steps {steps} in {self._folder}: pip install tensorboard xprof; "
                f"tensorboard --logdir {self._folder}"
            )
