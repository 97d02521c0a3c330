"""Time to quality: `python -m benchmarks.speedrun CONFIG --gmt tcc1000.gmt --drawn-counts TABLE --out FILE.json`.

Trains CONFIG with a checkpoint every `--every` steps, then completes the reference sets with each of them and tells at
which one the number of significant sets passes each mark. Seconds are those of training, compilation and checkpoints
included; they leave out the start of the run (imports, spectral vectors), which the time of the whole command holds.
Run from the repository's root.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

import tcc_jax
from tcc_jax.baselines import Scorer
from tcc_jax.completion.sets import GeneFinder, KnownSet, read_sets
from tcc_jax.config import read_toml
from tcc_jax.corpus.gmt import Problems
from tcc_jax.corpus.store import open_corpus
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import Vocabulary, genes_of
from tcc_jax.evaluation.metrics import run_method
from tcc_jax.evaluation.protocol import DrawnCounts, mask_last_genes, read_drawn_counts
from tcc_jax.runs.checkpoint import packages
from tcc_jax.terminal import command, parse_arguments
from tcc_jax.training.flops import flops_per_token

_ALPHA = 0.05


@dataclass(frozen=True)
class Options:
    """What to train, and what it is measured on."""

    config: tyro.conf.Positional[Path]
    """TOML file of the run."""
    gmt: Path
    """The reference sets."""
    drawn_counts: Path
    """Their published tables: columns name, hits, missed, extra and neither."""
    out: Path
    """JSON file to write."""
    hgnc: Path | None = None
    """HGNC table for symbols; else the one inside the package."""
    every: int = 100
    """Steps between two measurements."""
    marks: tuple[int, ...] = (660, 900, 930)
    """Significant sets to pass, with as many genes drawn as hidden."""


@command
def main() -> None:
    """Run the command."""
    options = parse_arguments(Options, prog="python -m benchmarks.speedrun")
    config = read_toml(options.config)
    directory = Path(config.run.directory)
    keep = (
        f"--checkpoint.every-steps {options.every} --checkpoint.every-minutes 0 --checkpoint.keep-every {options.every}"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tcc_jax.train", str(options.config), *keep.split()], check=True)
    wall = time.perf_counter() - began
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    windows = {line["step"]: line for line in metrics if "tokens_per_second" in line}
    steps = sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
    corpus = open_corpus(config.data.corpus)
    flops = flops_per_token(config, corpus.vocabulary.size)
    sets, counts = read_reference(options, corpus.vocabulary)
    points = []
    for step in steps:
        window = windows[max((at for at in windows if at <= step), default=min(windows))]
        seen = window["epoch"] * len(corpus.indices("train"))
        tokens = seen * window["tokens_per_second"] / window["sets_per_second"]
        model = tcc_jax.load(str(directory / "checkpoints" / str(step)))
        point = {"step": step, "seconds": model.checkpoint.meta["elapsed_seconds"], "sets": round(seen)}
        points.append(point | {"flops": tokens * flops} | measure(model.score, sets, counts, model.vocabulary.size))
        print(json.dumps(points[-1]), flush=True)
    record = {
        "config": config.to_dict(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": packages(),
        "wall_seconds": round(wall, 1),
        "points": points,
        "marks": first_points(points, options.marks),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def read_reference(options: Options, vocabulary: Vocabulary) -> tuple[list[KnownSet], list[DrawnCounts]]:
    """Return the reference sets, and their published tables."""
    finder = GeneFinder(SymbolTable.read(options.hgnc), vocabulary)
    sets = list(read_sets([str(options.gmt)], finder, Problems(), "description"))
    return sets, read_drawn_counts(options.drawn_counts, sets)


def measure(scorer: Scorer, sets: list[KnownSet], counts: list[DrawnCounts], size: int) -> dict[str, float]:
    """Return the significant sets and the recall, with as many genes drawn as hidden and as the original drew."""
    candidates_V = genes_of(size)
    found: dict[str, float] = {}
    for drawn in ("hidden", "recorded"):
        masked = mask_last_genes(sets, counts, drawn == "hidden", int(candidates_V.sum()))
        outcome = run_method("model", scorer, [masked], candidates_V)
        found[f"{drawn}_significant"] = int(outcome.significant(_ALPHA).sum())
        found[f"{drawn}_recall"] = round(float(outcome.per_set("recall").mean()), 4)
    return found


def first_points(points: list[dict[str, Any]], marks: Sequence[int]) -> dict[int, dict[str, Any] | None]:
    """Return for each mark the first point with as many significant sets, or None."""
    return {mark: next((p for p in points if p["hidden_significant"] >= mark), None) for mark in marks}


def table(record: dict[str, Any]) -> str:
    """Return when each mark was passed, and what the last step has."""
    lines = ["| significant sets | step | seconds | sets seen | FLOPs |", "|--:|--:|--:|--:|--:|"]
    for mark, point in record["marks"].items():
        row = f"{point['step']:,} | {point['seconds']:.0f} | {point['sets']:,} | {point['flops']:.2g}" if point else ""
        lines.append(f"| {mark} | {row or 'not reached | - | - | -'} |")
    last = record["points"][-1]
    lines += ["", f"In the end, after {last['step']:,} steps and {last['seconds']:.0f} s on {record['device']}:"]
    for drawn, meaning in (("hidden", "the hidden count"), ("recorded", "the original's drawn counts")):
        lines.append(f"{last[drawn + '_significant']} significant, recall {last[drawn + '_recall']:.3f} at {meaning}.")
    lines.append(f"With the start and the rest it took {record['wall_seconds']:.0f} s.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
