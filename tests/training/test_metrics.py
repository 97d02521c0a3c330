"""The lines of metrics and the means in them."""

import errno
import json
import random
from dataclasses import dataclass

import pytest

from tcc_jax.training import metrics, report
from tcc_jax.training.metrics import SpikeDetector, Window, memory_bytes, model_flops_utilization
from tcc_jax.training.report import MetricsFile
from tests.training.runs import small_config


@dataclass
class Device:
    """What the numbers of a line need of a device."""

    device_kind: str
    stats: dict | None = None

    def memory_stats(self):
        return self.stats


def test_opening_drops_the_lines_of_steps_that_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.write(step=step, loss=step / 2)
    first.close()
    # As a kill in the middle of a write would leave it.
    path.write_text(path.read_text() + '{"step": 4, "lo')
    # As a power cut may.
    path.write_bytes(path.read_bytes() + b'\0\xff\n{"step": null}\n[1]\n{"loss": 1.0}\n\n')
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
    window.waited(1.0)
    window.add({"loss_sum": 6.0, "scored": 2.0, "tokens": 10, "sets": 1, "skipped": 0, "keys": 70})
    now += 2
    window.waited(0.5)
    window.add({"loss_sum": 2.0, "scored": 6.0, "tokens": 30, "sets": 5, "skipped": 0, "keys": 240})
    now += 5
    window.leave_out(5)
    rates = {"tokens_per_second": 15.0, "sets_per_second": 2.5, "per_token": (8.0, 0.2), "data_wait": 0.25}
    assert window.take() == {"loss": 1.0, "skipped_steps": 0} | rates
    now += 4
    window.add({"loss_sum": 3.0, "scored": 1.0, "tokens": 8, "sets": 4, "skipped": 0, "keys": 24})
    rates = {"tokens_per_second": 2.0, "sets_per_second": 1.0, "per_token": (3.0, 0.125), "data_wait": 0.0}
    assert window.take() == {"loss": 3.0, "skipped_steps": 0} | rates


def test_a_window_of_one_first_step_has_no_rate():
    window = Window()
    window.add({"loss_sum": 6.0, "scored": 2.0, "tokens": 10, "sets": 1, "skipped": 0})
    rates = {"tokens_per_second": 0.0, "sets_per_second": 0.0, "per_token": None}
    values = window.take()
    assert values.items() >= ({"loss": 3.0, "skipped_steps": 0} | rates).items()


def test_a_window_cut_in_two_by_a_checkpoint_gives_the_same_loss():
    random.seed(0)
    steps = [
        {"loss_sum": random.random(), "scored": 3.0, "tokens": 1, "sets": 1, "keys": 1, "skipped": index == 4}
        for index in range(9)
    ]
    steps[4]["loss_sum"] = float("nan")
    whole, first = Window(), Window()
    for step in steps:
        whole.add(step)
    for step in steps[:5]:
        first.add(step)
    second = Window(json.loads(json.dumps(first.sums())))
    for step in steps[5:]:
        second.add(step)
    one, two = whole.take(), second.take()
    assert (one["loss"], one["skipped_steps"]) == (two["loss"], two["skipped_steps"])
    assert one["skipped_steps"] == 1


def test_a_window_of_skipped_steps_has_no_loss():
    window = Window()
    window.add({"loss_sum": float("inf"), "scored": 2.0, "tokens": 10, "sets": 1, "skipped": 1})
    assert window.take()["loss"] is None


def test_lines_that_find_the_disk_full_are_written_later_without_gap_or_repeat(tmp_path, monkeypatch):
    path, said = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, 0, said.append)
    write = report.os.write

    def half(descriptor, data):
        # What a disk does as it fills up: a part of the line, then nothing.
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report.os, "write", half)
        for step in (1, 2):
            file.write(step=step, loss=step / 3)
        with pytest.raises(OSError, match="No space left"):
            file.sync()
    assert len(said) == 1 and "No space left" in said[0]
    file.write(step=3, loss=1.0)
    file.sync()
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_host_that_does_not_write_remembers_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "validation_loss": 2.0, "validation_recall": 0.5}\n{"step": 9}\n')
    before = path.read_bytes()
    file = MetricsFile(path, 4, writes=False)
    file.write(step=5, validation_loss=1.0, validation_recall=0.7)
    file.sync()
    file.close()
    assert (file.recalls, path.read_bytes()) == ({1: 0.5, 5: 0.7}, before)


def test_recalls_and_evaluations_are_remembered_up_to_the_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (2, 4):
        file.write(step=step, validation_loss=1.0, validation_recall=step / 10)
    file.write(step=4, loss=1.0)
    assert file.recalls == {2: 0.2, 4: 0.4}
    file.close()
    again = MetricsFile(tmp_path / "metrics.jsonl", 3)
    assert (again.recalls, again.evaluated) == ({2: 0.2}, {2})
    again.close()


def test_a_spike_is_a_leap_out_of_the_recent_range():
    random.seed(1)
    detector = SpikeDetector()
    for _ in range(200):
        assert detector.look(3 + random.uniform(-0.1, 0.1)) is None
    assert detector.look(1.0) is None
    assert SpikeDetector().look(100.0) is None
    assert detector.look(9.0) == pytest.approx(3.0, abs=0.1)


def test_utilization_is_useful_arithmetic_over_the_peak_of_all_devices():
    config = small_config(
        model={"num_layers": 2, "width": 16, "num_heads": 2, "hidden_width": 32},
        objective={"cut_points": 0},
        training={"row_length": 32},
    )
    devices = [Device("NVIDIA H200")] * 4
    # By hand: each block 4 x 16 x 16 + 2 x 16 x 32 weights, a head of 128 x 16, and 12 L D = 384 for each key.
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 128 * 16
    rate = 1e9
    expected = rate * (6 * weights + 384 * 16) / (4 * 989e12)
    assert model_flops_utilization(config, 100, devices, rate) == pytest.approx(expected, abs=1e-5)
    expected = rate * (6 * weights + 384 * 3.5) / (4 * 989e12)
    assert model_flops_utilization(config, 100, devices, rate, 3.5) == pytest.approx(expected, abs=1e-5)
    assert expected > 0.009
    assert model_flops_utilization(config, 100, [Device("cpu")], rate) is None


def test_memory_is_the_most_of_any_device_or_of_the_process(monkeypatch):
    stats = ({"peak_bytes_in_use": 5, "bytes_in_use": 4}, {"peak_bytes_in_use": 7, "bytes_in_use": 3})
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device("a", one) for one in stats])
    assert memory_bytes() == (4, 7)
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device("cpu")])
    held = bytearray(2**28)
    used, peak = memory_bytes()
    assert 2**26 < used < 1.1 * peak and 2**28 < peak < 2**40
    del held
