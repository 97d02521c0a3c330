"""`python -m tcc_jax.export`: what it writes opens without Orbax, and like a checkpoint."""

import dataclasses
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import tcc_jax
from tcc_jax import export
from tcc_jax.corpus.store import open_corpus
from tcc_jax.runs.checkpoint import describe, read_checkpoint
from tcc_jax.runs.exports import write_export
from tcc_jax.runs.saving import CheckpointWriter
from tcc_jax.terminal import UserError
from tcc_jax.training.state import create_state, frequency_bias
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config, small_mesh


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    corpus = open_corpus(write_small_corpus(folder / "corpus"))
    config = small_config(run={"directory": str(folder / "run")}, model={"position": "learned"})
    bias_V = frequency_bias(corpus.vocabulary.counts, 49)
    state = create_state(config, corpus.vocabulary.size, bias_V, small_mesh(1))
    (folder / "run").mkdir()
    corpus.vocabulary.write(folder / "run" / "genes.tsv")
    with CheckpointWriter(folder / "run", keep=2) as writer:
        writer.save(3, state, describe(config, corpus, 3, 1.5))
    return folder / "run"


def run_export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tcc_jax.export", *map(str, arguments)])
    export.main()


def test_an_export_opens_like_its_checkpoint(run, tmp_path, monkeypatch, capsys):
    run_export(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: step 3, float32\n"
    files = ["config.json", "genes.tsv", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    checkpoint, exported = read_checkpoint(run), read_checkpoint(tmp_path / "out")
    assert (exported.step, exported.config, exported.run_directory) == (3, checkpoint.config, tmp_path / "out")
    assert exported.vocabulary.hash == checkpoint.vocabulary.hash
    size = checkpoint.vocabulary.size

    def equal(path, array, other):
        name = jax.tree_util.keystr(path)
        assert array.shape == other.shape and array.dtype == other.dtype
        rows = size if name in ("['embedding']", "['output_bias']") else len(array)
        np.testing.assert_array_equal(array[:rows], other[:rows], err_msg=name)

    jax.tree.map_with_path(equal, checkpoint.params, exported.params)
    prompt = ["GENE00", "GENE07", "GENE03"]
    assert tcc_jax.load(str(tmp_path / "out")).complete(prompt) == tcc_jax.load(str(run)).complete(prompt)


def test_the_arrays_have_the_documented_names_and_shapes(run, tmp_path, monkeypatch):
    run_export(monkeypatch, "--checkpoint", run / "checkpoints" / "3", "--out", tmp_path / "out")
    arrays = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    size = len((tmp_path / "out" / "genes.tsv").read_text().splitlines()) - 1
    square = {f"blocks.0.attention.{name}.kernel": (16, 16) for name in ("query", "key", "value", "output")}
    assert {name: array.shape for name, array in arrays.items()} == square | {
        "embedding": (size, 16),
        "output_bias": (size,),
        "position_embedding": (32, 16),
        "final_norm.scale": (16,),
        "blocks.0.attention_norm.scale": (16,),
        "blocks.0.feed_forward_norm.scale": (16,),
        "blocks.0.feed_forward.expand.kernel": (16, 64),
        "blocks.0.feed_forward.contract.kernel": (64, 16),
    }
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (description["format"], description["format_version"], description["step"]) == ("tcc_jax export", 1, 3)
    assert description["config"]["model"]["width"] == 16


def test_bfloat16_halves_the_size_and_rounds(run, tmp_path, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        run_export(monkeypatch, "--checkpoint", run, "--out", tmp_path / dtype, "--dtype", dtype)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert sizes[0] > 1.7 * sizes[1]
    full, half = (read_checkpoint(tmp_path / dtype).params["embedding"] for dtype in ("float32", "bfloat16"))
    rounded = np.asarray(full).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(half, rounded)


def test_int8_quarters_the_size_and_keeps_each_row_within_half_a_step(run, tmp_path, monkeypatch, capsys):
    checkpoint = read_checkpoint(run)
    embedding = np.array(checkpoint.params["embedding"])
    random = np.random.default_rng(0)
    # No value here is like another: a row of zeros, one value alone, and rows over many powers of ten.
    embedding[17], embedding[18] = 0, np.eye(1, 16, 3) * -2
    embedding[19:40] = random.normal(size=(21, 16)) * 10.0 ** random.integers(-12, 12, (21, 1))
    changed = checkpoint.params | {"embedding": jax.numpy.asarray(embedding)}
    write_export(dataclasses.replace(checkpoint, params=changed), tmp_path / "out", "int8")
    arrays = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    size = checkpoint.vocabulary.size
    read = read_checkpoint(tmp_path / "out").params

    def within_half_a_step(path, array, found):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows = size if name in ("embedding", "output_bias") else len(array)
        array, found = np.asarray(array[:rows]), np.asarray(found[:rows])
        assert found.dtype == np.float32 and found.shape == array.shape
        if array.ndim == 1:
            assert name + ".row_scale" not in arrays
            np.testing.assert_array_equal(found, array, err_msg=name)
            return
        q, scale = arrays[name], arrays[name + ".row_scale"]
        assert (q.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (rows,)) and q.min() >= -127
        np.testing.assert_array_equal(scale, np.abs(array).max(axis=1) / np.float32(127), err_msg=name)
        step = scale.astype(np.float64)[:, None]
        assert (np.abs(array - q * step) <= step / 2).all(), name
        # Their product, in float32, is what is used.
        np.testing.assert_allclose(found, q * step, rtol=1e-6, atol=0)

    jax.tree.map_with_path(within_half_a_step, changed, read)
    assert not read["embedding"][17].any() and arrays["embedding.row_scale"][17] == 0
    np.testing.assert_array_equal(arrays["embedding"][18], np.eye(1, 16, 3)[0] * -127)

    for dtype in ("float32", "int8"):
        run_export(monkeypatch, "--checkpoint", run, "--out", tmp_path / dtype, "--dtype", dtype)
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'int8'}: step 3, int8\n")
    sizes = [sum(array.nbytes for array in arrays_of(tmp_path / dtype).values()) for dtype in ("float32", "int8")]
    # The vectors, and one number for each sixteen, keep this small model above a quarter.
    assert sizes[0] > 2.5 * sizes[1]
    prompt = ["GENE00", "GENE07", "GENE03"]
    small, full = (tcc_jax.load(tmp_path / dtype).complete(prompt, 30) for dtype in ("int8", "float32"))
    shares = [{one.symbol: one.probability for one in found} for found in (small, full)]
    assert len(small) == 30 and shares[0] == pytest.approx(shares[1], rel=0.02)


def arrays_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_what_read_exports_before_int8_reads_the_others_and_refuses_it(run, tmp_path, monkeypatch):
    for dtype, version in (("float32", 1), ("bfloat16", 1), ("int8", 2)):
        run_export(monkeypatch, "--checkpoint", run, "--out", tmp_path / dtype, "--dtype", dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["format_version"] == version


def edit(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_model(out, **change):
    config = json.loads((out / "config.json").read_text())["config"]
    edit(out / "config.json", {"config": config | {"model": config["model"] | change}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is not as it was written"),
        (lambda out: (out / "config.json").write_text("{"), "not the description of an export"),
        (lambda out: edit(out / "config.json", {"format_version": 9}), "of format 9 in float32, this tcc_jax reads"),
        (lambda out: edit(out / "config.json", {"dtype": "int4"}), "of format 1 in int4, this tcc_jax reads"),
        (
            lambda out: edit(out / "config.json", {"dtype": "int8", "format_version": 2}),
            r"blocks.*kernel.row_scale is no such array in model.safetensors, and \(16,\) by config.json",
        ),
        (lambda out: edit(out / "config.json", {"vocabulary_hash": "0" * 64}), "genes.tsv is not as it was written"),
        (
            lambda out: edit_model(out, width=8),
            r"blocks.0.* is \(16, 16\) in model.safetensors, and \(8, 8\) by",
        ),
        (
            lambda out: edit_model(out, num_layers=2),
            "blocks.1.* is no such array in model.safetensors, and",
        ),
        (lambda out: edit_model(out, position="none"), "position_embedding is .*, and no such array by config.json"),
    ],
)
def test_a_damaged_export_is_named(run, tmp_path, monkeypatch, damage, words):
    run_export(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        read_checkpoint(tmp_path / "out")


def test_a_damaged_int8_export_is_named(run, tmp_path, monkeypatch):
    run_export(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out", "--dtype", "int8")
    description = (tmp_path / "out" / "config.json").read_text()
    for change, words in (
        ({"format_version": 1}, "of format 1 in int8, this tcc_jax reads"),
        ({"dtype": "float32", "format_version": 1}, r"row_scale is \(.*\) in .*, and no such array by config.json"),
    ):
        edit(tmp_path / "out" / "config.json", change)
        with pytest.raises(UserError, match=words):
            read_checkpoint(tmp_path / "out")
        (tmp_path / "out" / "config.json").write_text(description)
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors is not as it was written"):
        read_checkpoint(tmp_path / "out")


def test_a_mistake_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "corpus.json").write_text("")
    for arguments, words in (
        (["--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "out"], "nowhere: no such run directory"),
        (["--checkpoint", run, "--out", tmp_path / "full"], "already exists"),
        (["--checkpoint", run, "--out", tmp_path / "full", "--overwrite"], "holds no model.safetensors"),
        (["--checkpoint", run, "--out", tmp_path / "out", "--dtype", "float64"], "--dtype"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_export(monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
