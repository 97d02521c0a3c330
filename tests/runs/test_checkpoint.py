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
from tcc_jax.runs.checkpoint import (
    describe,
    find_checkpoint,
    latest_step,
    read_checkpoint,
    restore_state,
    with_sharding,
)
from tcc_jax.runs.saving import CheckpointWriter, steps_to_keep
from tcc_jax.terminal import UserError
from tcc_jax.training.sharding import replicated
from tcc_jax.training.state import abstract_state, create_state
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config, small_mesh


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run directory with checkpoints of steps 3 and 12, written from a mesh of four devices, and its state."""
    folder = tmp_path_factory.mktemp("run")
    corpus = open_corpus(write_small_corpus(folder / "corpus"))
    config = small_config(run={"directory": str(folder / "run")})
    state = create_state(config, corpus.vocabulary.size, None, small_mesh(4))
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


def test_the_average_of_the_parameters_is_what_is_opened_for_use(run, tmp_path):
    _, _, corpus, _ = run
    config = small_config(optimizer={"ema_decay": 0.9})
    state = create_state(config, corpus.vocabulary.size, None, small_mesh(2))
    state = state._replace(average=jax.tree.map(lambda leaf: leaf + 1, state.params))
    corpus.vocabulary.write(tmp_path / "genes.tsv")
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(1, state, describe(config, corpus, 1, elapsed_seconds=1.5))
    jax.tree.map(np.testing.assert_array_equal, read_checkpoint(tmp_path).params, jax.device_get(state.average))
    restored = restore_state(tmp_path, 1, abstract_state(config, corpus.vocabulary.size, small_mesh(fsdp=4)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_only_the_newest_are_kept(run):
    assert sorted(path.name for path in (run[0] / "checkpoints").iterdir() if path.is_dir()) == ["12", "3"]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_state_is_restored_onto_any_mesh(run, num_devices):
    directory, config, corpus, state = run
    abstract = abstract_state(config, corpus.vocabulary.size, small_mesh(num_devices))
    restored = restore_state(directory, 12, abstract)
    assert len(restored.params["embedding"].sharding.device_set) == num_devices
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)


def test_arrays_may_be_overwritten_while_they_are_being_saved(run, tmp_path):
    _, config, corpus, _ = run
    everywhere = replicated(small_mesh(1))
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


def damage_state(step):
    shutil.rmtree(step / "state")


def cut_an_array(step):
    path = largest_file(step)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(step):
    path = largest_file(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_the_record(step):
    record = json.loads((step / "checkpoint.json").read_text())
    (step / "checkpoint.json").write_text(json.dumps(record | {"step": 11}))


def cut_the_record(step):
    (step / "checkpoint.json").write_text((step / "checkpoint.json").read_text()[:-20])


def unfinish(step):
    (step / "checkpoint.json").unlink()


def largest_file(step):
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = [
    (damage_state, "is missing"),
    (cut_an_array, "bytes, .* were written"),
    (flip_a_bit, "SHA-256 differs"),
    (edit_the_record, "checkpoint.json is not as it was written"),
    (cut_the_record, "checkpoint.json is not a description"),
]


@pytest.mark.parametrize(("damage", "words"), [*DAMAGES, (unfinish, "never finished: checkpoint.json is missing")])
def test_a_damaged_checkpoint_is_named(copy, damage, words):
    damage(copy / "checkpoints" / "12")
    with pytest.raises(UserError, match=f"checkpoints/12: the checkpoint is damaged.*{words}") as caught:
        read_checkpoint(copy / "checkpoints" / "12")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_resuming_goes_past_a_damaged_checkpoint_only_when_asked_to(copy, damage, words):
    damage(copy / "checkpoints" / "12")
    said = []
    with pytest.raises(UserError, match="--resume last-good goes on from the one before"):
        find_checkpoint(copy, "latest", said.append)
    assert said == []
    step, meta = find_checkpoint(copy, "last-good", said.append)
    assert (step, meta["step"]) == (3, 3)
    assert len(said) == 1 and "checkpoints/12" in said[0] and said[0].endswith("going on from step 3")
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["12.damaged", "3"]
    assert latest_step(copy) == 3
    damage(copy / "checkpoints" / "3")
    with pytest.raises(UserError, match="no good checkpoint is left"):
        find_checkpoint(copy, "last-good", said.append)
    assert (copy / "checkpoints" / "3").is_dir()


def test_a_step_that_is_damaged_again_is_put_aside_again(copy, tmp_path):
    good = shutil.copytree(copy / "checkpoints" / "12", tmp_path / "good")
    for _ in range(3):
        flip_a_bit(copy / "checkpoints" / "12")
        assert find_checkpoint(copy, "last-good", lambda message: None)[0] == 3
        shutil.copytree(good, copy / "checkpoints" / "12")
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["12", "12.damaged", "12.damaged-2", "12.damaged-3", "3"]
    assert find_checkpoint(copy, "latest", lambda message: None)[0] == 12


def test_a_save_that_was_cut_off_is_no_checkpoint_and_is_removed(copy):
    unfinish(copy / "checkpoints" / "12")
    assert latest_step(copy) == 3
    with CheckpointWriter(copy, keep=2):
        assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["3"]


def test_which_checkpoints_are_kept():
    recalls = {10: 0.5, 20: 0.7, 30: 0.7, 40: 0.6}
    assert steps_to_keep([10, 20, 30, 40, 50], 1, 0, {}) == {50}
    assert steps_to_keep([10, 20, 30, 40, 50], 2, 0, recalls) == {20, 40, 50}
    assert steps_to_keep([10, 30, 40, 50], 1, 0, recalls) == {30, 50}
    assert steps_to_keep([10, 20, 30, 40, 50], 1, 20, {}) == {20, 40, 50}


def test_another_format_is_refused(copy):
    file = copy / "checkpoints" / "12" / "checkpoint.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(UserError, match="checkpoint format 99, this tcc_jax reads 2; open it with the version"):
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
