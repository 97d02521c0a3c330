"""A run whose directory and corpus lie in a bucket: the same bits as one of this machine, whatever happens to it."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tcc_jax.corpus.store import open_corpus
from tcc_jax.runs.checkpoint import find_checkpoint, read_checkpoint, restore_state
from tcc_jax.runs.exports import write_export
from tcc_jax.runs.saving import whole_steps
from tcc_jax.storage import as_path
from tcc_jax.terminal import UserError
from tcc_jax.training.loop import train
from tcc_jax.training.state import abstract_state
from tests.fake_gcs import empty_bucket
from tests.training.runs import small_config, small_mesh

RUN = "gs://bucket/runs/one"
KEEP = {"every_steps": 2, "keep": 2}


@pytest.fixture(scope="module")
def local(corpus, tmp_path_factory):
    """Return a run on this machine that nothing has disturbed."""
    config = config_of(corpus, tmp_path_factory.mktemp("runs") / "one")
    train(config)
    return config


@pytest.fixture(scope="module")
def objects(corpus):
    """Return the objects of a run in a bucket that nothing has disturbed."""
    fake = empty_bucket()
    train(config_of(corpus))
    return fake.buckets["bucket"]


@pytest.fixture
def fake():
    return empty_bucket()


@pytest.fixture
def finished(fake, objects):
    """Return the bucket with a finished run."""
    fake.buckets["bucket"] = dict(objects)
    return fake


def config_of(corpus, directory=RUN, **sections):
    return small_config(
        run={"directory": str(directory)},
        data={"corpus": str(corpus)},
        checkpoint=KEEP | sections.pop("checkpoint", {}),
        **sections,
    )


def state_at(config, step):
    abstract = abstract_state(config, open_corpus(config.data.corpus).vocabulary.size, small_mesh())
    return jax.device_get(restore_state(as_path(config.run.directory), step, abstract))


def numbers_of(config):
    text = (as_path(config.run.directory) / "metrics.jsonl").read_text()
    # The others depend on the clock.
    names = ("step", "loss", "skipped_steps", "learning_rate", "gradient_norm", "epoch", "validation_loss")
    return [{name: line[name] for name in names if name in line} for line in map(json.loads, text.splitlines())]


def assert_same_end(config, other):
    jax.tree.map(np.testing.assert_array_equal, state_at(config, 10), state_at(other, 10))
    assert numbers_of(config) == numbers_of(other)
    assert whole_steps(as_path(config.run.directory)) == whole_steps(as_path(other.run.directory)) == [8, 10]


def test_a_run_in_a_bucket_equals_one_of_this_machine(corpus, local, finished):
    config = config_of(corpus)
    assert_same_end(config, local)
    assert [name for name in finished.names("runs/one/") if "checkpoints" not in name] == [
        f"runs/one/{name}"
        for name in ("config.json", "environment.json", "genes.tsv", "metrics.jsonl", "status.json", "train.log")
    ]
    assert json.loads(finished.read("runs/one/status.json"))["state"] == "finished"
    assert "step 10 is saved" in finished.read("runs/one/train.log").decode()
    loaded, same = read_checkpoint(RUN), read_checkpoint(local.run.directory)
    assert (loaded.step, str(loaded.run_directory)) == (10, RUN)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, same.params)
    assert read_checkpoint(f"{RUN}/checkpoints/8").step == 8


# A write of the arrays, of the record that seals them, of the lines of metrics, and the removal of an old checkpoint.
MOMENTS = [
    ("POST", "/checkpoints/4/state/d/"),
    ("POST", "/checkpoints/6/checkpoint.json"),
    ("DELETE", "/checkpoints/4/state/"),
    ("POST", "/metrics.jsonl"),
]


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(corpus, local, fake, tmp_path):
    config = config_of(corpus)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    main = (
        "import json, sys; from tcc_jax.config import from_dict; from tcc_jax.training.loop import train; "
        "train(from_dict(json.load(open(sys.argv[1]))))"
    )
    for kind, place in MOMENTS:
        process = subprocess.Popen([sys.executable, "-c", main, str(tmp_path / "run.json")])

        def kill(method, path, kind=kind, place=place, process=process):
            if method == kind and place in path:
                process.kill()
                process.wait()
                return 503
            return None

        fake.fail = kill
        assert process.wait(timeout=300) == -9, f"never reached {place}"
        fake.fail = lambda method, path: None
    assert "runs/one/owner.json" in fake.names()
    train(config)
    assert_same_end(config, local)
    assert "runs/one/owner.json" not in fake.names()


def test_a_second_process_is_refused(corpus, finished):
    owner = {"name": "x", "pid": 7, "host": "elsewhere", "machine": "another"}
    finished.write("runs/one/owner.json", json.dumps(owner | {"time": time.time()}).encode())
    beats = iter(range(1, 100))

    def beat(method, path):
        if method == "GET" and path.endswith("/owner.json"):
            content = json.dumps(owner | {"time": time.time() + next(beats)})
            finished.write("runs/one/owner.json", content.encode())

    finished.fail = beat
    with pytest.raises(UserError, match=f"{RUN}: in use by process 7 on elsewhere"):
        train(config_of(corpus))
    assert json.loads(finished.read("runs/one/owner.json"))["name"] == "x"


def flip(fake, name):
    content = bytearray(fake.read(name))
    content[len(content) // 2] ^= 1
    fake.write(name, content)


def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_gone_on_from(corpus, local, finished, capsys):
    name = max(finished.names("runs/one/checkpoints/10/state/"), key=lambda name: len(finished.read(name)))
    flip(finished, name)
    with pytest.raises(UserError, match=r"gs://.*/checkpoints/10: the checkpoint is damaged.*MD5 differs.*last-good"):
        train(config_of(corpus))
    config = config_of(corpus, checkpoint={"resume": "last-good"})
    train(config)
    assert "put aside, going on from step 8" in capsys.readouterr().err
    assert name.replace("/10/", "/10.damaged/") in finished.names()
    assert_same_end(config, local)
    del finished.buckets["bucket"][max(finished.names("runs/one/checkpoints/10/state/"))]
    with pytest.raises(UserError, match=r"checkpoints/10: the checkpoint is damaged: state/.* is missing"):
        read_checkpoint(RUN)


def test_checkpoints_move_between_a_bucket_and_this_machine(local, finished, tmp_path):
    for name in finished.names("runs/one/"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(finished.read(name))
    step, meta = find_checkpoint(tmp_path / "runs" / "one", "latest", print)
    assert step == 10 and all("md5" in file for file in meta["files"].values())
    [*_, path] = sorted((tmp_path / "runs/one/checkpoints/10/state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="MD5 differs"):
        find_checkpoint(tmp_path / "runs" / "one", "latest", print)
    finished.put_folder(as_path(local.run.directory), "moved")
    step, meta = find_checkpoint(as_path("gs://bucket/moved"), "latest", print)
    assert step == 10 and all("sha256" in file for file in meta["files"].values())
    flip(finished, max(finished.names("moved/checkpoints/10/state/"), key=lambda name: len(finished.read(name))))
    with pytest.raises(UserError, match="SHA-256 differs"):
        find_checkpoint(as_path("gs://bucket/moved"), "latest", print)


def test_saves_that_fail_are_told_and_the_run_goes_on(corpus, local, fake, capsys):
    fake.fail = lambda method, path: 403 if path.startswith("/upload") and "/checkpoints/4/" in path else None
    config = config_of(corpus)
    train(config)
    error = capsys.readouterr().err
    assert "step 4 could not be saved" in error and ("403" in error or "Forbidden" in error)
    assert not fake.names("runs/one/checkpoints/4/")
    assert_same_end(config, local)


def test_a_last_save_that_fails_ends_the_run_with_one_line(corpus, local, fake):
    fake.fail = lambda method, path: 507 if method == "POST" and path.endswith("/10/checkpoint.json") else None
    config = config_of(corpus)
    with pytest.raises(UserError, match=f"{RUN}: step 10 could not be saved"):
        train(config)
    assert json.loads(fake.read("runs/one/status.json"))["state"] == "failed"
    fake.fail = lambda method, path: None
    train(config)
    assert_same_end(config, local)


def test_a_mistake_leaves_nothing_in_the_bucket(corpus, fake):
    with pytest.raises(UserError, match="gs://missing/run: there is no bucket missing"):
        train(config_of(corpus, "gs://missing/run"))
    with pytest.raises(UserError, match="no such run directory"):
        train(config_of(corpus, checkpoint={"init_from": "gs://bucket/nowhere"}))
    fake.fail = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(OSError, match=f"^{RUN}/owner.json: cannot be written: Forbidden.*$"):
        train(config_of(corpus))
    fake.fail = lambda method, path: None
    assert fake.names() == []
    fake.write("runs/one/letters.txt", b"mine")
    with pytest.raises(UserError, match="not a run of tcc_jax"):
        train(config_of(corpus))
    assert fake.names() == ["runs/one/letters.txt"]


def test_an_export_in_a_bucket_opens(finished, tmp_path):
    write_export(read_checkpoint(RUN), tmp_path / "export")
    finished.put_folder(tmp_path / "export", "export")
    exported, same = read_checkpoint("gs://bucket/export"), read_checkpoint(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, exported.params, same.params)
    flip(finished, "export/model.safetensors")
    with pytest.raises(UserError, match="gs://bucket/export: the export is damaged"):
        read_checkpoint("gs://bucket/export")
    del finished.buckets["bucket"]["export/genes.tsv"]
    with pytest.raises(UserError, match=r"gs://bucket/export/genes.tsv: no such file"):
        read_checkpoint("gs://bucket/export")


def test_a_run_on_a_corpus_in_a_bucket_is_the_same(corpus, local, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake.put_folder(corpus, "corpora/small")
    config = config_of("gs://bucket/corpora/small", tmp_path / "run")
    train(config)
    assert_same_end(config, local)
    assert os.listdir(tmp_path / "cache" / "tcc_jax" / "corpora") == [open_corpus(corpus).hash]
