"""The measured run is the plain one, and what it is said to have seen is counted."""

import json
import os

import jax
import numpy as np
import pytest

from benchmarks import speedrun, speedrun_pytorch
from benchmarks.device_spectral import device_vectors
from benchmarks.speedrun import Run, count_seen, first_points, is_due, remembered, table, write_start
from tcc_jax.config import read_toml
from tcc_jax.corpus.loader import BatchSource
from tcc_jax.corpus.spectral import spectral_vectors
from tcc_jax.corpus.store import open_corpus
from tcc_jax.runs.checkpoint import read_checkpoint
from tcc_jax.training.loop import train
from tests.training.corpora import write_small_corpus
from tests.training.runs import config_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(write_small_corpus(tmp_path_factory.mktemp("speedrun") / "corpus"))


def of_start(name, **sections):
    config = config_of(*name, objective={"cut_points": 2, "spectral_start": True}, **sections)
    assert config.model.dropout
    return config


def test_the_measured_run_has_the_bits_of_the_plain_one_and_keeps_one_checkpoint(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun, "measure", lambda *_: {"hidden_significant": 1})
    config = of_start((corpus.path, tmp_path / "measured"))
    seconds = write_start(config, corpus, tmp_path / "start")
    run = Run(config, corpus, None, seconds)
    run.measure(read_checkpoint(tmp_path / "start"))
    run.train(tmp_path / "start", 2, None)
    assert [point["step"] for point in run.points] == [0, 2, 4, 6, 8, 10]
    times = [point["seconds"] for point in run.points]
    assert times[0] == 0
    assert times == sorted(times)
    assert run.points[1]["seconds_with_start"] == pytest.approx(times[1] + seconds, abs=0.02)
    assert os.listdir(tmp_path / "measured" / "checkpoints") == ["10"]
    train(of_start((corpus.path, tmp_path / "plain")))
    measured, plain = (read_checkpoint(tmp_path / name).params for name in ("measured", "plain"))
    # The start has been an export, which leaves the padding of the vocabulary out.
    for params in (measured, plain):
        params |= {name: params[name][: corpus.vocabulary.size] for name in ("embedding", "output_bias")}
    jax.tree.map(np.testing.assert_array_equal, measured, plain)


def test_a_run_out_of_time_stops_where_it_is(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun, "measure", lambda *_: {})
    config = of_start((corpus.path, tmp_path / "run"))
    run = Run(config, corpus, None, write_start(config, corpus, tmp_path / "start"))
    run.measure(read_checkpoint(tmp_path / "start"))
    run.train(tmp_path / "start", 2, until=0.0)
    assert 2 <= read_checkpoint(tmp_path / "run").step < 10


def test_vectors_made_on_a_device_are_those_of_the_host_but_for_a_rotation(corpus, monkeypatch):
    monkeypatch.setattr("benchmarks.device_spectral._SETS_AT_ONCE", 16)
    found, expected = device_vectors(corpus, 12, iterations=100), spectral_vectors(corpus, 12)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)
    assert not device_vectors(corpus, 128, iterations=1)[:, 56:].any()


@pytest.mark.parametrize("cut_points", [0, 2])
def test_what_was_seen_is_what_the_batches_hold(corpus, tmp_path, cut_points):
    config = config_of(corpus.path, tmp_path, objective={"cut_points": cut_points}, training={"batch_rows": 1})
    source = BatchSource(config, corpus, "train")
    epoch = source.plan.num_rows
    seen, batches = count_seen(config, corpus), [source[step] for step in range(epoch)]
    assert seen(0) == (0, 0, 0)
    found = seen(epoch)
    assert found.sets == sum(int((batch["gene_counts"] > 0).sum()) for batch in batches) == len(corpus.indices("train"))
    assert found.tokens == sum(int((batch["segments"] > 0).sum()) for batch in batches)
    assert seen(2 * epoch) == (2 * found.sets, 2 * found.tokens, 2 * found.flops)


def test_steps_are_measured_a_quarter_apart_and_the_last_one_too():
    last, measured = 0, []
    for step in range(100, 6001, 100):
        if is_due(step, 6000, last):
            last = step
            measured.append(step)
    assert measured[:6] == [100, 200, 300, 400, 500, 700]
    assert measured[-1] == 6000
    assert len(measured) == 15


def test_marks_are_of_significant_sets_and_of_recall():
    values = {"hidden_recall": 0.2, "recorded_significant": 900, "recorded_recall": 0.3}
    points = [
        {"step": step, "seconds": 1.0, "seconds_with_start": 3.0, "sets": 5, "flops": 1e9, **values, **new}
        for step, new in enumerate([{"hidden_significant": 650}, {"hidden_significant": 905, "recorded_recall": 0.41}])
    ]
    marks = first_points(points)
    assert [mark["point"] and mark["point"]["step"] for mark in marks] == [1, 1, None, None, None, 1]
    record = {"marks": marks, "points": points, "device": "cpu", "start_seconds": 2.0, "wall_seconds": 9.0}
    text = table(record).splitlines()
    assert text[2] == "| 660 significant, the hidden count | 1 | 1.0 | 3.0 | 5 | 1e+09 |"
    assert text[4].endswith("not reached | - | - | - | - |")
    json.dumps(record)


def test_the_same_batch_is_scored_once():
    asked = []

    def scorer(visible):
        asked.append(visible)
        return [[float(len(ids))] for ids in visible]

    score = remembered(scorer)
    one, two = [np.array([16, 17])], [np.array([16]), np.array([17])]
    for _ in range(2):
        np.testing.assert_array_equal(score(one), [[2.0]])
        np.testing.assert_array_equal(score(two), [[1.0], [1.0]])
    assert len(asked) == 2


@pytest.mark.parametrize("order", ["file", "shuffled"])
def test_pytorch_takes_no_file_order_from_an_unpacked_corpus(order, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "open_corpus", lambda path: Unpacked())
    text = f'[data]\ngene_order = "{order}"\n[model]\nposition = "learned"\n'
    text += '[objective]\nkind = "next-gene"\nfrequency_bias = false\n'
    (tmp_path / "run.toml").write_text(text)
    files = [word for name in ("gmt", "drawn-counts", "out") for word in (f"--{name}", str(tmp_path / "no"))]
    monkeypatch.setattr("sys.argv", ["speedrun_pytorch", str(tmp_path / "run.toml"), *files])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
    with pytest.raises((SystemExit, AttributeError)):
        speedrun_pytorch.main()
    assert ("in the order of their ids" in capsys.readouterr().err) == (order == "file")


class Unpacked:
    """A corpus of which only the description is looked at."""

    path, meta = "corpus", {"packed_from": "0" * 64}


def test_the_pytorch_side_takes_its_configuration():
    config = read_toml("configs/speedrun_pytorch.toml")
    assert config.data.gene_order == "shuffled"
    for field, wanted in speedrun_pytorch._WANTED.items():
        section, name = field.split(".")
        assert getattr(getattr(config, section), name) == wanted
