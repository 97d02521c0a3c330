"""SIGTERM and SIGINT in every phase of a real run: exit 0, nothing lost, and the run goes on to the same bits."""

import json
import signal
import time

import pytest

from tests.integration.kills import STEPS
from tests.integration.nursery import Nursery
from tests.integration.runs import fingerprint, numbers, write_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    toml = write_run(folder, training={"steps": STEPS})
    with Nursery(JAX_COMPILATION_CACHE_DIR=str(folder / "compilations")) as nursery:
        child = nursery.start(toml, "--run.directory", folder / "straight", log=folder / "straight.log")
        assert child.wait() == 0, child.log.read_text()
        yield folder, toml, nursery


def status_of(run):
    file = run / "status.json"
    return json.loads(file.read_text()) if file.exists() else {"state": "", "step": 0, "pid": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_every_phase_stops_the_run_and_it_goes_on(place, number):
    folder, toml, nursery = place
    run = folder / number.name
    reached = set()
    phases = [("importing", 0), ("starting", 0), ("compiling", 0), ("training", 30), ("evaluating", 100), ("save", 200)]
    for phase, least in phases:
        child = nursery.start(toml, "--run.directory", run, log=folder / f"{number.name}-{phase}.log")
        end = time.monotonic() + 60
        while time.monotonic() < end and child.poll() is None:
            status = status_of(run)
            unsealed = [path for path in (run / "checkpoints").glob("*") if not (path / "checkpoint.json").exists()]
            mine = status["pid"] == child.pid and status["step"] >= least
            there = bool(unsealed) if phase == "save" else status["state"] == phase
            if (phase == "importing" and status["pid"] != child.pid) or (mine and there):
                break
        # At once after the fork nobody listens yet; a signal then ends the process as it ends any other.
        time.sleep(0.3 if phase == "importing" else 0)
        child.kill(number)
        assert child.wait(60) == 0, child.log.read_text()
        said = child.log.read_text()
        assert number.name in said and ("is saved" in said or "no unsaved step" in said or "nothing left" in said)
        status = status_of(run)
        if status["state"] == "stopped" and status["step"]:
            assert (run / "checkpoints" / str(status["step"]) / "checkpoint.json").exists()
            reached.add(phase)
    assert {"training", "evaluating"} <= reached
    child = nursery.start(toml, "--run.directory", run, log=folder / f"{number.name}-last.log")
    assert child.wait() == 0, child.log.read_text()
    assert status_of(run)["state"] == "finished"
    assert numbers(run) == numbers(folder / "straight")
    assert fingerprint(run, STEPS) == fingerprint(folder / "straight", STEPS)


def test_a_signal_during_a_long_compilation_is_answered_at_once(place):
    folder, toml, _ = place
    run = folder / "compiling"
    # No cache and a deep model: the first step compiles for many seconds.
    with Nursery(JAX_ENABLE_COMPILATION_CACHE="false") as nursery:
        deep = ("--model.num-layers", 12, "--run.directory", run)
        child = nursery.start(toml, *deep, log=folder / "compiling.log")
        while status_of(run)["state"] != "compiling":
            assert child.poll() is None, child.log.read_text()
            time.sleep(0.01)
        time.sleep(1.0)
        assert status_of(run)["state"] == "compiling"
        child.kill(signal.SIGTERM)
        assert child.wait(60) == 0, child.log.read_text()
    # Had it waited for the compilation, there would be a step to save.
    assert "SIGTERM: stopped with no unsaved step" in child.log.read_text()
    assert status_of(run)["state"] == "stopped"


def test_a_second_signal_ends_at_once_and_loses_no_bit(place):
    folder, toml, nursery = place
    run = folder / "twice"
    child = nursery.start(toml, "--run.directory", run, log=folder / "twice.log")
    while status_of(run)["step"] < 20:
        assert child.poll() is None, child.log.read_text()
    child.kill(signal.SIGTERM)
    time.sleep(0.001)
    child.kill(signal.SIGTERM)
    # It may have finished the save before the second one came.
    assert child.wait(60) in (0, 128 + signal.SIGTERM), child.log.read_text()
    child = nursery.start(toml, "--run.directory", run, log=folder / "twice.log")
    assert child.wait() == 0, child.log.read_text()
    assert numbers(run) == numbers(folder / "straight")
