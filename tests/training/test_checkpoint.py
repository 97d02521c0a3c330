"""Checkpoints: what is saved is what was there, and whatever cannot be opened is named in one line."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcc_jax.corpus.store import open_corpus
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.model.decoder import abstract_params
from tcc_jax.terminal import UserError
from tcc_jax.training.checkpoint import CheckpointWriter, describe, latest_step, read_checkpoint, restore_state
from tcc_jax.training.sharding import make_mesh, replicated, with_sharding
from tcc_jax.training.state import abstract_state, create_state
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run directory with checkpoints of steps 3 and 12, written from a mesh of four devices, and its state."""
    folder = tmp_path_factory.mktemp("run")
    corpus = open_corpus(write_small_corpus(folder / "corpus"))
    config = small_config(run={"directory": str(folder / "run")})
    state = create_state(config, corpus.vocabulary.size, None, make_mesh(4, 8))
    (folder / "run").mkdir()
    corpus.vocabulary.write(folder / "run" / "genes.tsv")
    with CheckpointWriter(folder / "run", keep=2) as writer:
        for step in (1, 3, 12):
            writer.save(step, state, describe(config, corpus, step, elapsed_seconds=1.5))
    return folder / "run", config, corpus, jax.device_get(state)


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def test_a_run_directory_opens_at_its_latest_step_and_a_step_folder_at_its_own(run):
    directory, config, corpus, state = run
    assert latest_step(directory) == 12
    for path, step in ((directory, 12), (str(directory), 12), (directory / "checkpoints" / "3", 3)):
        loaded = read_checkpoint(path)
        assert (loaded.step, loaded.meta["step"], loaded.run_directory) == (step, step, directory)
        assert loaded.config == config
        assert loaded.vocabulary.symbols == corpus.vocabulary.symbols
        assert loaded.meta["corpus_hash"] == corpus.hash
        jax.tree.map(np.testing.assert_array_equal, loaded.params, state.params)
    expected = abstract_params(config.model, corpus.vocabulary.size, config.training.row_length)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)


def test_only_the_newest_are_kept(run):
    assert sorted(path.name for path in (run[0] / "checkpoints").iterdir() if path.is_dir()) == ["12", "3"]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_state_is_restored_onto_any_mesh(run, num_devices):
    directory, config, corpus, state = run
    abstract = abstract_state(config, corpus.vocabulary.size, make_mesh(num_devices, 8))
    restored = restore_state(directory, 12, abstract)
    assert len(restored.params["embedding"].sharding.device_set) == num_devices
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)


def test_arrays_may_be_overwritten_while_they_are_being_saved(run, tmp_path):
    _, config, corpus, _ = run
    everywhere = replicated(make_mesh(1, 8))
    state = {"x": jax.device_put(jnp.zeros(2**23), everywhere)}
    overwrite = jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, state, describe(config, corpus, 1, 0.0))
        for _ in range(20):
            state = overwrite(state)
    abstract = with_sharding({"x": jax.ShapeDtypeStruct((2**23,), jnp.float32)}, everywhere)
    assert not np.any(restore_state(tmp_path, 1, abstract)["x"])


def test_no_such_directory_and_no_checkpoint_inside(tmp_path, copy):
    with pytest.raises(UserError, match="nowhere: no such run directory"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="7: no such run directory or checkpoint"):
        read_checkpoint(copy / "checkpoints" / "7")
    with pytest.raises(UserError, match="no checkpoint here"):
        read_checkpoint(tmp_path)
    shutil.rmtree(copy / "checkpoints" / "12")
    shutil.move(copy / "checkpoints" / "3", copy / "checkpoints" / "3.orbax-checkpoint-tmp")
    with pytest.raises(UserError, match="no checkpoint here"):
        read_checkpoint(copy)


@pytest.mark.parametrize("damage", ["meta", "state", "array", "empty"])
def test_a_damaged_checkpoint_is_named(copy, damage):
    step = copy / "checkpoints" / "12"
    if damage == "array":
        # The arrays themselves: cut every data file short.
        for path in step.rglob("*"):
            if path.is_file() and "/d/" in path.as_posix():
                path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        shutil.rmtree(step)
        step.mkdir()
    else:
        shutil.rmtree(step / damage)
    with pytest.raises(UserError, match="checkpoints/12: the checkpoint is damaged") as caught:
        read_checkpoint(copy)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused(copy):
    [file] = [path for path in (copy / "checkpoints" / "12" / "meta").iterdir() if "format_version" in path.read_text()]
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(UserError, match="checkpoint format 99, this tcc_jax reads 1"):
        read_checkpoint(copy)


def test_another_vocabulary_is_refused(copy):
    vocabulary = Vocabulary.read(copy / "genes.tsv")
    symbols = (*vocabulary.symbols[:-1], "TP53")
    other = Vocabulary(symbols, vocabulary.hgnc_ids, vocabulary.counts)
    other.write(copy / "genes.tsv")
    with pytest.raises(UserError, match="trained on the vocabulary") as caught:
        read_checkpoint(copy)
    assert vocabulary.hash[:12] in str(caught.value)
    assert other.hash[:12] in str(caught.value)
    (copy / "genes.tsv").unlink()
    with pytest.raises(UserError, match=r"genes\.tsv: no such file"):
        read_checkpoint(copy)
