"""A run from start to end: resumed to the bit, stopped on a loss that is no number, refused where it does not fit."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from tcc_jax.config import from_dict
from tcc_jax.corpus.loader import make_loader
from tcc_jax.corpus.store import open_corpus
from tcc_jax.terminal import UserError
from tcc_jax.training import loop
from tcc_jax.training.checkpoint import latest_step, restore_state
from tcc_jax.training.loop import train
from tcc_jax.training.sharding import make_mesh
from tcc_jax.training.state import abstract_state
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_small_corpus(tmp_path_factory.mktemp("corpora") / "small")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Return a run of ten steps that nothing has disturbed; tests copy it before they touch it."""
    config = config_of(corpus, tmp_path_factory.mktemp("runs") / "straight")
    train(config)
    return config


def config_of(corpus, directory, **sections):
    return small_config(run={"directory": str(directory)}, data={"corpus": str(corpus)}, **sections)


def state_at(config, step):
    abstract = abstract_state(config, open_corpus(config.data.corpus).vocabulary.size, make_mesh(1, 8))
    return jax.device_get(restore_state(Path(config.run.directory), step, abstract))


def lines_of(config):
    text = (Path(config.run.directory) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def same_numbers(lines):
    clock = ("seconds", "tokens_per_second", "sets_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def disturb(patch, step, action):
    """Do something while the training batch of `step` (from 1) is fetched."""

    def disturbed_loader(corpus, split, *, start_step, **settings):
        loader = make_loader(corpus, split, start_step=start_step, **settings)
        return DisturbedLoader(loader, start_step) if split == "train" else loader

    class DisturbedLoader:
        def __init__(self, loader, start_step):
            self.loader, self.start_step, self.steps_per_epoch = loader, start_step, loader.steps_per_epoch

        def __iter__(self):
            for number, batch in enumerate(self.loader, self.start_step + 1):
                if number == step:
                    action()
                yield batch

    patch.setattr(loop, "make_loader", disturbed_loader)


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


def test_what_a_run_leaves_behind(finished, capsys):
    directory = Path(finished.run.directory)
    corpus = open_corpus(finished.data.corpus)
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "config.json",
        "genes.tsv",
        "metrics.jsonl",
    ]
    assert from_dict(json.loads((directory / "config.json").read_text())) == finished
    assert (directory / "genes.tsv").read_bytes() == (corpus.path / "genes.tsv").read_bytes()
    training = [line for line in lines_of(finished) if "loss" in line]
    validation = [line for line in lines_of(finished) if "validation_loss" in line]
    assert [line["step"] for line in training] == list(range(1, 11))
    assert [line["step"] for line in validation] == [5, 10]
    assert list(training[0]) == [
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        "sets_per_second",
        "seconds",
        "epoch",
    ]
    # 40 genes and <end>: the untrained model with its frequency bias is about as good as a guess.
    assert training[0]["loss"] == pytest.approx(np.log(41), rel=0.05)
    train(finished)
    assert "already trained to step 10" in capsys.readouterr().err
    assert lines_of(finished)[-1]["step"] == 10


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(corpus, tmp_path, monkeypatch):
    config = config_of(corpus, tmp_path / "run")
    make_train_step = loop.make_train_step

    def with_nan(*arguments):
        train_step = make_train_step(*arguments)

        def step(state, batch):
            state, metrics = train_step(state, batch)
            return state, metrics | {"loss_sum": metrics["loss_sum"] + np.where(state.step >= 10, np.nan, 0)}

        return step

    monkeypatch.setattr(loop, "make_train_step", with_nan)
    with pytest.raises(UserError, match="step 10: the loss or its gradient is not a number"):
        train(config)
    assert latest_step(tmp_path / "run") == 5


def test_an_interrupt_saves_and_the_run_goes_on_from_there(corpus, finished, tmp_path, monkeypatch, capsys):
    config = config_of(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        disturb(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    step = latest_step(tmp_path / "run")
    assert step == 7
    assert f"step {step} is saved" in capsys.readouterr().err
    train(config)
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(finished, 10))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"num_layers": 2}}, "model.num_layers = 2, but the checkpoint to resume from has 1"),
        ({"model": {"position": "rope", "width": 32}}, "model.width = 32"),
    ],
)
def test_another_model_is_refused(corpus, finished, sections, words):
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
