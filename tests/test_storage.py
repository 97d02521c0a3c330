"""Paths of this machine and of a bucket do the same, and whatever is wrong with a bucket is told in one line."""

import hashlib
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tcc_jax.files import atomic_folder, sha256
from tcc_jax.storage import (
    absolute,
    as_path,
    check_bucket,
    copy_file,
    files_in,
    is_remote,
    names_in,
    on_this_machine,
    remove_folder,
    rename_folder,
    replace_text,
)
from tcc_jax.terminal import UserError
from tests.fake_gcs import empty_bucket

FILES = {"a/one": b"1", "a/b/two": b"22", "a/b/c/three": b"333", "ab/four": b"4444"}


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    """Return a folder with `FILES` in it."""
    if request.param == "bucket":
        fake = empty_bucket()
        for name, content in FILES.items():
            fake.write(f"folder/{name}", content)
        # As the console makes folders.
        fake.write("folder/a/", b"")
        return as_path("gs://bucket/folder")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_folder_is_listed_renamed_and_removed(folder):
    assert sorted(names_in(folder)) == ["a", "ab"]
    assert sorted(names_in(folder / "a")) == ["b", "one"]
    assert names_in(folder / "nowhere") == []
    found = files_in(folder / "a")
    assert {name: file.bytes for name, file in found.items()} == {"one": 1, "b/two": 2, "b/c/three": 3}
    assert all(file.md5 in (None, hashlib.md5(FILES[f"a/{name}"]).hexdigest()) for name, file in found.items())
    assert files_in(folder / "nowhere") == {}
    rename_folder(folder / "a" / "b", folder / "a" / "b.damaged")
    assert sorted(files_in(folder)) == ["a/b.damaged/c/three", "a/b.damaged/two", "a/one", "ab/four"]
    remove_folder(folder / "a")
    assert list(files_in(folder)) == ["ab/four"]


def test_a_file_is_copied_here_and_hashed(folder, tmp_path):
    sizes = []
    copy_file(folder / "a" / "b" / "two", tmp_path / "copy", sizes.append)
    assert ((tmp_path / "copy").read_bytes(), sum(sizes)) == (b"22", 2)
    assert sha256(folder / "a" / "one") == hashlib.sha256(b"1").hexdigest()
    with on_this_machine(folder / "a", "one") as copy:
        assert (copy / "one").read_bytes() == b"1"
    assert is_remote(folder) == (not copy.exists())
    if is_remote(folder):
        with pytest.raises(UserError, match="gs://bucket/folder/none: no such file"), on_this_machine(folder, "none"):
            pass


def test_what_others_write_is_seen_at_once():
    fake = empty_bucket()
    folder = as_path("gs://bucket/folder")
    assert names_in(folder) == [] and not (folder / "x").exists()
    fake.write("folder/x", b"x")
    assert names_in(folder) == ["x"] and (folder / "x").exists()


def test_a_path_of_a_bucket_survives_pathlib():
    empty_bucket()
    for path in ("gs://bucket/run", Path("gs://bucket/run"), as_path("gs://bucket/run")):
        assert str(as_path(path)) == "gs://bucket/run"
        assert is_remote(path)
    assert absolute(as_path("gs://bucket/run")).parent == as_path("gs://bucket")
    assert as_path("a/b") == Path("a/b") and not is_remote("a/b")
    assert absolute(Path("a")) == Path.cwd() / "a"


def test_other_addresses_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/run: must be a path of this machine or gs://BUCKET/FOLDER"):
        as_path("s3://bucket/run")
    with pytest.raises(UserError, match="must be gs://BUCKET/FOLDER"):
        as_path("gs://")
    with (
        pytest.raises(UserError, match="gs://bucket/out: must be a folder of this machine"),
        atomic_folder("gs://bucket/out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_missing_package_is_named():
    code = "import sys; sys.modules['gcsfs'] = None; from tcc_jax.storage import as_path; as_path('gs://bucket/run')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'UserError: gs:// paths need another package: pip install "tcc-jax[gcs]"' in result.stderr


def test_a_bucket_that_cannot_be_used_is_named():
    fake = empty_bucket()
    check_bucket(as_path("gs://bucket/run"))
    with pytest.raises(UserError, match="gs://missing/run: there is no bucket missing"):
        check_bucket(as_path("gs://missing/run"))
    for status, words in ((403, "Forbidden.*check your permissions"), (401, "401.*check your permissions")):
        fake.fail = lambda method, path, status=status: status
        with pytest.raises(UserError, match=f"gs://bucket/run: the bucket cannot be listed: .*{words}") as caught:
            check_bucket(as_path("gs://bucket/run"))
        assert "\n" not in str(caught.value)


def test_an_error_that_passes_is_no_error():
    fake = empty_bucket()
    answers = iter([503])
    fake.fail = lambda method, path: next(answers, None)
    check_bucket(as_path("gs://bucket/run"))
    assert len(fake.requests) == 2


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, durable):
    path = tmp_path / "status.json"
    replace_text(path, "old", durable=durable)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            replace_text(path, "longer", durable=durable)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert caught.value.filename == str(path)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("status.json", "old")]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("link", "elsewhere/old"), ("dangling", "elsewhere/new")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "elsewhere/old").write_text("old")
    replace_text(tmp_path / "link", "1")
    replace_text(tmp_path / "dangling", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert {file.name: file.read_text() for file in (tmp_path / "elsewhere").iterdir()} == {"old": "1", "new": "2"}


def test_a_pipe_is_written_to_and_stays(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    (tmp_path / "link").symlink_to(path)
    for name in ("pipe", "link"):
        found = []
        reader = threading.Thread(target=lambda found=found: found.append(path.read_text()), daemon=True)
        reader.start()
        replace_text(tmp_path / name, "through")
        reader.join(10)
        assert found == ["through"] and path.is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]
