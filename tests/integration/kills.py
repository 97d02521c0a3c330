"""Kill a training run at random moments of its life, start it again, and compare with one that was never stopped."""

from __future__ import annotations

import collections
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.nursery import Child, Nursery
from tests.integration.runs import doing, fingerprint, numbers, write_run

STEPS = 500
# How far past the first step, in seconds, a kill comes: up to a few saves and evaluations.
REACH = 1.2


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        moments: kills by what the process was doing.
        runs: runs that were finished on the way, each compared.
        lost_steps: by what the process was doing, for each kill the steps that had to be taken again.
        resume_seconds: for each start from a checkpoint, seconds from the start to the first new step.
    """

    moments: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: int = 0
    lost_steps: dict[str, list[int]] = field(default_factory=lambda: collections.defaultdict(list))
    resume_seconds: list[float] = field(default_factory=list)


def kill_and_compare(folder: Path, kills: int, seed: int) -> Outcome:
    """Kill runs `kills` times in all, let the last one finish, and assert that each ends like an undisturbed one.

    Args:
        folder: where to work; kept for inspection.
        kills: how often to send SIGKILL.
        seed: of the moments.
    """
    toml = write_run(folder, training={"steps": STEPS})
    moments, outcome = random.Random(seed), Outcome()
    with Nursery(JAX_COMPILATION_CACHE_DIR=str(folder / "compilations")) as nursery:
        # Twice: the first fills the compilation cache, the second says how long a start takes with a warm one.
        for name in ("first", "straight"):
            child = nursery.start(toml, "--run.directory", folder / name, log=folder / f"{name}.log")
            started = _seconds_to_training(child, folder / name)
            assert child.wait() == 0, child.log.read_text()
        expected = fingerprint(folder / "straight", STEPS), numbers(folder / "straight")
        assert expected == (fingerprint(folder / "first", STEPS), numbers(folder / "first"))
        run = _next_run(folder, outcome)
        while sum(outcome.moments.values()) < kills:
            latest = _latest(run)
            child = nursery.start(toml, "--run.directory", run, log=run.with_suffix(".log"))
            if moments.random() < 0.3:
                time.sleep(moments.uniform(0, started))
            else:
                # Counted from the first step, however long the start takes on a busy machine.
                seconds = _seconds_to_training(child, run)
                if latest and seconds:
                    outcome.resume_seconds.append(seconds)
                time.sleep(moments.uniform(0, REACH))
            if child.poll() is None:
                child.kill(9)
            # It may have ended by itself just before.
            if child.wait() == -9:
                what = doing(run)
                outcome.moments[what] += 1
                outcome.lost_steps[what].append(max(0, _last_line(run) - _latest(run)))
            else:
                assert child.status == 0, child.log.read_text()
                _compare(run, expected)
                outcome.runs += 1
                run = _next_run(folder, outcome)
        child = nursery.start(toml, "--run.directory", run, log=run.with_suffix(".log"))
        assert child.wait(300) == 0, child.log.read_text()
        _compare(run, expected)
        outcome.runs += 1
    return outcome


def _compare(run: Path, expected: tuple) -> None:
    state, lines = expected
    assert numbers(run) == lines
    assert fingerprint(run, STEPS) == state


def _next_run(folder: Path, outcome: Outcome) -> Path:
    return folder / f"killed{outcome.runs}"


def _latest(run: Path) -> int:
    whole = [int(path.parent.name) for path in run.glob("checkpoints/*/checkpoint.json") if path.parent.name.isdigit()]
    return max(whole, default=0)


def _last_line(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def _seconds_to_training(child: Child, run: Path) -> float | None:
    began = time.monotonic()
    while child.poll() is None:
        if (run / "status.json").exists():
            status = _status(run)
            if status["pid"] == child.pid and status["state"] in ("training", "evaluating"):
                return time.monotonic() - began
        time.sleep(0.005)
    return None
