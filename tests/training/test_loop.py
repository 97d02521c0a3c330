"""A run from step to step: the same numbers however it is computed, what it leaves, losses that are no number."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tcc_jax.config import from_dict
from tcc_jax.corpus.loader import BatchSource
from tcc_jax.corpus.store import open_corpus
from tcc_jax.runs.checkpoint import latest_step
from tcc_jax.terminal import UserError
from tcc_jax.training import loop
from tcc_jax.training import step as step_module
from tcc_jax.training.loop import train
from tcc_jax.training.optimizer import learning_rate
from tests.training.runs import config_of, disturb, lines_of, same_numbers, state_at


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(corpus, finished, tmp_path, monkeypatch):
    config = config_of(corpus, tmp_path / "run")

    def power_cut():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        disturb(patch, 8, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert latest_step(tmp_path / "run") == 5
    assert lines_of(config)[-1]["step"] > 5
    train(config)
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(finished, 10))
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(finished))


@pytest.mark.parametrize("steps_in_flight", [1, 4, 64])
def test_steps_in_flight_change_no_number(corpus, finished, tmp_path, monkeypatch, steps_in_flight):
    config = config_of(corpus, tmp_path / "run", compute={"steps_in_flight": steps_in_flight})
    with monkeypatch.context() as patch:
        disturb(patch, 8, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    train(config)
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(finished))
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(finished, 10))


@pytest.mark.parametrize(("steps_in_flight", "unread"), [(1, 1), (2, 2), (4, 4), (64, 9)])
def test_no_more_steps_are_in_flight_than_asked_for(corpus, tmp_path, monkeypatch, steps_in_flight, unread):
    sections = {"training": {"eval_every": 0, "steps": 9}, "checkpoint": {"every_steps": 99}}
    config = config_of(corpus, tmp_path / "run", compute={"steps_in_flight": steps_in_flight}, **sections)
    flying, most = 0, 0
    make, report_step = loop.make_train_step, loop.Report.step

    def counted_make(*arguments):
        train_step = make(*arguments)

        def step(state, batch):
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            return train_step(state, batch)

        return step

    def counted_report(report, step, values):
        nonlocal flying
        flying -= 1
        return report_step(report, step, values)

    monkeypatch.setattr(loop, "make_train_step", counted_make)
    monkeypatch.setattr(loop.Report, "step", counted_report)
    train(config)
    assert (most, flying) == (unread, 0)


def test_the_next_batch_is_on_its_way_before_the_loop_waits_for_a_step(corpus, tmp_path, monkeypatch):
    order, put, report_step = [], loop.shard_batch, loop.Report.step
    monkeypatch.setattr(loop, "shard_batch", lambda *arguments: (order.append("put"), put(*arguments))[1])
    monkeypatch.setattr(loop.Report, "step", lambda *arguments: (order.append("read"), report_step(*arguments))[1])
    train(config_of(corpus, tmp_path / "run", compute={"steps_in_flight": 1}, training={"steps": 3, "eval_every": 0}))
    assert order == ["put", "put", "read", "put", "read", "read"]


def test_skips_are_handled_alike_with_more_steps_in_flight(corpus, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4, 8})
    runs = [
        config_of(corpus, tmp_path / str(number), compute={"steps_in_flight": number}, training={"log_every": 2})
        for number in (1, 2, 4)
    ]
    for config in runs:
        train(config)
    one, two, four = (same_numbers(lines_of(config)) for config in runs)
    assert one == two == four
    assert sum(line.get("skipped_steps", 0) for line in four) == 3


def test_a_transfer_that_nobody_asked_for_ends_the_run(corpus, tmp_path, monkeypatch):
    make = loop.make_train_step

    def careless_make(*arguments):
        train_step = make(*arguments)
        # Adding a number of the host to an array makes JAX send it to the device behind our back.
        return lambda state, batch: train_step(state, batch | {"tokens": batch["tokens"] + np.ones(32, np.int32)})

    monkeypatch.setattr(loop, "make_train_step", careless_make)
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        train(config_of(corpus, tmp_path / "run"))


@pytest.mark.parametrize("objective", [{}, {"spectral_start": True, "cut_points": 2}])
def test_each_step_function_is_compiled_once_in_a_run(corpus, tmp_path, monkeypatch, objective):
    made = []

    def remember(make):
        return lambda *arguments: made.append(make(*arguments)) or made[-1]

    monkeypatch.setattr(loop, "make_train_step", remember(loop.make_train_step))
    monkeypatch.setattr(loop, "make_eval_step", remember(loop.make_eval_step))
    # Evaluations, saves, a stop and a resume, on a mesh of eight.
    config = config_of(
        corpus, tmp_path / "run", mesh={"data": 8}, training={"eval_every": 3, "eval_steps": 2}, objective=objective
    )
    with monkeypatch.context() as patch:
        disturb(patch, 6, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    train(config)
    assert [function._cache_size() for function in made] == [1, 1, 1, 1]


def test_a_window_of_steps_is_profiled(corpus, tmp_path, monkeypatch, capsys):
    spans, start, stop = [], jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *arguments: (spans.append("start"), start(*arguments)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (spans.append("stop"), stop()))
    config = config_of(corpus, tmp_path / "run", training={"profile_steps": "3:4", "steps": 6})
    train(config)
    [profile] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    steps = {
        event.name: dict(event.stats).get("step_num")
        for plane in jax.profiler.ProfileData.from_file(str(profile)).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("train")
    }
    assert set(steps) and all(number in (3, 4) for number in steps.values() if number is not None)
    assert "profile of steps 3 to 4 in" in capsys.readouterr().err
    # Behind the window nothing is recorded; a run that ends inside it still writes what it has.
    train(config_of(corpus, tmp_path / "run", training={"profile_steps": "3:4", "steps": 6}))
    assert spans == ["start", "stop"]
    train(config_of(corpus, tmp_path / "short", training={"profile_steps": "2:99", "steps": 3}))
    assert "profile of steps 2 to 3 in" in capsys.readouterr().err
    assert list((tmp_path / "short" / "profile").rglob("*.xplane.pb"))


def test_what_a_run_leaves_behind(finished, capsys):
    directory = Path(finished.run.directory)
    corpus = open_corpus(finished.data.corpus)
    assert sorted(path.name for path in directory.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "environment.json",
        "genes.tsv",
        "metrics.jsonl",
        "status.json",
        "train.log",
    ]
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"], status["pid"]) == ("finished", 10, 10, os.getpid())
    assert status["checkpoint"] == 10
    [start] = json.loads((directory / "environment.json").read_text())["starts"]
    assert start["step"] == 0 and start["packages"]["jax"] == jax.__version__
    log = (directory / "train.log").read_text()
    assert "49 training sets" in log and log.count("attention: ") == log.count("attention: xla\n") == 1
    source = BatchSource(finished, corpus, "train")
    share = 49 / (source.plan.num_rows * finished.training.segments_per_row)
    assert f"% full, {share:.0%} of their {finished.training.segments_per_row} places for sets taken" in log
    assert from_dict(json.loads((directory / "config.json").read_text())) == finished
    assert (directory / "genes.tsv").read_bytes() == (corpus.path / "genes.tsv").read_bytes()
    training = [line for line in lines_of(finished) if "loss" in line]
    validation = [line for line in lines_of(finished) if "validation_loss" in line]
    assert [line["step"] for line in training] == list(range(1, 11))
    assert [line["step"] for line in validation] == [5, 10]
    assert list(training[0]) == [
        "step",
        "loss",
        "skipped_steps",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        "sets_per_second",
        "mfu",
        "mfu_segments",
        "data_wait",
        "memory_bytes",
        "memory_peak_bytes",
        "seconds",
        "epoch",
    ]
    # 40 genes and <end>: the untrained model with its frequency bias is about as good as a guess.
    assert training[0]["loss"] == pytest.approx(np.log(41), rel=0.05)
    train(finished)
    assert "already trained to step 10" in capsys.readouterr().err
    assert lines_of(finished)[-1]["step"] == 10


def poison(patch, steps):
    """Make the loss of some steps (from 1) not a number, inside the jitted step."""
    plain = step_module._make_loss

    def make_poisoned_loss(config, size, mesh, *, training):
        loss_of = plain(config, size, mesh, training=training)

        def poisoned_loss(params, batch, key):
            loss_sum, scored = loss_of(params, batch, key)
            return loss_sum * batch["poison"].mean() if training else loss_sum, scored

        return poisoned_loss

    class PoisonedSource(BatchSource):
        def batches(self, start_step=0):
            for number, batch in enumerate(super().batches(start_step), start_step + 1):
                factor = np.nan if number in steps else 1.0
                yield batch | {"poison": np.full(len(batch["tokens"]), factor, np.float32)}

    patch.setattr(step_module, "_make_loss", make_poisoned_loss)
    patch.setattr(loop, "BatchSource", PoisonedSource)


def test_an_update_that_is_not_finite_is_skipped_and_counted(corpus, tmp_path, monkeypatch, capsys):
    config = config_of(corpus, tmp_path / "run", training={"log_every": 2})
    poison(monkeypatch, {6})
    train(config)
    before, after, last = (state_at(config, step) for step in (5, 10, 10))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (10, 1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))
    lines = {line["step"]: line for line in lines_of(config) if "loss" in line}
    assert [lines[step]["skipped_steps"] for step in (2, 4, 6, 8, 10)] == [0, 0, 1, 0, 0]
    assert lines[6]["gradient_norm"] is None
    # The schedule waited for one update: step 8 has the rate that step 7 would have had.
    expected = learning_rate(config.optimizer, 10, 6)
    assert lines[8]["learning_rate"] == pytest.approx(float(expected), rel=1e-6)
    assert int(before.skipped) == 0
    assert "step 6: update skipped: loss nan" in capsys.readouterr().err


def test_updates_skipped_too_often_stop_the_run_with_state_and_batch_saved(corpus, tmp_path, monkeypatch):
    config = config_of(corpus, tmp_path / "run", training={"skips_before_stop": 3})
    poison(monkeypatch, range(7, 100))
    with pytest.raises(UserError, match="step 9: the loss or its gradient was not finite 3 times in a row") as caught:
        train(config)
    assert "the last checkpoint is of step 9" in str(caught.value)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["checkpoint"]) == ("failed", 9)
    state = state_at(config, 9)
    assert int(state.skipped_in_a_row) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    saved = np.load(tmp_path / "run" / "skipped" / "step-9-host-0.npz", allow_pickle=False)
    assert np.isnan(saved["poison"]).all()
    expected = BatchSource(config, open_corpus(corpus), "train")[8]
    np.testing.assert_array_equal(saved["tokens"], expected["tokens"])


def test_a_batch_that_cannot_be_saved_is_told_and_hides_no_reason(corpus, tmp_path, monkeypatch):
    config = config_of(corpus, tmp_path / "run", training={"skips_before_stop": 2})
    poison(monkeypatch, range(3, 100))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.np, "savez", full)
    with pytest.raises(UserError, match=r"not finite 2 times.*could not be written to .*No space left.*step 4"):
        train(config)
