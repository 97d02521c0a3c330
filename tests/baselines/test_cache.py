import numpy as np
import pytest

from tcc_jax.baselines.cache import cached


def fits(values):
    calls = []

    def fit():
        calls.append(1)
        return {"x": np.array(values), "y": np.arange(3, dtype=np.float32)}

    return fit, calls


def test_fitted_once_for_the_same_settings(tmp_path):
    fit, calls = fits([1, 2])
    first = cached(tmp_path / "deep", "name", {"corpus": "a", "n": 3}, fit)
    again = cached(tmp_path / "deep", "name", {"n": 3, "corpus": "a"}, fit)
    assert len(calls) == 1 and set(first) == set(again) == {"x", "y"}
    assert again["x"].tolist() == [1, 2] and again["y"].dtype == np.float32
    cached(tmp_path / "deep", "name", {"corpus": "b", "n": 3}, fit)
    assert len(calls) == 2 and len(list((tmp_path / "deep").iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_a_damaged_file_is_fitted_again(tmp_path, capsys, damage):
    fit, calls = fits([1])
    cached(tmp_path, "name", {}, fit)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    assert cached(tmp_path, "name", {}, fit)["x"].tolist() == [1]
    assert len(calls) == 2 and "damaged" in capsys.readouterr().err
    assert cached(tmp_path, "name", {}, fit)["x"].tolist() == [1] and len(calls) == 2


def test_what_cannot_be_kept_is_still_returned(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    fit, calls = fits([1])
    assert cached(tmp_path / "file" / "deep", "name", {}, fit)["x"].tolist() == [1] and len(calls) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("cannot be kept for the next time: Not a directory")


def test_a_failed_fit_leaves_nothing(tmp_path):
    with pytest.raises(MemoryError):
        cached(tmp_path / "new", "name", {}, lambda: (_ for _ in ()).throw(MemoryError))
    assert not (tmp_path / "new").exists()
