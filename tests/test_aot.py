"""Whether a step fits hardware that is not here: on the CPU's own devices, and on a TPU topology where libtpu is."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from tcc_jax import aot
from tcc_jax.terminal import UserError
from tcc_jax.training import ahead
from tcc_jax.training.ahead import Compiled, Target, compile_step, find_target, largest_batch, try_compiler
from tests.training.runs import small_config

CONFIG = """
[model]
num_layers = 1
width = 128
num_heads = 2
[training]
batch_rows = 16
row_length = 128
segments_per_row = 4
"""


def target(memory_bytes, num_devices=8):
    return Target("cpu", jax.devices()[:num_devices], memory_bytes)


def test_memory_is_that_of_the_state_on_each_device_and_of_the_step():
    config = small_config(mesh={"data": 1, "fsdp": 1})
    one = compile_step(config, 50, target(2**30, 1))
    assert one.fits and one.attention == "xla"
    # Parameters and two moments of 128 x 16 and more, and nothing forgotten of 8 x 32 tokens and segments.
    params = 128 * 16 + 128 + 4 * 16 * 16 + 2 * 16 * 64 + 3 * 16
    batch = 8 * (32 + 32 + 4 + 4)
    assert one.state_bytes == pytest.approx(4 * (3 * params + batch), abs=64)
    assert one.temporary_bytes > 4 * 8 * 32 * 64
    spread = compile_step(small_config(mesh={"data": 1, "fsdp": 8}), 50, target(2**30))
    assert spread.state_bytes < one.state_bytes / 4


def test_a_step_that_needs_more_than_there_is_does_not_fit():
    config = small_config()
    needed = compile_step(config, 50, target(2**30, 1))
    total = needed.state_bytes + needed.temporary_bytes
    assert compile_step(config, 50, target(total, 1)).fits
    assert not compile_step(config, 50, target(total - 1, 1)).fits


class Lowered:
    """A lowered step whose compiler says `words`, with Triton's products or always."""

    def __init__(self, words, always=False):
        self.words, self.always, self.options = words, always, []

    def compile(self, options):
        self.options.append(options)
        if self.always or not options:
            raise jax.errors.JaxRuntimeError(self.words)
        return self

    def memory_analysis(self):
        return "memory"


NO_TRITON = {"xla_gpu_enable_triton_gemm": False}


@pytest.mark.parametrize(
    ("platform", "words", "always", "asked", "outcome"),
    [
        ("cuda", "INTERNAL: no tiles\nmore", False, [None, NO_TRITON], ("memory", "INTERNAL: no tiles", False, False)),
        ("cuda", "INTERNAL: no tiles", True, [None, NO_TRITON], (None, "INTERNAL: no tiles", False, True)),
        ("cuda", "RESOURCE_EXHAUSTED: 99 GiB", False, [None], (None, "RESOURCE_EXHAUSTED: 99 GiB", True, False)),
        ("tpu", "INTERNAL: no tiles", False, [None], (None, "INTERNAL: no tiles", True, True)),
    ],
)
def test_a_compiler_that_fails_is_asked_without_triton_where_there_is_one(platform, words, always, asked, outcome):
    lowered = Lowered(words, always)
    assert try_compiler(lowered, platform) == outcome
    assert lowered.options == asked


def test_a_failure_of_the_compiler_is_a_line_and_no_verdict_on_memory(monkeypatch, capsys):
    def compile_step(config, vocabulary_size, target):
        return Compiled(config.training.batch_rows, 1, None, 2.0, False, "INTERNAL: no tiles", False, True)

    monkeypatch.setattr(ahead, "compile_step", compile_step)
    monkeypatch.setattr(ahead, "find_target", lambda *_: target(2**30, 1))
    monkeypatch.setattr("sys.argv", ["aot", "configs/laptop.toml", "--topology", "h200", "--fit"])
    monkeypatch.setattr("os.environ", dict(os.environ))
    with pytest.raises(SystemExit) as left:
        aot.main()
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert "error: 1 rows: the compiler failed (2 s): INTERNAL: no tiles" in err
    assert out.splitlines()[-1].split()[-1] == "unknown"


@pytest.mark.parametrize("most", [0, 1, 2, 5, 37, 64, 1000])
@pytest.mark.parametrize("curve", [1.0, 0.5, 2.0])
def test_the_largest_batch_is_found(most, curve, monkeypatch):
    tried = []

    def compile_step(config, vocabulary_size, target):
        rows = config.training.batch_rows
        tried.append(rows)
        temporary = int(2**20 * rows**curve)
        return Compiled(rows, 1, temporary, 0.0, 1 + temporary <= target.memory_bytes)

    monkeypatch.setattr(ahead, "compile_step", compile_step)
    config, memory = small_config(mesh={"data": 4}, training={"microbatches": 2}), int(2**20 * (8 * most) ** curve) + 1
    best = largest_batch(config, 50, target(memory), lambda _: None)
    assert all(rows % 8 == 0 for rows in tried)
    assert len(tried) == len(set(tried)) <= (14 if curve == 1 else 25)
    assert (best.batch_rows if best else 0) == 8 * most


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_the_largest_batch_of_a_configuration_is_tried(microbatches, monkeypatch):
    tried = []

    def compile_step(config, vocabulary_size, target):
        tried.append(config.training.batch_rows)
        return Compiled(tried[-1], 1, 1, 0.0, True)

    monkeypatch.setattr(ahead, "compile_step", compile_step)
    training = {"batch_rows": 6, "microbatches": microbatches}
    best = largest_batch(small_config(training=training, mesh={"data": 1}), 50, target(2**30, 1), lambda _: None)
    assert best.batch_rows == tried[-1] == 2**20 // microbatches * microbatches
    assert len(tried) == len(set(tried)) <= 21


@pytest.mark.parametrize("content", [b"\xff\xfe", b"gpu_device_info { }"])
def test_a_description_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "gpu.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"gpu.txt: not a text-format GpuTargetConfigProto"):
        find_target("h200", str(tmp_path / "gpu.txt"))


@pytest.mark.parametrize(
    ("topology", "words"), [("v9:1", "must be one of v4"), ("h200:x", "must be one of"), ("v5e:9x9x9", "v5e:9x9x9")]
)
def test_a_topology_that_is_not_known_is_refused(topology, words):
    with pytest.raises(UserError, match=words):
        find_target(topology)


def run(*arguments):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_NUM")}
    command = [sys.executable, "-m", "tcc_jax.aot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_says_in_a_line_what_is_missing(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    toml, tpu = tmp_path / "run.toml", ["--topology", "v5e:2x4"]
    mistakes = [[], tpu, [toml], [toml, "--topology", "x"], [toml, *tpu, "--vocabulary-size", -5]]
    for arguments in [*mistakes, [toml, *tpu, "--json", tmp_path / "no" / "x.json"]]:
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_step_is_compiled_for_a_tpu_slice(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    done = run(tmp_path / "run.toml", "--topology", "v5e:2x4", "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["devices"] == 8
    assert result["attempts"][0]["fits"]
    assert 0 < result["attempts"][0]["temporary_bytes"] < result["memory_bytes"] == int(15.75 * 2**30)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_v4_chip_is_one_device(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    done = run(tmp_path / "run.toml", "--topology", "v4:2x2x1", "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["devices"] == 4


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="jax-cuda12-plugin is not installed")
def test_a_bfloat16_residual_stream_takes_less_of_a_gpu(tmp_path):
    # XLA kept float32 until it was told not to; seen where the branch was made float32 before the sum.
    (tmp_path / "run.toml").write_text("")
    needed = {}
    for residual_dtype in ("float32", "bfloat16"):
        options = ("--vocabulary-size", 128, "--model.residual-dtype", residual_dtype)
        done = run(tmp_path / "run.toml", "--topology", "h200", *options, "--json", tmp_path / "result.json")
        assert done.returncode == 0, done.stderr
        needed[residual_dtype] = json.loads((tmp_path / "result.json").read_text())["attempts"][0]["temporary_bytes"]
    assert needed["bfloat16"] < 0.95 * needed["float32"]
