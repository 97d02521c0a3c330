"""What is written in the local folder comes to be in the bucket, whole, whatever the bucket does in between."""

import threading

import pytest

from tcc_jax.runs.run_directory import Mirror
from tcc_jax.storage import as_path
from tests.fake_gcs import empty_bucket


@pytest.fixture
def fake():
    return empty_bucket()


@pytest.fixture
def remote(fake):
    return as_path("gs://bucket/run")


def uploads(fake):
    return [path.rpartition("/o/")[2] for method, path in fake.requests if path.startswith("/upload")]


def test_what_is_there_is_fetched_and_only_what_changes_is_copied(fake, remote):
    fake.write("run/train.log", b"one\n")
    fake.write("run/status.json", b"{}")
    mirror = Mirror(remote, ["train.log", "metrics.jsonl"], None, print)
    assert [path.name for path in mirror.local.iterdir()] == ["train.log"]
    mirror.sync()
    assert uploads(fake) == []
    with open(mirror.local / "train.log", "a") as file:
        file.write("two\n")
    (mirror.local / "skipped").mkdir()
    (mirror.local / "skipped" / "batch.npz").write_bytes(b"batch")
    (mirror.local / ".status.json.7.tmp").write_bytes(b"half")
    for _ in range(2):
        mirror.sync()
    assert sorted(uploads(fake)) == ["run/skipped/batch.npz", "run/train.log"]
    assert fake.read("run/train.log") == b"one\ntwo\n"


def test_nothing_is_copied_before_the_first_file_is_there(fake, remote):
    mirror = Mirror(remote, [], "config.json", print)
    (mirror.local / "status.json").write_text("{}")
    mirror.sync()
    assert fake.names() == []
    (mirror.local / "config.json").write_text("{}")
    mirror.sync()
    assert fake.names() == ["run/config.json", "run/status.json"]


def test_failures_are_told_once_and_everything_arrives_in_the_end(fake, remote):
    said, failures = [], threading.Semaphore(0)

    def fail(method, path):
        if path.startswith("/upload"):
            failures.release()
            return 403
        return None

    fake.fail = fail
    with Mirror(remote, [], None, said.append, every_seconds=0.01) as mirror:
        (mirror.local / "status.json").write_text("1")
        for _ in range(3):
            assert failures.acquire(timeout=30)
        with pytest.raises(OSError, match="Forbidden"):
            mirror.sync()
        assert fake.names() == []
        fake.fail = lambda method, path: None
    assert fake.read("run/status.json") == b"1"
    assert len(said) == 1 and said[0].startswith("warning: gs://bucket/run/status.json: cannot be written: Forbidden")
    assert not mirror.local.exists()
