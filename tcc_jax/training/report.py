"""What a run says as it goes: lines of metrics, the status, progress, spikes and skipped updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from tcc_jax.config import Config
from tcc_jax.terminal import Advance
from tcc_jax.training.metrics import SpikeDetector, Window, memory_bytes
from tcc_jax.training.metrics_file import MetricsFile
from tcc_jax.training.run_directory import RunDirectory
from tcc_jax.training.tensorboard import Board


class Report:
    """Turns the metrics of steps and evaluations into lines.

    Args:
        config: the run.
        file: where lines of metrics go.
        board: where they also go, or None.
        directory: where the status and what is said go.
        advance: moves the progress on.
        utilization: (useful tokens per second, keys per token) -> MFU.
        meta: the description of the checkpoint the run goes on from; empty at its start.

    Attributes:
        steps_per_epoch: for the `epoch` of a line.
        skipping: whether the update of the last step was skipped.
        evaluated: steps that have a line of their evaluation.
    """

    def __init__(
        self,
        config: Config,
        file: MetricsFile,
        board: Board | None,
        directory: RunDirectory,
        advance: Advance,
        utilization: Callable[[float, float | None], float | None],
        meta: dict[str, Any],
    ) -> None:
        self.steps_per_epoch = 1.0
        self.skipping = False
        self.evaluated = file.evaluated
        self._config, self._file, self._board, self._directory = config, file, board, directory
        self._advance, self._utilization = advance, utilization
        self._window, self._spikes = Window(meta.get("window")), SpikeDetector()
        self._began = time.monotonic() - meta.get("elapsed_seconds", 0.0)
        self._words = ""

    def seconds(self) -> float:
        """Return the time spent in this run, resumes included."""
        return time.monotonic() - self._began

    def window_sums(self) -> dict[str, float]:
        """Return the sums of the line that is not full yet."""
        return self._window.sums()

    def waited(self, seconds: float) -> None:
        """Count time the loop has just spent waiting for the loader."""
        self._window.waited(seconds)

    def step(self, step: int, values: dict[str, Any]) -> int:
        """Report a step, in order; return how many updates in a row, this one included, were skipped.

        Args:
            step: its number, from 1.
            values: what `train_step` measured, on the host.
        """
        skips = int(values["skipped_in_a_row"])
        self.skipping = skips > 0
        if self.skipping:
            self._directory.log(
                f"step {step:,}: update skipped: loss {values['loss_sum']}, gradient norm {values['gradient_norm']}"
            )
        else:
            loss = float(values["loss_sum"]) / max(float(values["scored"]), 1)
            if (mean := self._spikes.look(loss)) is not None:
                self._directory.log(f"step {step:,}: the loss leaps to {loss:.3f} from a running mean of {mean:.3f}")
        self._window.add(values)
        status: dict[str, Any] = {"step": step}
        if step % self._config.training.log_every == 0 or step == self._config.training.steps:
            line = self._window.take()
            self._words = f"loss {line['loss'] or math.nan:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
            norm = float(values["gradient_norm"])
            rate, keys = line["tokens_per_second"], line["keys_per_token"]
            self._write(
                step=step,
                loss=line["loss"],
                skipped_steps=line["skipped_steps"],
                learning_rate=float(values["learning_rate"]),
                # JSON has no word for it.
                gradient_norm=norm if math.isfinite(norm) else None,
                tokens_per_second=rate,
                sets_per_second=line["sets_per_second"],
                mfu=self._utilization(rate, None),
                mfu_segments=None if keys is None else self._utilization(rate, keys),
                data_wait=line["data_wait"],
                memory_bytes=memory_bytes(),
                seconds=round(self.seconds(), 3),
                epoch=round(step / self.steps_per_epoch, 4),
            )
            status["loss"] = line["loss"]
        self._directory.status("training", **status)
        self._advance(1, self._words)
        return skips

    def validation(self, step: int, validate: Callable[[], dict[str, float]]) -> None:
        """Evaluate, and report `validation_loss` and `validation_recall` where there are any."""
        began = time.monotonic()
        values = validate()
        self._window.leave_out(time.monotonic() - began)
        if values:
            self._write(step=step, **values)
            words = {"validation_loss": "validation loss {:.4f} nats per scored position"}
            words["validation_recall"] = "validation recall {:.4f}"
            said = ", ".join(words[name].format(value) for name, value in values.items())
            self._directory.log(f"step {step:,}: {said}")

    def is_best(self, step: int) -> bool:
        """Return whether the step has the best validation recall so far, and that matters."""
        recalls = self._file.recalls
        before = [recall for other, recall in recalls.items() if other < step]
        return self._config.checkpoint.keep_best and step in recalls and recalls[step] > max(before, default=-1.0)

    def _write(self, **values: Any) -> None:
        self._file.write(**values)
        if self._board:
            self._board.write(**values)
