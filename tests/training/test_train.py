"""`python -m tcc_jax.train`: one line for a mistake, and no wait for JAX before it."""

import contextlib
import os
import subprocess
import sys

import pytest

from tcc_jax import train
from tcc_jax.terminal import UserError, command, log
from tests.training.corpora import write_small_corpus


def run(*arguments, cwd, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "tcc_jax.train", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_help_lists_every_field_and_its_meaning(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for words in ("--model.num-layers", "Transformer blocks.", "--checkpoint.every-steps", "--mesh.data"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the first argument must be the TOML file of a run"),
        (["missing.toml"], "missing.toml: cannot read the configuration: No such file"),
        (["run.toml", "--model.num-layer", "3"], "--model.num-layers"),
        (["run.toml", "--model.dropout", "2"], "model.dropout = 2.0: must lie between 0 and 0.99"),
    ],
)
def test_a_mistake_is_one_line_and_jax_is_never_imported(arguments, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text('[run]\ndirectory = "run"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tcc_jax.train", *arguments])
    # Importing the loop would import jax: let it fail loudly.
    monkeypatch.setitem(sys.modules, "tcc_jax.training.loop", None)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_from_its_toml_with_an_override(tmp_path):
    write_small_corpus(tmp_path / "corpus")
    (tmp_path / "run.toml").write_text(
        """
        [data]
        corpus = "corpus"
        [model]
        num_layers = 1
        width = 16
        num_heads = 2
        matmul_dtype = "float32"
        [training]
        steps = 5
        batch_rows = 8
        row_length = 32
        segments_per_row = 4
        [mesh]
        data = 1
        """
    )
    environment = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = ("run.toml", "--run.directory", "here", "--training.steps", 2)
    result = run(*arguments, cwd=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "49 training sets" in result.stderr
    assert (tmp_path / "here" / "checkpoints" / "2").is_dir()
    # The next run finds what this one compiled.
    assert list((tmp_path / "cache" / "tcc_jax" / "compilations").glob("jit_train_step-*"))
    bad = run("run.toml", "--run.directory", "there", "--mesh.data", 3, cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr == "error: training.batch_rows = 8: must be a multiple of the 3 devices of mesh.data\n"
    assert not (tmp_path / "there").exists()


def test_a_message_that_cannot_be_printed_ends_nothing(monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        log("No space left on device")
        with pytest.raises(SystemExit) as stop:
            command(lambda: (_ for _ in ()).throw(UserError("mistake")))()
    assert stop.value.code == 2
