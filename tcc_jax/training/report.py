"""What a run says as it goes: lines of metrics (RUN/metrics.jsonl, and TensorBoard's copy), status, spikes, skips."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcc_jax.config import Config
from tcc_jax.runs.run_directory import RunDirectory
from tcc_jax.storage import replace_text
from tcc_jax.terminal import Advance, UserError
from tcc_jax.training.metrics import SpikeDetector, Window, memory_bytes

_FLUSH_SECONDS = 5.0
# In place of a line cut short by a kill.
_NEVER_KEPT: dict[str, Any] = {"step": math.inf}


class Report:
    """Turns the metrics of steps and evaluations into lines.

    Args:
        config: the run.
        file: where lines of metrics go.
        board: where they also go, or None.
        directory: where the status and what is said go.
        advance: moves the progress on.
        utilization: (useful tokens per second, keys per token, scored positions per token) -> MFU.
        meta: the description of the checkpoint the run goes on from; empty at its start.

    Attributes:
        steps_per_epoch: for the `epoch` of a line.
        skipping: whether the update of the last step was skipped.
        evaluated: steps that have a line of their evaluation.
        recalls: step -> validation recall.
    """

    def __init__(
        self,
        config: Config,
        file: MetricsFile,
        board: Board | None,
        directory: RunDirectory,
        advance: Advance,
        utilization: Callable[[float, float | None, float], float | None],
        meta: dict[str, Any],
    ) -> None:
        self.steps_per_epoch = 1.0
        self.skipping = False
        self.evaluated, self.recalls = file.evaluated, file.recalls
        self._config, self._file, self._board, self._directory = config, file, board, directory
        self._advance, self._utilization = advance, utilization
        self._window, self._spikes = Window(meta.get("window")), SpikeDetector()
        self._began = time.monotonic() - meta.get("elapsed_seconds", 0.0)
        self._words = ""
        if (missing := meta.get("metrics_lines", 0) - file.num_lines) > 0:
            directory.log(f"warning: {directory.path}: {missing:,} lines of metrics are lost; nothing else is")

    def seconds(self) -> float:
        """Return the time spent in this run, resumes included."""
        return time.monotonic() - self._began

    def to_keep(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the metrics: how many lines, and the sums of one not full yet."""
        return {"window": self._window.sums(), "metrics_lines": self._file.num_lines}

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
            rate, per_token = line["tokens_per_second"], line["per_token"]
            used, peak = memory_bytes()
            self._write(
                step=step,
                loss=line["loss"],
                skipped_steps=line["skipped_steps"],
                learning_rate=float(values["learning_rate"]),
                # JSON has no word for it.
                gradient_norm=norm if math.isfinite(norm) else None,
                tokens_per_second=rate,
                sets_per_second=line["sets_per_second"],
                mfu=None if per_token is None else self._utilization(rate, None, per_token[1]),
                mfu_segments=None if per_token is None else self._utilization(rate, *per_token),
                data_wait=line["data_wait"],
                memory_bytes=used,
                memory_peak_bytes=peak,
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
        before = [recall for other, recall in self.recalls.items() if other < step]
        recall = self.recalls.get(step)
        return self._config.checkpoint.keep_best and recall is not None and recall > max(before, default=-1.0)

    def _write(self, **values: Any) -> None:
        self._file.write(**values)
        if self._board:
            self._board.write(**values)


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
        num_lines: lines in the file.
    """

    def __init__(
        self, path: Path, step: int, report: Callable[[str], None] = lambda message: None, *, writes: bool = True
    ) -> None:
        # A power cut may leave anything behind the last line that was put on the disk.
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = [line for line in map(_read, text.splitlines()) if line["step"] <= step]
        self.recalls: dict[int, float] = {}
        self.evaluated: set[int] = set()
        self.num_lines = 0
        for values in lines:
            self._remember(values)
        if writes:
            replace_text(path, "".join(json.dumps(values) + "\n" for values in lines))
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
        self.num_lines += 1
        if "validation_loss" in values:
            self.evaluated.add(values["step"])
        if values.get("validation_recall") is not None:
            self.recalls[values["step"]] = values["validation_recall"]


class Board:
    """A file of TensorBoard events, a new one at every start; a disk that is full ends it, not the run.

    Args:
        folder: where it goes; made if it is missing.
        step: the step the run starts or goes on from; TensorBoard drops what older files have of later steps.
        report: where a failure to write is told.
    """

    def __init__(self, folder: Path, step: int, report: Callable[[str], None]) -> None:
        # SummaryWriter hands events to a thread; when a write fails there, its queue fills up and the run would hang.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar, self._report = Event, scalar, report
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{step}")
        self._failed, self._flushed = False, 0.0
        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
        self._try(lambda: self._writer.write_event(start))

    def write(self, *, step: int, **values: float | None) -> None:
        """Add the numbers of a line of metrics."""
        scalars = [self._scalar(name, value).value[0] for name, value in values.items() if value is not None]
        event = self._event(step=step, wall_time=time.time())
        event.summary.value.extend(scalars)
        self._try(lambda: self._writer.write_event(event))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._try(self._writer.flush)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._try(self._writer.close)

    def _try(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except OSError as error:
            self._failed = True
            self._report(f"warning: TensorBoard's file cannot be written: {error.strerror}; metrics.jsonl goes on")


def require_tensorboard() -> None:
    """Raise `UserError` if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError('training.tensorboard = true: needs tensorboardX: pip install "tcc-jax[tensorboard]"') from None


def _read(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else _NEVER_KEPT
    except (ValueError, KeyError, TypeError):
        return _NEVER_KEPT
