"""Where copies, fits and compilations are kept."""

import os

from tcc_jax.files import cache_folder, keep_compilations


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tcc_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tcc_jax"


def test_compilations_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    # Set first, so that what the function adds is undone too.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    keep_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "theirs"
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "3"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "tcc_jax" / "compilations")
