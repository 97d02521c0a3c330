"""`python -m tcc_jax.bench`: what it measures, on tiny shapes; and the scripts beside it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import compare_pytorch
from tcc_jax import bench
from tcc_jax.benchmarking import measures, records
from tcc_jax.benchmarking.synthetic import SMALLEST_VOCABULARY, synthetic_corpus
from tcc_jax.corpus.store import open_corpus
from tcc_jax.model.decoder import abstract_params, count_parameters
from tcc_jax.training.flops import flops_per_token
from tests.training.corpora import write_small_corpus
from tests.training.runs import small_config

ROOT = Path(__file__).parent.parent
TINY = (
    *("--vocabulary", 200, "--sets", 300, "--windows", 2, "--steps", 2),
    *("--model.num-layers", 1, "--model.width", 16, "--model.num-heads", 2),
    *("--training.batch-rows", 4, "--training.row-length", 64, "--training.segments-per-row", 8, "--mesh.data", 1),
)
RESULTS = {
    "data": ["useful_tokens_per_second", "sets_per_second", "planning_seconds", "fill", "rows_per_epoch"],
    "train": [
        *("useful_tokens_per_second", "sets_per_second", "step_ms", "mfu", "mfu_segments", "flops_per_token"),
        *("compile_seconds", "data_share", "loss", "memory_bytes", "parameters"),
    ],
    "sample": [
        *("ranker_1_sets_per_second", "sampler_1_genes_per_second"),
        *("ranker_3_sets_per_second", "sampler_3_genes_per_second"),
    ],
    "checkpoint": [
        *("pause_seconds", "save_seconds", "save_gigabytes_per_second", "restore_seconds", "checkpoint_bytes"),
    ],
}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tcc_jax.bench", *map(str, arguments)])
    bench.main()


def error_of(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_random_sets_are_as_long_as_real_ones():
    corpus = synthetic_corpus(36_000, 4_000)
    assert corpus.num_sets == 4_000 and corpus.vocabulary.size == 36_000
    assert np.median(corpus.lengths) == pytest.approx(100, rel=0.05)
    assert corpus.lengths.mean() == pytest.approx(130, rel=0.05)
    assert corpus.lengths.min() >= 5 and 800 < corpus.lengths.max() <= 2_000
    assert all(len(set(corpus.genes(index))) == corpus.lengths[index] for index in range(4_000))
    assert corpus.tokens.min() == 16 and 35_900 < corpus.tokens.max() < 36_000
    counted = np.bincount(corpus.tokens, minlength=36_000)
    np.testing.assert_array_equal(corpus.vocabulary.counts, counted)
    # Of r^(-1/3) the lowest tenth of the ranks holds 0.1^(2/3) of the whole.
    assert counted[16 : 16 + 3_598].sum() / counted.sum() == pytest.approx(0.1 ** (2 / 3), rel=0.03)


def test_random_sets_depend_on_the_arguments_alone():
    one, same, other = (synthetic_corpus(500, 50, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.tokens, same.tokens)
    np.testing.assert_array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.tokens[:100], other.tokens[:100])


def test_the_smallest_vocabulary_still_has_sets():
    corpus = synthetic_corpus(SMALLEST_VOCABULARY, 100)
    assert set(corpus.lengths) == {5}


@pytest.mark.parametrize("measure", RESULTS)
def test_a_measure_writes_what_it_found(measure, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    run(monkeypatch, measure, "--json", file, *TINY, "--batch", 3)
    record = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert list(record["results"]) == RESULTS[measure]
    assert {"measure", "command", "device", "processor", "cores", "load_average", "versions"} <= record.keys()
    assert record["measure"] == measure and record["config"]["model"]["width"] == 16
    assert record.get("attention") == ("xla" if measure == "train" else None)
    assert record["corpus"] == {"hash": "synthetic-200-300-0", "sets": 300, "vocabulary": 200}
    for name, result in record["results"].items():
        assert name in printed
        if isinstance(result, dict):
            assert len(result["windows"]) == 2
            assert 0 < result["min"] <= result["median"] <= result["max"] < math.inf
            assert result["median"] == pytest.approx(sum(result["windows"]) / 2)


def test_training_is_counted_right(monkeypatch):
    corpus = synthetic_corpus(200, 300)
    config = small_config(training={"batch_rows": 4, "row_length": 64, "segments_per_row": 8}, objective={})
    # A step of two seconds, on a device with a peak.
    monkeypatch.setattr(measures, "peak_flops", lambda kind: 1e9)
    monkeypatch.setattr(measures.Trainer, "seconds", trained_in(2.0))
    results = measures.measure_train(config, corpus, windows=2, steps=3)
    batches = measures.train_batches(config, corpus, 9)
    tokens = [sum(int((batch["segments"] > 0).sum()) for batch in part) for part in (batches[3:6], batches[6:9])]
    sets = [sum(int((batch["gene_counts"] > 0).sum()) for batch in part) for part in (batches[3:6], batches[6:9])]
    assert results["step_ms"]["windows"] == [2000, 2000]
    assert results["useful_tokens_per_second"]["windows"] == [count / 6 for count in tokens]
    assert results["sets_per_second"]["windows"] == [count / 6 for count in sets]
    # By hand: the last batch that `trained_in` takes, every cut point of its sets scored.
    cuts = config.objective.cut_points * (batches[6]["gene_counts"] > 0).sum()
    scored = cuts / (batches[6]["segments"] > 0).sum()
    plain = flops_per_token(config, 200, None, scored)
    assert results["mfu"]["windows"] == pytest.approx([n / 6 * plain / 1e9 for n in tokens])
    keys = [
        place + 1
        for batch in batches
        for row in batch["segments"]
        for segment in range(1, row.max() + 1)
        for place in range((row == segment).sum())
    ]
    by_segment = flops_per_token(config, 200, np.mean(keys), scored)
    assert results["mfu_segments"]["windows"] == pytest.approx([n / 6 * by_segment / 1e9 for n in tokens])
    assert results["parameters"] == count_parameters(abstract_params(config.model, 200, 64))


def trained_in(seconds_a_step):
    """Return `Trainer.seconds` that trains once and says that every step took so long."""
    original = measures.Trainer.seconds

    def seconds(self, batches):
        original(self, batches[:1])
        return seconds_a_step * len(batches)

    return seconds


def test_every_step_of_a_trainer_is_taken():
    corpus, config = synthetic_corpus(200, 300), small_config(objective={})
    mesh = measures.make_mesh(config)
    state = measures.create_state(config, 200, None, mesh)
    trainer = measures.Trainer(state, measures.make_train_step(config, 200, mesh), mesh)
    batches = measures.train_batches(config, corpus, 3)
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])
    assert trainer.seconds(batches) > 0
    assert int(trainer._state.step) == 3
    assert trainer.loss() == pytest.approx(math.log(200), rel=0.1)


def test_a_checkpoint_is_not_compressed_to_nothing():
    config = small_config()
    results = measures.measure_checkpoint(config, synthetic_corpus(200, 50), windows=1)
    parameters = count_parameters(abstract_params(config.model, 200, 32))
    # Parameters and two moments, float32.
    assert results["checkpoint_bytes"] > 0.8 * 12 * parameters


def test_an_earlier_record_is_compared(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    run(monkeypatch, "data", "--json", file, *TINY)
    record = json.loads(file.read_text())
    record["results"]["rows_per_epoch"] *= 4
    del record["results"]["fill"]
    file.write_text(json.dumps(record))
    capsys.readouterr()
    run(monkeypatch, "data", "--against", file, *TINY)
    printed = capsys.readouterr().out
    assert "unlike" not in printed
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert lines["result"] == ["median", "min", "max", "earlier", "ratio"]
    assert lines["rows_per_epoch"][-1] == "0.250"
    assert lines["fill"][-1] == "-"
    now, before = (float(lines["useful_tokens_per_second"][place].replace(",", "")) for place in (0, 3))
    assert before == pytest.approx(record["results"]["useful_tokens_per_second"]["median"], abs=1)
    assert float(lines["useful_tokens_per_second"][4]) == pytest.approx(now / before, abs=1e-3)


def test_what_an_earlier_record_does_not_share_is_said(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    run(monkeypatch, "data", "--json", file, *TINY)
    record = json.loads(file.read_text())
    record["config"]["training"]["batch_rows"] = 77
    record["device"] = "TPU v9"
    file.write_text(json.dumps(record))
    capsys.readouterr()
    run(monkeypatch, "data", "--against", file, *TINY)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("unlike the earlier record: device: cpu, earlier TPU v9; config.training.batch_rows: ")
    assert last.endswith(", earlier 77")


def test_a_run_and_a_corpus_can_be_given(tmp_path, monkeypatch, capsys):
    corpus = open_corpus(write_small_corpus(tmp_path / "corpus"))
    toml = tmp_path / "run.toml"
    toml.write_text("[training]\nrow_length = 32\nsegments_per_row = 4\nbatch_rows = 8\n")
    file = tmp_path / "out.json"
    arguments = ("--config", toml, "--corpus", corpus.path, "--json", file, "--training.batch-rows", 4, "--windows", 1)
    run(monkeypatch, "data", *arguments, "--steps", 2)
    record = json.loads(file.read_text())
    assert record["corpus"] == {"hash": corpus.hash, "sets": 60, "vocabulary": corpus.vocabulary.size}
    training = record["config"]["training"]
    assert (training["batch_rows"], training["row_length"]) == (4, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], "speed"),
        ([], "required"),
        (["data", "--windows", 0], "--windows 0: must be at least 1"),
        (["train", "--steps", -1], "--steps -1: must be at least 1"),
        (["data", "--vocabulary", 20], "--vocabulary 20: must lie between 56 and 16,777,216"),
        (["data", "--vocabulary", 100, "--corpus", "x"], "--vocabulary: is for random sets"),
        (["data", "--corpus", "nowhere"], "nowhere"),
        (["data", "--config", "nowhere.toml"], "nowhere.toml"),
        (["data", "--against", "nowhere.json"], "nowhere.json: cannot read the earlier record"),
        (["data", "--json", "nowhere/out.json"], "nowhere/out.json: no such folder"),
        (["data", "--json", "."], ".: is a folder"),
        (["data", "--sets", 99_999_999_999], "--sets 99999999999: must be at most 10,000,000"),
        (["data", "--training.row-lenght", 9], "--training.row-lenght"),
        (["data", "--training.row-length", 1], "training.row_length = 1"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, monkeypatch, capsys):
    assert words in error_of(monkeypatch, capsys, *arguments)


def test_a_record_of_something_else_is_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    file.write_text('{"measure": "train", "results": {}}')
    assert "is of train, not of data" in error_of(monkeypatch, capsys, "data", "--against", file)
    for results in ("[]", '{"loss": "x"}', '{"loss": {"min": 1}}'):
        file.write_text(f'{{"measure": "data", "results": {results}}}')
        assert "not a record" in error_of(monkeypatch, capsys, "data", "--against", file)
    file.write_text("[1]")
    assert "not a record" in error_of(monkeypatch, capsys, "data", "--against", file)


def test_numbers_are_rounded_for_reading():
    results = {"none": None, "zero": 0, "small": 0.00123456, "middle": 12.3456, "large": 1234567.8}
    lines = records.as_table(results).splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["-", "0", "0.001235", "12.35", "1,234,568"]


def test_the_surroundings_are_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    told = records.surroundings()
    assert told["device"] == jax.devices()[0].device_kind and told["num_devices"] == 8
    assert told["versions"]["jax"] == jax.__version__
    assert told["environment"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"


def test_gpu_all_lists_its_parts():
    script = ROOT / "benchmarks" / "gpu_all.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(["bash", script, "--list"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = [line.split()[0] for line in done.stdout.splitlines()]
    assert parts == [
        *("attention-tests", "train-cudnn", "train-pallas", "train-xla", "train-residual", "train-cut-points"),
        *("compare-pytorch", "train-no-triton", "train-no-graphs", "train-triton-any"),
        *("data", "sample", "checkpoint"),
    ]
    # Its commands are ones that the command line takes.
    for line in done.stdout.splitlines():
        words = line.split()
        if "tcc_jax.bench" in words:
            own, overrides = bench._separate(words[words.index("tcc_jax.bench") + 1 :])
            options = bench.parse_arguments(bench.Options, own)
            assert options.measure in RESULTS
            bench.parse_arguments(bench.Config, overrides)
    wrong = subprocess.run(["bash", script, "--lits"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "error: --lits: unknown; see --help\n")


def test_gpu_all_goes_on_past_what_fails(tmp_path):
    script = ROOT / "benchmarks" / "gpu_all.sh"
    environment = {"PATH": os.environ["PATH"], "PYTHON": "false"}
    command = ["bash", script, "--rehearse", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    failed = [line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")]
    parts = [
        "attention-tests",
        "train-xla",
        "train-residual",
        "train-cut-points",
        "compare-pytorch",
        "train-no-triton",
        "train-no-graphs",
        "train-triton-any",
    ]
    parts += ["data", "sample", "checkpoint"]
    assert failed == [f"{part} (exit 1)" for part in parts]


def test_gpu_all_fails_where_every_attention_test_is_skipped(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '4 skipped, 54 deselected in 1.77s'\n")
    python.chmod(0o755)
    command = ["bash", ROOT / "benchmarks" / "gpu_all.sh", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "PYTHON": python})
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert failed == ["failed: attention-tests (none ran: does JAX find the GPU?)"]


def test_pytorch_is_given_the_same_targets():
    batch = measures.train_batches(small_config(), synthetic_corpus(200, 50), 1)[0]
    labels_BT = compare_pytorch.next_tokens(batch["tokens"].astype(np.int64), batch["segments"])
    for row, (tokens_T, segments_T) in enumerate(zip(batch["tokens"], batch["segments"], strict=True)):
        for place, segment in enumerate(segments_T):
            inside = segment > 0 and place + 1 < len(segments_T) and segments_T[place + 1] == segment
            assert labels_BT[row, place] == (tokens_T[place + 1] if inside else -100)


def test_the_comparison_says_who_is_faster_and_whether_the_work_is_the_same():
    names = ("side", "form", "dtype", "initial_loss", "useful_tokens_per_second")
    rows = [
        dict(zip(names, ("tcc_jax", "a", "float32", 5.3, {"median": 30.0}), strict=True)),
        dict(zip(names, ("PyTorch", "b", "float32", 5.4, {"median": 10.0}), strict=True)),
        dict(zip(names, ("PyTorch", "c", "bfloat16", 9.0, {"median": 20.0}), strict=True)),
        {"side": "PyTorch", "form": "d", "dtype": "bfloat16", "failed": "no compiler"},
    ]
    compare_pytorch.add_ratios(rows)
    assert [row.get("times_pytorch") for row in rows] == [1.5, 0.5, 1.0, None]
    assert compare_pytorch.untimed(rows[:1]) == ["anything of PyTorch"]
    assert compare_pytorch.untimed(rows) == ["PyTorch, d, bfloat16 (no compiler)"]
    said = compare_pytorch.checks(rows, theirs=100, ours=100.0, size=200)
    assert said[0].endswith("same") and "TOO FAR" not in said[1] + said[2] and said[3].endswith("TOO FAR")
    assert compare_pytorch.checks([], theirs=100, ours=101.0, size=200)[0].endswith("DIFFERENT")
