"""`python -m tcc_jax.prepare` as a user runs it, wrong input included."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcc_jax.corpus.store import open_corpus
from tcc_jax.files import atomic_folder
from tests.corpus.corpora import random_sets, write_gmt_file


def prepare(*arguments, **settings):
    command = [sys.executable, "-m", "tcc_jax.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **settings)


@pytest.fixture
def gmt(tmp_path):
    return write_gmt_file(tmp_path / "lib.gmt", random_sets())


def assert_one_line_error(done, *words):
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0]


def test_prints_counts_and_leaks(gmt, tmp_path):
    done = prepare("--gmt", gmt, "--out", tmp_path / "deep" / "corpus")
    assert done.returncode == 0, done.stderr
    assert "mentions" in done.stdout and "leaks" in done.stdout
    assert open_corpus(tmp_path / "deep" / "corpus").num_sets > 0


def test_existing_output_needs_overwrite(gmt, tmp_path):
    assert prepare("--gmt", gmt, "--out", tmp_path / "c").returncode == 0
    before = open_corpus(tmp_path / "c").hash
    assert_one_line_error(prepare("--gmt", gmt, "--out", tmp_path / "c"), tmp_path / "c", "--overwrite")
    assert prepare("--gmt", gmt, "--out", tmp_path / "c", "--seed", 1, "--overwrite").returncode == 0
    assert open_corpus(tmp_path / "c").hash != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_overwrite_is_for_results_alone(gmt, tmp_path):
    words = (gmt.parent, "not overwritten", "corpus.json")
    # Neither somebody's data nor what another command wrote.
    for name in ("mine.txt", "report.json", "model.safetensors"):
        (gmt.parent / name).write_text("")
        assert_one_line_error(prepare("--gmt", gmt, "--out", gmt.parent, "--overwrite"), *words)
    assert gmt.exists()


def test_output_through_a_link(gmt, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert prepare("--gmt", gmt, "--out", tmp_path / "link").returncode == 0
    assert (tmp_path / "link").is_symlink() and open_corpus(tmp_path / "real").num_sets > 0


def test_a_repeated_flag_is_an_error(gmt, tmp_path):
    done = prepare("--gmt", gmt, "--gmt", gmt, "--out", tmp_path / "out")
    assert_one_line_error(done, "--gmt: given twice")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_preparation_leaves_nothing(tmp_path, number):
    fifo = tmp_path / "slow.gmt"
    os.mkfifo(fifo)  # never written to: the command waits for it until the signal
    command = [sys.executable, "-m", "tcc_jax.prepare", "--gmt", fifo, "--out", tmp_path / "new" / "out"]
    # Tests that run under nohup would pass on that SIGHUP is ignored.
    default = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    while not (tmp_path / "new").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["new", ".out."])
def test_a_signal_while_folders_are_made_leaves_nothing(tmp_path, monkeypatch, name):
    make = Path.mkdir

    def make_and_be_interrupted(folder, *arguments, **options):
        make(folder, *arguments, **options)
        if folder.name.startswith(name):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", make_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new" / "out"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "no such file"), (b"", "no usable"), (b"\x00\x01binary", "binary"), (b"one\ntwo\n", "three columns")],
)
def test_bad_gmt(tmp_path, content, word):
    path = tmp_path / "bad.gmt"
    if content is not None:
        path.write_bytes(content)
    assert_one_line_error(prepare("--gmt", path, "--out", tmp_path / "new" / "out"), path, word)
    assert not (tmp_path / "new").exists()


def test_bad_hgnc_table(gmt, tmp_path):
    table = tmp_path / "table.tsv"
    table.write_text("gene\tname\nTP53\ttumor protein\n")
    assert_one_line_error(prepare("--gmt", gmt, "--out", tmp_path / "out", "--hgnc", table), table, "not an HGNC table")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--gmt", "--holdout", "--hgnc", "--out"])
def test_an_empty_path_is_not_the_current_folder(gmt, tmp_path, flag):
    others = [word for pair in {"--gmt": gmt, "--out": tmp_path / "out"}.items() if pair[0] != flag for word in pair]
    assert_one_line_error(prepare(flag, "", *others, cwd=tmp_path), "a path on the command line is empty")


def test_wrong_flag_is_one_line(gmt, tmp_path):
    done = prepare("--gmt", gmt, "--out", tmp_path / "out", "--min-gene", 3)
    assert_one_line_error(done, "--min-gene")
    done = prepare("--gmt", gmt, "--out", tmp_path / "out", "--min-genes", "three")
    assert_one_line_error(done, "--min-genes", "three")


def test_output_in_a_place_that_cannot_be_written(gmt, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line_error(prepare("--gmt", gmt, "--out", tmp_path / "file" / "out"), tmp_path / "file" / "out")
    assert_one_line_error(prepare("--gmt", gmt, "--out", tmp_path / "file"), tmp_path / "file", "is a file")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert_one_line_error(prepare("--gmt", gmt, "--out", tmp_path / "closed" / "out"), "closed")


@pytest.mark.parametrize("kibibytes", [2, 10])  # in genes.tsv, and in the middle of an array
def test_full_output_leaves_nothing(gmt, tmp_path, kibibytes):
    # A limit on the size of files stands in for a full disk: both fail in the middle of a write.
    limited = ["bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash"]
    command = [*limited, sys.executable, "-m", "tcc_jax.prepare", "--gmt", gmt, "--out", tmp_path / "new" / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_one_line_error(done, tmp_path / "new" / "out", "cannot write")
    assert not (tmp_path / "new").exists()
