"""RUN/tensorboard: the numbers of metrics.jsonl again, for TensorBoard; needs the extra `tensorboard`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tcc_jax.terminal import UserError

_FLUSH_SECONDS = 5.0


def require_tensorboard() -> None:
    """Raise `UserError` if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError('training.tensorboard = true: needs tensorboardX: pip install "tcc-jax[tensorboard]"') from None


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
