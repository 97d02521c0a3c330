"""TensorBoard's copy of the metrics: after a restart, on a full disk, and without the extra."""

import errno
import sys

import pytest

from tcc_jax.terminal import UserError
from tcc_jax.training import loop, report
from tcc_jax.training.report import Board
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config


def events_of(folder):
    """Return (step, values) of every event, later files after earlier ones, as TensorBoard reads them."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            # A record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum.
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                # TensorBoard drops what it has of this step and of later ones.
                events = [(step, values) for step, values in events if step < event.step]
            elif event.HasField("summary"):
                events.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return events


def test_a_run_writes_its_metrics_for_tensorboard_too(tmp_path):
    pytest.importorskip("tensorboardX")
    corpus = write_small_corpus(tmp_path / "corpus")
    settings = {"run": {"directory": str(tmp_path / "run")}, "data": {"corpus": str(corpus)}}
    loop.train(small_config(**settings, training={"tensorboard": True, "steps": 5}))
    events = events_of(tmp_path / "run" / "tensorboard")
    assert [step for step, values in events if "loss" in values] == [1, 2, 3, 4, 5]
    assert [step for step, values in events if "validation_loss" in values] == [5]
    # Numbers that are null in metrics.jsonl are left out.
    assert "gradient_norm" in events[0][1] and "mfu" not in events[0][1]


def test_a_restart_repeats_no_step(tmp_path):
    pytest.importorskip("tensorboardX")
    for first, last in ((0, 5), (3, 6)):
        with Board(tmp_path, first, print) as board:
            for step in range(first + 1, last + 1):
                board.write(step=step, loss=step + first / 10)
    assert events_of(tmp_path) == [
        (step, {"loss": pytest.approx(loss)}) for step, loss in enumerate([1, 2, 3, 4.3, 5.3, 6.3], 1)
    ]


def test_a_full_disk_ends_the_board_and_not_the_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    said = []
    with Board(tmp_path, 0, said.append) as board:

        def full(event):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(board._writer, "write_event", full)
        for step in range(1, 100):
            board.write(step=step, loss=1.0)
    assert len(said) == 1 and "No space left on device" in said[0]


def test_without_the_extra_the_run_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r'pip install "tcc-jax\[tensorboard\]"'):
        report.require_tensorboard()
    config = small_config(run={"directory": str(tmp_path / "run")}, training={"tensorboard": True})
    with pytest.raises(UserError, match="tensorboardX"):
        loop.train(config)
    assert not (tmp_path / "run").exists()
