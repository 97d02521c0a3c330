"""A small run as files, its numbers as a fingerprint, and what a process of it is doing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.training.corpora import write_small_corpus

# What a line of metrics has of the clock and the machine.
CLOCK = (
    "seconds",
    "tokens_per_second",
    "sets_per_second",
    "mfu",
    "mfu_segments",
    "data_wait",
    "memory_bytes",
    "memory_peak_bytes",
)


def write_run(folder: Path, num_sets: int = 120, **sections: dict) -> Path:
    """Write a corpus and a TOML file; every phase of a run is short, and a save or an evaluation is never far."""
    folder.mkdir(parents=True, exist_ok=True)
    write_small_corpus(folder / "corpus", num_sets=num_sets)
    values: dict[str, dict] = {
        "data": {"corpus": str(folder / "corpus")},
        "model": {"num_layers": 1, "width": 16, "num_heads": 2, "dropout": 0.1, "matmul_dtype": "float32"},
        "objective": {"cut_points": 2},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 20},
        "training": {
            "steps": 1200,
            "batch_rows": 8,
            "row_length": 32,
            "segments_per_row": 4,
            "log_every": 7,
            "eval_every": 40,
            "eval_steps": 2,
            "recall_sets": 4,
        },
        "checkpoint": {"every_steps": 25, "every_minutes": 0.005, "keep": 2, "keep_every": 200},
        "mesh": {"data": 1},
    }
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    lines = []
    for section, fields in values.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    (folder / "run.toml").write_text("\n".join(lines) + "\n")
    return folder / "run.toml"


def fingerprint(run: Path, step: int) -> dict[str, str]:
    """Return a hash of every array of a step's state, its bits, as Orbax gives them without this package's help."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore((run / "checkpoints" / str(step) / "state").absolute())
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def numbers(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def doing(run: Path) -> str:
    """Return what a process of the run was doing when it was killed: start, step, save, or evaluation."""
    status = run / "status.json"
    state = json.loads(status.read_text())["state"] if status.exists() else "starting"
    unsealed = [path for path in (run / "checkpoints").glob("*") if not (path / "checkpoint.json").exists()]
    if state in ("starting", "compiling", "finished", "stopped"):
        return "start"
    return "evaluation" if state == "evaluating" else "save" if unsealed or state == "saving" else "step"
