"""Saves checkpoints in the background and keeps the right ones; a save that fails is reported and the run goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tcc_jax.storage import absolute, names_in, remove_folder
from tcc_jax.terminal import log
from tcc_jax.training.records import FOLDER, RECORD, STATE, is_whole, seal, whole_steps


class CheckpointWriter:
    """Saves checkpoints in the background; leaving the `with` block waits for the last one.

    One is written whole or not at all: Orbax writes the arrays, then `checkpoint.json` seals them. Old ones are removed
    only after a new one is sealed. With several hosts every one calls `save`, and the first one seals and removes.

    Args:
        run_directory: the run; saves that were cut off are removed from it.
        keep: checkpoints kept, newest first.
        keep_every: checkpoints of multiples of this step are kept for ever; 0 keeps none of them.
        recalls: step -> validation recall; the best of the steps that have a checkpoint is kept. Read at every save.
        before_seal: called before a checkpoint is sealed, in the background; if it raises, the save has failed.
        note: where finished saves are told.
        warn: where failures are told.

    Attributes:
        saved_step: the newest step sealed by this writer, or None.
        failure: why the newest save failed, or None if it did not.
        pause_seconds: how long the newest `save` held its caller up.
    """

    def __init__(
        self,
        run_directory: Path,
        keep: int,
        *,
        keep_every: int = 0,
        recalls: Mapping[int, float] | None = None,
        before_seal: Callable[[], None] = lambda: None,
        note: Callable[[str], None] = lambda message: None,
        warn: Callable[[str], None] = log,
    ) -> None:
        self._run_directory, self._folder = run_directory, run_directory / FOLDER
        self._keep, self._keep_every, self._recalls = keep, keep_every, {} if recalls is None else recalls
        self._before_seal, self._note, self._warn = before_seal, note, warn
        self._saver = ocp.StandardCheckpointer()
        self._background: threading.Thread | None = None
        self.saved_step: int | None = None
        self.failure: str | None = None
        self.pause_seconds = 0.0
        if jax.process_index() == 0:
            for name in names_in(self._folder):
                if name.isdigit() and not is_whole(self._folder / name):
                    remove_folder(self._folder / name, ignore_errors=True)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begin to save; the arrays are safe to overwrite when this returns. Waits for a save still under way.

        Args:
            step: the step the state belongs to; nothing is done if it is saved already.
            state: tree of arrays.
            meta: the description, JSON values (`tcc_jax.training.checkpoint.describe`).
        """
        began = time.monotonic()
        self.wait()
        try:
            if is_whole(self._folder / str(step)):
                return
            (self._folder / str(step)).mkdir(parents=True, exist_ok=True)
            self._saver.save(absolute(self._folder / str(step) / STATE), state)
        except Exception as error:
            self._failed(step, error)
            return
        self.pause_seconds = time.monotonic() - began
        self._background = threading.Thread(target=self._finish, args=(step, meta, began), name="save")
        self._background.start()

    def wait(self) -> None:
        """Wait for the save under way, if any; `saved_step` and `failure` then tell how it went."""
        if self._background:
            self._background.join()
            self._background = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._saver.close()

    def _finish(self, step: int, meta: dict[str, Any], began: float) -> None:
        folder = self._folder / str(step)
        try:
            # Errors of the background surface here.
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                self._before_seal()
                seal(folder, meta)
        except Exception as error:
            self._failed(step, error)
            return
        self.failure, self.saved_step = None, step
        if jax.process_index() == 0:
            self._note(
                f"step {step:,} is saved ({time.monotonic() - began:.2f} s, {self.pause_seconds:.2f} s of pause)"
            )
            self._remove_old()

    def _failed(self, step: int, error: Exception) -> None:
        # Orbax and TensorStore wrap the system's words in several long lines: the end of the first has the reason.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = reason if len(reason) <= 200 else f"{reason[:60]} ... {reason[-140:]}"
        self.failure = f"step {step:,} could not be saved: {reason}"
        self._warn(f"warning: {self.failure}; checkpoints saved before are whole, the run goes on")
        if jax.process_index() == 0:
            remove_folder(self._folder / str(step), ignore_errors=True)

    def _remove_old(self) -> None:
        try:
            steps = whole_steps(self._run_directory)
            for step in sorted(set(steps) - steps_to_keep(steps, self._keep, self._keep_every, self._recalls)):
                # The record goes first: what is left behind by a kill is then a save that was cut off.
                (self._folder / str(step) / RECORD).unlink(missing_ok=True)
                remove_folder(self._folder / str(step))
        except Exception as error:
            self._warn(f"warning: {self._folder}: old checkpoints could not be removed: {error}")


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
    rated = {step: recall for step, recall in dict(recalls).items() if step in steps}
    best = {min(rated, key=lambda step: (-rated[step], step))} if rated else set()
    return set(steps[-keep:]) | {step for step in steps if keep_every and step % keep_every == 0} | best
