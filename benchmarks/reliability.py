"""Faults put to a training run, and what became of it: `python -m benchmarks.reliability [PART ...] [--count N]`.

Parts: kills, signals, damage, disk, state. Each adds its rows to benchmarks/reliability.json; RELIABILITY.md is the
table of that file. Run from the repository's root, on an idle machine for the times. `disk` mounts a tmpfs (root).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.kills import STEPS, kill_and_compare
from tests.integration.nursery import Nursery
from tests.integration.runs import fingerprint, numbers, write_run

RESULTS = Path("benchmarks/reliability.json")
TABLE = Path("benchmarks/RELIABILITY.md")


# What the tests put to several hosts and to runs in a bucket.
ELSEWHERE = """
## Several hosts, and runs in a bucket

Two processes on one machine (`pytest tests/integration/test_hosts.py -m ""`), `hosts.timeout_seconds = 12`, seconds
until the other had ended with one line that names the process and the step to go on from (one run each, on a busy
machine). Its exit code is then 75, on which the recipes of configs/launch go on, and process 0 leaves `stopped` in
status.json; where a process ends by an error that it can still tell, the other repeats it and exits with 1, `failed`.

| fault | process 1 | process 0 |
|---|---|---|
| SIGKILL | 8.5 | 2.8 |
| SIGSTOP | 14.9 | 12.1 |

SIGTERM to either one, in a step or in an evaluation, stops and saves both; an evaluation is given up. A save that
fails on one of them (RLIMIT_FSIZE, either process) is told on both with that one's number and reason, the run goes on,
the checkpoints before stay whole and the next save is tried; if the last one fails, both end with exit code 2 and that
line, and the run goes on from the checkpoint before, also on one process.

In a bucket, against a server on loopback that speaks the JSON API (`pytest tests/training/test_bucket_runs.py`):
SIGKILL at four chosen moments, and the run ends with the bits of one on a local disk; a flipped byte in an object is
named, and last-good goes on; a second process is refused by the owner file, one that died is followed; saves that get
403 or 507 are told and the run goes on. Never tried against Google's own service.

## In the tests

`pytest tests/integration -n 2` took 4 min 50 s on two idle cores, 20 kills of one run among it (103 s); those marked
`slow` are left out and run with `-m ""`. On TPU VMs the maintenance notice is watched for as well; it was only tried
against a stand-in for the metadata server.

## Faults tried one by one

- SIGTERM, SIGINT while importing, starting, compiling, stepping, evaluating, saving: exit 0, nothing lost, same bits
  (`tests/integration/test_stop.py`).
- SIGTERM in a long compilation: exit 0 at once, no step to save (`test_stop.py`).
- Two SIGTERM one after the other: ends at once; same bits when it goes on (`test_stop.py`).
- SIGHUP once or twice (a terminal that closes); under nohup: saves, exit 0; not heard
  (`tests/runs/test_preemption.py`).
- metrics.jsonl ends in what a power cut left: zeros, bytes that are no text, half a line: dropped; same lines
  (`test_metrics.py`).
- metrics.jsonl emptied: told how many lines are lost; the run goes on (`test_loop.py`).
- status.json, config.json, environment.json or genes.tsv half-written; a lock of a process that is gone: written
  anew; same metrics.
- config.json removed: refused: not a run.
- A file, or a folder of another name, among the checkpoints: left alone (`test_saving.py`).
- checkpoints/ removed under a run: the next save makes it again.
- The run folder renamed, or removed and started again elsewhere by another process: the first ends at its next save
  and writes nothing more (`test_loop.py`).
- The run folder or checkpoints/ is a symbolic link; a broken one: as without; refused.
- A read-only file system; a disk that is full at the start: one line that names the file, exit 2; the run goes on
  once that is mended.
- Standard error on the full disk, or into a pipe that is gone: the run goes on (`test_train.py`).
- The clock set back: status.json goes on (it is paced by the monotonic clock).
- The compilation cache damaged: JAX warns and compiles again; same numbers.
- A corpus edited; removed under a run: refused by its checksum; the run goes on to its end, or stops and saves.
- The batch of a skipped update cannot be written: told; the run ends with its reason.
- Two processes with a run folder each, of one path on two machines: both refuse (`tests/integration/test_hosts.py`).
"""


def kills(folder: Path, count: int) -> list[dict[str, Any]]:
    """SIGKILL at random moments; every finished run is compared with an undisturbed one, to the bit."""
    outcome = kill_and_compare(folder, count, seed=0)
    resume = _spread(outcome.resume_seconds)
    return [
        {
            "fault": "SIGKILL",
            "where": {"start": "before the first step of a start", "save": "a step, with a save under way"}.get(
                where, where
            ),
            "count": outcome.moments[where],
            "outcome": f"same bits ({outcome.runs} runs of {STEPS} steps, every kill in one of them)",
            "steps_lost": _steps(lost),
            "resume_seconds": resume,
        }
        for where, lost in sorted(outcome.lost_steps.items())
    ]


def signals(folder: Path, count: int) -> list[dict[str, Any]]:
    """SIGTERM and SIGINT at random moments after the first step."""
    toml, moments, rows = write_run(folder, training={"steps": STEPS}), random.Random(0), []
    with Nursery(JAX_COMPILATION_CACHE_DIR=str(folder / "compilations")) as nursery:
        child = nursery.start(toml, "--run.directory", folder / "straight", log=folder / "log")
        assert child.wait() == 0, child.log.read_text()
        for number in (signal.SIGTERM, signal.SIGINT):
            lost, seconds, runs = [], [], 0
            while len(lost) < count:
                run = folder / f"{number.name}{runs}"
                child = nursery.start(toml, "--run.directory", run, log=folder / "log")
                while child.poll() is None and _status(run) not in ("training", "evaluating"):
                    time.sleep(0.005)
                time.sleep(moments.uniform(0, 0.5))
                began = time.monotonic()
                child.kill(number)
                assert child.wait() == 0, child.log.read_text()
                status = json.loads((run / "status.json").read_text())
                if status["state"] == "stopped":
                    latest = max(int(path.parent.name) for path in run.glob("checkpoints/*/checkpoint.json"))
                    lost.append(status["step"] - latest)
                    seconds.append(time.monotonic() - began)
                    continue
                _compare(run, folder / "straight")
                runs += 1
            run = folder / f"{number.name}{runs}"
            child = nursery.start(toml, "--run.directory", run, log=folder / "log")
            assert child.wait() == 0, child.log.read_text()
            _compare(run, folder / "straight")
            rows.append(
                {
                    "fault": number.name,
                    "where": "step, evaluation or save",
                    "count": count,
                    "outcome": f"exit 0 after {_spread(seconds)} s; same bits in {runs + 1} finished runs",
                    "steps_lost": _steps(lost),
                    "resume_seconds": "as above",
                }
            )
    return rows


def damage(folder: Path, count: int) -> list[dict[str, Any]]:
    """Change a checkpoint's files at random and open it."""
    from tcc_jax.runs.checkpoint import find_checkpoint
    from tcc_jax.terminal import UserError

    toml, moments = write_run(folder, training={"steps": 60}), random.Random(0)
    with Nursery() as nursery:
        child = nursery.start(toml, "--run.directory", folder / "run", log=folder / "log")
        assert child.wait() == 0, child.log.read_text()

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        path.write_bytes(data)

    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: moments.randrange(len(data))])

    rows = []
    for name, change in (("one bit flipped", flip), ("file cut short", cut), ("file removed", Path.unlink)):
        named = fell_back = ignored = 0
        for index in range(count):
            copy = Path(shutil.copytree(folder / "run", folder / f"{name}{index}"))
            files = sorted(path for path in (copy / "checkpoints" / "60").rglob("*") if path.stat().st_size)
            path = moments.choice([path for path in files if path.is_file()])
            change(path)
            try:
                # Without its record a checkpoint counts as a save that was cut off.
                ignored += find_checkpoint(copy, "latest", print)[0] != 60
            except UserError as error:
                named += str(copy / "checkpoints" / "60") in str(error)
            found = find_checkpoint(copy, "last-good", lambda message: None)
            fell_back += found[0] < 60
            shutil.rmtree(copy)
        assert named + ignored == fell_back == count
        rows.append(
            {
                "fault": name,
                "where": "a random file of the latest checkpoint",
                "count": count,
                "outcome": f"{named} named and refused, {ignored} taken for an unfinished save; {fell_back} fell back",
                "steps_lost": "to the checkpoint before",
                "resume_seconds": "as above",
            }
        )
    return rows


def disk(folder: Path, count: int) -> list[dict[str, Any]]:
    """Fill the disk under a run, and free it again later."""
    toml, small = write_run(folder, training={"steps": STEPS}), folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    failed = 0
    try:
        with Nursery(JAX_COMPILATION_CACHE_DIR=str(folder / "compilations")) as nursery:
            child = nursery.start(toml, "--run.directory", folder / "straight", log=folder / "log")
            assert child.wait() == 0, child.log.read_text()
            for index in range(count):
                run, log = small / f"run{index}", folder / f"full{index}.log"
                child = nursery.start(toml, "--run.directory", run, log=log)
                while child.poll() is None and not list(run.glob("checkpoints/*/checkpoint.json")):
                    time.sleep(0.005)
                _fill(small / "filler")
                while child.poll() is None and "could not be saved" not in log.read_text():
                    time.sleep(0.005)
                (small / "filler").unlink()
                assert child.wait() == 0, log.read_text()
                failed += log.read_text().count("could not be saved")
                _compare(run, folder / "straight")
                shutil.rmtree(run)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    return [
        {
            "fault": "disk full",
            "where": "a tmpfs of 2 MiB filled during a run, freed after the first failed save",
            "count": count,
            "outcome": f"{failed} saves failed and were told, the runs went on; same bits and same metrics",
            "steps_lost": "0",
            "resume_seconds": "not needed",
        }
    ]


def state(folder: Path, count: int) -> list[dict[str, Any]]:
    """Save and restore the state of the 120M configuration: 12 layers, width 768, 44,902 ids."""
    import jax
    import numpy as np

    from tcc_jax.config import from_dict
    from tcc_jax.runs.checkpoint import find_checkpoint, restore_state
    from tcc_jax.runs.saving import FORMAT_VERSION, CheckpointWriter
    from tcc_jax.training.sharding import make_mesh
    from tcc_jax.training.state import abstract_state, create_state

    config, size = from_dict({"mesh": {"data": 1}}), 44_902
    mesh = make_mesh(config)
    noise = np.random.default_rng(0)
    # Not the zeros of a first step, which Orbax would compress to nothing.
    values = jax.tree.map(
        lambda leaf: (
            jax.device_put(noise.standard_normal(leaf.shape, np.float32), leaf.sharding)
            if leaf.dtype == np.float32
            else leaf
        ),
        create_state(config, size, None, mesh),
    )
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(values))
    pauses, totals = [], []
    with CheckpointWriter(folder, keep=1) as writer:
        for step in range(1, count + 1):
            began = time.monotonic()
            writer.save(step, jax.block_until_ready(values), {"format_version": FORMAT_VERSION, "step": step})
            writer.wait()
            assert writer.failure is None, writer.failure
            pauses.append(writer.pause_seconds)
            totals.append(time.monotonic() - began)
    on_disk = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    began = time.monotonic()
    assert find_checkpoint(folder, "latest", print)
    checked = time.monotonic() - began
    restored = jax.block_until_ready(restore_state(folder, count, abstract_state(config, size, mesh)))
    seconds = time.monotonic() - began
    assert int(restored.step) == 0
    return [
        {
            "state_bytes": num_bytes,
            "bytes_on_disk": on_disk,
            "saves": count,
            "device": f"{jax.devices()[0].device_kind}, {jax.default_backend()}",
            "save_pause_seconds": _spread(pauses),
            "save_seconds_in_background": _spread(totals),
            "save_megabytes_per_second": round(num_bytes / statistics.median(totals) / 1e6),
            "check_seconds": round(checked, 2),
            "restore_seconds_with_check": round(seconds, 2),
        }
    ]


def write_table(results: dict[str, Any]) -> None:
    """Write RELIABILITY.md from the results."""
    lines = [
        "# Faults put to a training run, and what became of it",
        "",
        "Written by `python -m benchmarks.reliability` from `benchmarks/reliability.json`. *Same bits*: every array of",
        "the final state and every line of metrics.jsonl (wall-clock fields aside) equal those of a run that was never",
        "disturbed. Steps lost are steps that had to be taken again, as metrics.jsonl (a line every 7 steps) tells.",
        "The runs save every 25 steps and every 0.3 s. Time to resume: from the start of the process, the import of",
        "its libraries (3 s) aside, to its first new step, with a warm compilation cache.",
        "",
        "| fault | where | times | outcome | steps lost | time to resume, s |",
        "|---|---|---|---|---|---|",
    ]
    parts = results["parts"]
    for part in ("kills", "signals", "damage", "disk"):
        for row in parts.get(part, {}).get("rows", []):
            names = ("fault", "where", "count", "outcome", "steps_lost", "resume_seconds")
            lines.append("| " + " | ".join(str(row[name]) for name in names) + " |")
    lines += ["", *([results["note"]] if "note" in results else [])]
    lines += ["", "## The state of the 120M configuration", ""]
    for row in parts.get("state", {}).get("rows", []):
        lines += ["| | |", "|---|---|", *(f"| {name.replace('_', ' ')} | {value} |" for name, value in row.items())]
    lines += ["", "## Commands", ""]
    lines += [
        f"- `{part['command']}`: {part['seconds']} s on {part['machine']}"
        for part in parts.values()
        if "command" in part
    ]
    TABLE.write_text("\n".join(lines) + "\n" + ELSEWHERE, encoding="utf-8")


def main() -> None:
    """Run the parts asked for and write the table."""
    parts = {"kills": kills, "signals": signals, "damage": damage, "disk": disk, "state": state}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--count", type=int, default=0, help="times each fault is tried (kills 200, others 20)")
    options = parser.parse_args()
    for name in options.parts or parts:
        count = options.count or {"kills": 200, "state": 3, "disk": 5, "damage": 100}.get(name, 20)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = parts[name](Path(folder).absolute(), count)
        # Read again here: parts may run at the same time.
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"format_version": 1, "parts": {}}
        results["parts"][name] = {
            "command": f"python -m benchmarks.reliability {name} --count {count}",
            "seconds": round(time.monotonic() - began),
            "machine": f"{platform.system()} {platform.machine()}, 2 CPU cores",
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_table(results)
        print(f"{name}: {json.dumps(rows)}", flush=True)


def _compare(run: Path, straight: Path) -> None:
    assert numbers(run) == numbers(straight)
    assert fingerprint(run, STEPS) == fingerprint(straight, STEPS)


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def _status(run: Path) -> str:
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else ""


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} (median), {max(values):.2f} (most)" if values else "none"


def _steps(values: list[int]) -> str:
    return f"{statistics.median(values):g} (median), {max(values)} (most)"


if __name__ == "__main__":
    main()
