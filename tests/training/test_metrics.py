"""The lines of metrics and the means in them."""

import json

import pytest

from tcc_jax.training import metrics
from tcc_jax.training.metrics import MetricsFile, Window


def test_opening_drops_the_lines_of_steps_that_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.write(step=step, loss=step / 2)
    first.close()
    # As a kill in the middle of a write would leave it.
    path.write_text(path.read_text() + '{"step": 4, "lo')
    second = MetricsFile(path, 2)
    second.write(step=3, loss=9.0)
    second.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_window_weighs_positions_alike_and_leaves_out_compilation_and_validation(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    window = Window()
    window.add({"loss_sum": 6.0, "scored": 2.0, "tokens": 10, "sets": 1})
    now += 2
    window.add({"loss_sum": 2.0, "scored": 6.0, "tokens": 30, "sets": 5})
    now += 5
    window.leave_out(5)
    line = window.take()
    assert line == {"loss": 1.0, "tokens_per_second": 15.0, "sets_per_second": 2.5}
    now += 4
    window.add({"loss_sum": 3.0, "scored": 1.0, "tokens": 8, "sets": 4})
    assert window.take() == {"loss": 3.0, "tokens_per_second": 2.0, "sets_per_second": 1.0}


def test_a_window_of_one_first_step_has_no_rate():
    window = Window()
    window.add({"loss_sum": 6.0, "scored": 2.0, "tokens": 10, "sets": 1})
    assert window.take() == pytest.approx({"loss": 3.0, "tokens_per_second": 0.0, "sets_per_second": 0.0})
