"""What a run starts from: old weights, a folder that is there, and what it refuses."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tcc_jax.runs.locks import flock
from tcc_jax.terminal import UserError
from tcc_jax.training import loop
from tcc_jax.training.loop import train
from tests.training.corpora import write_small_corpus
from tests.training.runs import config_of, lines_of, same_numbers, small_config, state_at


def test_a_new_run_starts_from_old_weights_on_purpose(corpus, finished, tmp_path):
    config = config_of(
        corpus,
        tmp_path / "run",
        optimizer={"learning_rate": 0.0},
        checkpoint={"init_from": finished.run.directory},
        training={"steps": 1},
    )
    train(config)
    old, new = state_at(finished, 10), state_at(config, 1)
    jax.tree.map(np.testing.assert_array_equal, new.params, old.params)
    assert (int(new.step), int(old.step)) == (1, 10)
    train(config)


def test_a_start_that_old_weights_replace_is_not_computed(corpus, finished, tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(loop, "spectral_vectors", lambda *_: computed.append("vectors"))
    monkeypatch.setattr(loop, "frequency_bias", lambda *_: computed.append("bias"))
    sections = {"training": {"steps": 1}, "objective": {"spectral_start": True, "frequency_bias": True}}
    train(config_of(corpus, tmp_path / "new", **sections))
    assert computed == ["bias", "vectors"]
    train(config_of(corpus, tmp_path / "run", checkpoint={"init_from": finished.run.directory}, **sections))
    assert computed == ["bias", "vectors"]


def test_weights_that_do_not_fit_leave_no_folder_behind(corpus, finished, tmp_path):
    init = {"init_from": finished.run.directory}
    wider = config_of(corpus, tmp_path / "run", model={"width": 32}, checkpoint=init)
    with pytest.raises(UserError, match=r"its blocks.0.attention.key.kernel is \(16, 16\), this run's is \(32, 32\)"):
        train(wider)
    other = write_small_corpus(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"its vocabulary .* is not that of"):
        train(config_of(other, tmp_path / "deep" / "run", checkpoint=init))
    assert not (tmp_path / "run").exists() and not (tmp_path / "deep").exists()


def test_a_second_process_is_refused(corpus, finished):
    with flock(Path(finished.run.directory)), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        train(finished)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"num_layers": 2}}, "model.num_layers = 2, but the checkpoint to resume from has 1"),
        ({"model": {"position": "rope", "width": 32}}, "model.width = 32"),
        ({"optimizer": {"learning_rate": 0.1}}, "optimizer.learning_rate = 0.1, but the checkpoint .* has 0.01"),
        ({"training": {"batch_rows": 16}}, "training.batch_rows = 16.*--init-from"),
    ],
)
def test_another_configuration_is_refused(corpus, finished, sections, words):
    with pytest.raises(UserError, match=words):
        train(config_of(corpus, finished.run.directory, **sections))


def test_another_corpus_is_refused(finished, tmp_path):
    other = write_small_corpus(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"its vocabulary .* is not that of the checkpoint"):
        train(config_of(other, finished.run.directory))
    shuffled = write_small_corpus(tmp_path / "shuffled", num_sets=61)
    with pytest.raises(UserError, match=r"its corpus .* is not that of the checkpoint"):
        train(config_of(shuffled, finished.run.directory))


def test_a_folder_that_is_no_run_is_left_alone(corpus, tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run of tcc_jax"):
        train(config_of(corpus, tmp_path))
    with pytest.raises(UserError, match="is a file"):
        train(config_of(corpus, tmp_path / "letters.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_start_that_was_killed_inside_a_write_is_gone_on_from(corpus, tmp_path):
    for name in (".status.json.123.tmp", ".config.json.123.tmp", "train.log"):
        (tmp_path / name).write_text("{")
    train(config_of(corpus, tmp_path))
    assert not list(tmp_path.glob(".*.tmp"))
    assert (tmp_path / "status.json").exists()


def test_an_address_of_another_kind_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3://bucket/run: must be a path of this machine or gs://BUCKET/FOLDER"):
        train(config_of(corpus, "s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"compute": {"attention": "cudnn"}}, "attention = cudnn: no block can use it"),
        ({"compute": {"attention": "cudnn"}, "objective": {"cut_points": 0}}, "attention backend 'cudnn' needs"),
        ({"data": {"library_weights": {"NOPE": 2.0}}}, "NOPE"),
    ],
)
def test_a_kernel_or_library_that_is_not_there_leaves_no_folder_behind(corpus, tmp_path, sections, words):
    with pytest.raises(UserError, match=words):
        train(
            small_config(
                **{"run": {"directory": str(tmp_path / "run")}, **sections}
                | {"data": {"corpus": str(corpus)} | sections.get("data", {})}
            )
        )
    assert not (tmp_path / "run").exists()


def test_a_mistake_leaves_no_folder_behind(corpus, tmp_path):
    with pytest.raises(UserError, match="multiple of the 8 devices"):
        train(config_of(corpus, tmp_path / "run", training={"batch_rows": 4}, mesh={"data": 8}))
    with pytest.raises(UserError, match="no prepared corpus here"):
        train(config_of(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_starts_afresh(corpus, finished, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished.run.directory, directory)
    shutil.rmtree(directory / "checkpoints")
    config = config_of(corpus, directory)
    train(config)
    assert same_numbers(lines_of(config)) == same_numbers(lines_of(finished))
