"""A save that fails is told, leaves nothing behind and harms nothing; the next one is tried."""

import errno
import resource

import jax
import numpy as np
import pytest

from tcc_jax.corpus.store import open_corpus
from tcc_jax.runs import saving
from tcc_jax.runs.checkpoint import describe, latest_step, restore_state
from tcc_jax.runs.saving import CheckpointWriter, whole_steps
from tcc_jax.training.state import abstract_state, create_state
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config, small_mesh


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    corpus = open_corpus(write_small_corpus(tmp_path_factory.mktemp("corpora") / "small"))
    config = small_config()
    mesh = small_mesh(1)
    state = create_state(config, corpus.vocabulary.size, None, mesh)
    return (
        state,
        lambda step: describe(config, corpus, step, 0.0),
        abstract_state(config, corpus.vocabulary.size, mesh),
    )


def test_a_full_disk_is_told_and_the_next_save_is_tried(parts, tmp_path, capfd):
    state, describe_step, abstract = parts
    said = []
    with CheckpointWriter(tmp_path, keep=5, warn=said.append) as writer:
        writer.save(1, state, describe_step(1))
        writer.wait()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # No file of this process may grow past a kilobyte: the arrays cannot be written.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            writer.save(2, state, describe_step(2))
            writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert writer.failure and "step 2 could not be saved" in writer.failure
        assert "File too large" in writer.failure or "EFBIG" in writer.failure
        assert writer.saved_step == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
        writer.save(3, state, describe_step(3))
        writer.wait()
        assert (writer.failure, writer.saved_step) == (None, 3)
    assert [line.split(":")[0] for line in said if "warning" in line] == ["warning"]
    assert "Traceback" not in capfd.readouterr().err
    for step in (1, 3):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(restore_state(tmp_path, step, abstract)),
            jax.device_get(state),
        )


@pytest.mark.parametrize("place", ["seal", "before_seal"])
def test_whatever_fails_before_the_seal_leaves_no_checkpoint(parts, tmp_path, monkeypatch, place):
    state, describe_step, _ = parts

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "seal":
        monkeypatch.setattr(saving, "seal", fail)
    with CheckpointWriter(tmp_path, keep=5, before_seal=fail if place == "before_seal" else lambda: None) as writer:
        writer.save(1, state, describe_step(1))
    assert "No space left" in writer.failure
    assert latest_step(tmp_path) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_failure_too(parts, tmp_path):
    state, describe_step, _ = parts
    (tmp_path / "checkpoints").write_text("in the way")
    with CheckpointWriter(tmp_path, keep=5) as writer:
        writer.save(1, state, describe_step(1))
        assert "step 1 could not be saved" in writer.failure
        (tmp_path / "checkpoints").unlink()
        writer.save(2, state, describe_step(2))
    assert whole_steps(tmp_path) == [2]


def test_old_ones_go_only_once_a_new_one_is_whole(parts, tmp_path, monkeypatch):
    state, describe_step, _ = parts
    recalls = {1: 0.9}
    with CheckpointWriter(tmp_path, keep=1, keep_every=3, recalls=recalls) as writer:
        for step in range(1, 5):
            writer.save(step, state, describe_step(step))
        writer.wait()
        assert whole_steps(tmp_path) == [1, 3, 4]
        recalls[4] = 0.95
        with monkeypatch.context() as patch:
            patch.setattr(saving, "seal", lambda *_: 1 / 0)
            writer.save(5, state, describe_step(5))
            writer.wait()
        assert whole_steps(tmp_path) == [1, 3, 4]
        writer.save(6, state, describe_step(6))
    assert whole_steps(tmp_path) == [3, 4, 6]


def test_what_lies_among_the_checkpoints_is_left_alone(parts, tmp_path):
    state, describe_step, _ = parts
    (tmp_path / "checkpoints" / "5.damaged").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7").write_text("mine")
    (tmp_path / "checkpoints" / "9" / "state").mkdir(parents=True)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, state, describe_step(1))
    assert (writer.failure, writer.saved_step) == (None, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "5.damaged", "7"]
