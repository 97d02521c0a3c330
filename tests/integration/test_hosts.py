"""Two processes on loopback train, stop together when one of them is asked to, and a single one goes on."""

import json
import signal
import socket
import time

import numpy as np

from tests.integration.nursery import Nursery
from tests.integration.runs import numbers, write_run

STEPS = 60


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    # Every step writes its line and there are many: the signal falls among them.
    sections = {"steps": STEPS, "log_every": 1, "eval_every": 20}
    toml = write_run(tmp_path, training=sections, checkpoint={"every_steps": 1000, "every_minutes": 0.0})
    run, cache = tmp_path / "run", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compilations")}
    hosts = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"} | cache
    arguments = (toml, "--run.directory", run, "--mesh.data", 2)
    with Nursery(**hosts, JAX_PROCESS_ID="0") as first, Nursery(**hosts, JAX_PROCESS_ID="1") as second:
        children = [
            nursery.start(*arguments, log=tmp_path / f"host{index}.log")
            for index, nursery in enumerate((first, second))
        ]
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
            assert time.monotonic() < end and all(child.poll() is None for child in children), [
                child.log.read_text() for child in children
            ]
            time.sleep(0.005)
        # Only the second host is asked.
        children[1].kill(signal.SIGTERM)
        for child in children:
            assert child.wait(60) == 0, child.log.read_text()
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped" and 5 <= stopped["step"] < STEPS
    step = stopped["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(step)]
    assert all(f"step {step:,} is saved" in child.log.read_text() for child in children)

    with Nursery(**cache) as nursery:
        child = nursery.start(toml, "--run.directory", run, "--mesh.data", 1, log=tmp_path / "one.log")
        assert child.wait() == 0, child.log.read_text()
        assert f"going on from step {step:,}" in child.log.read_text()
        child = nursery.start(toml, "--run.directory", tmp_path / "straight", log=tmp_path / "straight.log")
        assert child.wait() == 0, child.log.read_text()
    moved, straight = numbers(run), numbers(tmp_path / "straight")
    assert [line["step"] for line in moved] == [line["step"] for line in straight]
    assert len({(line["step"], "loss" in line) for line in moved}) == len(moved)
    # The stream of batches is the same; two meshes differ in the order of sums.
    for name, tolerance in (("loss", 1e-4), ("learning_rate", 1e-6)):
        pairs = [(a[name], b[name]) for a, b in zip(moved, straight, strict=True) if name in a]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=tolerance)
