"""A window of steps recorded by JAX's profiler, for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profile:
    """Records some whole steps; leaving the `with` block ends a recording that is still under way.

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
        steps = f"{self._steps[0]} to {self._steps[-1]}"
        self._steps = []
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._report(f"warning: the profile could not be written: {' '.join(str(error).split())[:200]}")
            return
        self._report(
            f"profile of steps {steps} in {self._folder}: pip install tensorboard xprof; "
            f"tensorboard --logdir {self._folder}"
        )
