"""What a run saves and keeps, and how it goes on: signals, meshes, failed saves, damaged checkpoints, lost folders."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tcc_jax.runs import saving
from tcc_jax.runs.checkpoint import latest_step
from tcc_jax.runs.preemption import Stop
from tcc_jax.runs.saving import whole_steps
from tcc_jax.terminal import UserError
from tcc_jax.training import loop
from tcc_jax.training.agreement import Agreement
from tcc_jax.training.loop import train
from tcc_jax.training.sharding import shard_batch
from tests.training.runs import config_of, disturb, lines_of, same_numbers, state_at

EVAL = "python -m tcc_jax.eval --checkpoint"


def recall_of(values):
    """Return a `make_recall` whose recall at a step is `values[step]`."""
    return lambda config, corpus: lambda params, step, poll: values.get(step, 0.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(corpus, finished, tmp_path, monkeypatch, capsys, number):
    config = config_of(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        disturb(patch, 7, lambda: (os.kill(os.getpid(), number), time.sleep(0.2)))
        train(config)
    assert latest_step(tmp_path / "run") == 7
    assert f"{number.name}: step 7 is saved" in capsys.readouterr().err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["checkpoint"]) == ("stopped", 7)
    train(config)
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(finished, 10))
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(finished))


@pytest.mark.parametrize("step", [5, 10])
def test_an_evaluation_given_up_is_made_when_the_run_goes_on(corpus, tmp_path, step):
    def make_recall(config, corpus):
        def recall(params, at, poll):
            if at == step:
                stop.reason = "asked"
                poll()
            return at / 100

        return recall

    stop, config = Stop(), config_of(corpus, tmp_path / "run")
    train(config, stop, make_recall)
    assert latest_step(tmp_path / "run") == step
    assert [line["step"] for line in lines_of(config) if "validation_loss" in line] == [5][: step // 5 - 1]
    recalls = recall_of({5: 0.05, 10: 0.1})
    for _ in range(2):
        train(config, Stop(), recalls)
    straight = config_of(corpus, tmp_path / "straight")
    train(straight, Stop(), recalls)
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(straight))
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(straight, 10))


def test_the_best_recall_is_saved_and_kept(corpus, tmp_path):
    config = config_of(corpus, tmp_path / "run", training={"eval_every": 2}, checkpoint={"every_steps": 5, "keep": 1})
    train(config, make_recall=recall_of({2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.1}))
    assert whole_steps(tmp_path / "run") == [4, 10]
    assert [line["validation_recall"] for line in lines_of(config) if "validation_recall" in line] == [
        0.1,
        0.3,
        0.2,
        0.3,
        0.1,
    ]
    *_, last, best = (tmp_path / "run/train.log").read_text().splitlines()
    run = tmp_path / "run"
    assert last.endswith(f"{run / 'checkpoints/10'}; evaluate it with {EVAL} {run} --out reports/run")
    words = f"best validation recall 0.3000 at step 4: {run / 'checkpoints/4'}; evaluate it with {EVAL} "
    assert best.endswith(f"{words}{run / 'checkpoints/4'} --out reports/run-4")


def test_nothing_is_said_of_the_best_checkpoint_where_it_is_the_last(corpus, tmp_path):
    config = config_of(corpus, tmp_path / "run")
    train(config, make_recall=recall_of({5: 0.2, 10: 0.2}))
    log = (tmp_path / "run/train.log").read_text()
    assert "best validation recall" not in log and log.count(EVAL) == 1


def test_saves_by_time_change_no_number(corpus, tmp_path, monkeypatch):
    sections = {"training": {"log_every": 4}}
    often = config_of(
        corpus, tmp_path / "often", checkpoint={"every_minutes": 1e-9, "every_steps": 99, "keep": 99}, **sections
    )
    with monkeypatch.context() as patch:
        disturb(patch, 7, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(often)
    # In the middle of a line of metrics, and of the sums it is the mean of.
    assert whole_steps(tmp_path / "often") == [1, 2, 3, 4, 5, 6]
    train(often)
    never = config_of(corpus, tmp_path / "never", checkpoint={"every_minutes": 0, "every_steps": 99}, **sections)
    train(never)
    assert whole_steps(tmp_path / "never") == [10]
    assert same_numbers(lines_of(often)) == same_numbers(lines_of(never))
    jax.tree.map(np.testing.assert_array_equal, state_at(often, 10), state_at(never, 10))


def test_several_hosts_save_once_each_time_it_is_due(corpus, tmp_path, monkeypatch):
    class LateAgreement(Agreement):
        def exchange(self, *flags):
            self._pending.append(flags)
            return self._pending.popleft() if len(self._pending) > self._late else (False,) * len(flags)

    minutes, make = 0, loop.make_train_step

    def clocked_make(*arguments):
        train_step = make(*arguments)

        def step(state, batch):
            nonlocal minutes
            minutes += 1
            return train_step(state, batch)

        return step

    monkeypatch.setattr(loop, "Agreement", LateAgreement)
    monkeypatch.setattr(loop, "make_train_step", clocked_make)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 60.0 * minutes))
    sections = {"training": {"steps": 12, "eval_every": 0}, "compute": {"steps_in_flight": 3}}
    train(config_of(corpus, tmp_path / "run", checkpoint={"every_minutes": 3, "every_steps": 99}, **sections))
    # Due at steps 3 and 8, and heard of two steps later.
    assert whole_steps(tmp_path / "run") == [5, 10, 12]


def test_a_save_that_fails_does_not_stop_the_run_unless_it_is_the_last(corpus, finished, tmp_path, monkeypatch, capsys):
    seal = saving.seal

    def full_at(*steps):
        def fail(folder, meta):
            if meta["step"] in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            seal(folder, meta)

        return fail

    config = config_of(corpus, tmp_path / "run", checkpoint={"every_steps": 2})
    monkeypatch.setattr(saving, "seal", full_at(4, 10))
    with pytest.raises(UserError, match=r"step 10 could not be saved: .*No space left"):
        train(config)
    assert whole_steps(tmp_path / "run") == [2, 6, 8]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["checkpoint"] == 8
    assert "step 4 could not be saved" in capsys.readouterr().err
    monkeypatch.setattr(saving, "seal", seal)
    train(config)
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(finished))
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(finished, 10))


def test_a_damaged_checkpoint_is_passed_over_when_asked_to(corpus, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.run.directory, tmp_path / "run")
    [*_, file] = sorted((tmp_path / "run" / "checkpoints" / "10").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"checkpoints/10: the checkpoint is damaged.*--resume last-good"):
        train(config_of(corpus, tmp_path / "run"))
    config = config_of(corpus, tmp_path / "run", checkpoint={"resume": "last-good"})
    with monkeypatch.context() as patch:
        disturb(patch, 6, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    # Step 10 is put aside, step 5 is what there is.
    assert json.loads((tmp_path / "run" / "status.json").read_text())["checkpoint"] == 5
    train(config)
    assert "put aside, going on from step 5" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(finished, 10))
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(finished))


def test_a_run_moves_between_meshes_and_sees_the_same_batches(corpus, tmp_path, monkeypatch):
    def seen_by(sizes_and_steps, directory):
        seen = []

        def remember(batch, mesh):
            array = shard_batch(batch, mesh)
            # Asked for: in the loop nothing leaves the devices by itself.
            seen.append(jax.device_get(array["tokens"]))
            return array

        monkeypatch.setattr(loop, "shard_batch", remember)
        for size, steps in sizes_and_steps:
            sections = {"training": {"steps": steps, "eval_every": 0}, "mesh": {"data": size}}
            # The schedule must not depend on where the run stops.
            train(config_of(corpus, directory, optimizer={"final_fraction": 1.0}, **sections))
        losses = [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return seen, losses

    moved, moved_losses = seen_by([(8, 4), (4, 7), (1, 10)], tmp_path / "moved")
    straight, straight_losses = seen_by([(1, 10)], tmp_path / "straight")
    np.testing.assert_array_equal(moved, straight)
    np.testing.assert_allclose(moved_losses, straight_losses, rtol=1e-4)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_or_replaced_ends_the_run_and_is_left_alone(corpus, tmp_path, monkeypatch, replaced):
    directory = tmp_path / "run"
    config = config_of(corpus, directory)

    def replace():
        end = time.monotonic() + 60
        while not whole_steps(directory):
            assert time.monotonic() < end
        directory.rename(tmp_path / "moved")
        if replaced:
            directory.mkdir()
            (directory / ".lock").write_text("another run's")

    disturb(monkeypatch, 7, replace)
    with pytest.raises(UserError, match="run: removed, renamed or replaced while this run was writing into it"):
        train(config)
    assert [path.name for path in directory.rglob("*")] == ([".lock"] if replaced else [])
    assert whole_steps(tmp_path / "moved") == [5]


def test_lines_of_metrics_that_are_lost_are_told(corpus, finished, tmp_path, capsys):
    directory = Path(shutil.copytree(finished.run.directory, tmp_path / "run"))
    shutil.rmtree(directory / "checkpoints" / "10")
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text("".join(text.splitlines(keepends=True)[2:]))
    train(config_of(corpus, directory))
    assert "warning: " + str(directory) + ": 2 lines of metrics are lost" in capsys.readouterr().err
    assert same_numbers(lines_of(config_of(corpus, directory))) == same_numbers(lines_of(finished))[2:]
