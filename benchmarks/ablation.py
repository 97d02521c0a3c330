"""The recipe, one change at a time: `python -m benchmarks.ablation [ROW ...]`, without names all on the small corpus.

Each row trains configs/ablation.toml with some fields changed and completes the validation sets of its corpus, a
random 20 % visible. It is compared set by set with the base, or with the row that it names: that one goes first, and
its recall of each set stays in its run's folder. Rows named `full: ..` are of the whole corpus and are compared with
`full: base`, by the mean over libraries. Results go to benchmarks/ablation.json as they come; the table of that file is
printed at the end. Run from the repository's root.
"""

from __future__ import annotations

import collections
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tcc_jax
from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.baselines.popularity import popularity
from tcc_jax.completion.masks import MaskedSet
from tcc_jax.completion.tuning import recall_of_each, validation_masks
from tcc_jax.corpus.store import SPLITS, open_corpus, write_corpus
from tcc_jax.evaluation.metrics import bootstrap
from tcc_jax.files import atomic_folder

CONFIG = "configs/ablation.toml"
RESULTS = Path("benchmarks/ablation.json")
RUNS = Path("runs/ablation")
RECALL = "recall.npy"
FULL = "full: "
# Of each library of the whole corpus; they hold 1 to 184 validation sets.
SETS_A_LIBRARY = 8
# The small corpus, and the same without training sets of more genes than this.
SMALL, SHORT, MOST_GENES = Path("corpora/tiny"), Path("corpora/tiny_short"), 200

_WHOLE = "--objective.prompt-genes 0 --training.row-length 128 --training.segments-per-row 8"
_FULL = (
    "--data.corpus corpora/full --model.hidden-width 512 --training.steps 1000 --training.batch-rows 32 "
    "--training.segments-per-row 6 --optimizer.warmup-steps 200"
)
_RANDOM = "--objective.no-spectral-start --optimizer.learning-rate 3e-3"
_WIDE = "--model.width 512 --model.hidden-width 1024"
_LONG = "--training.steps 900"
# What is changed; or that, and the row to compare with where it is not the base.
ROWS: dict[str, str | tuple[str, str]] = {
    "base": "",
    "start: random": _RANDOM,
    "start: random, rate 1e-3": "--objective.no-spectral-start",
    "start: random, no frequency bias": (f"{_RANDOM} --objective.no-frequency-bias", "start: random"),
    "start: random, 6 times the steps": f"{_RANDOM} --training.steps 1800",
    "rows: whole sets, 2 cuts": _WHOLE,
    "rows: whole sets, all positions": f"{_WHOLE} --objective.cut-points 0",
    "next gene, shuffled": f"{_WHOLE} --objective.cut-points 0 --objective.kind next-gene",
    "next gene, file order, learned positions": f"{_WHOLE} --objective.cut-points 0 --objective.kind next-gene "
    "--data.gene-order file --model.position learned",
    "cuts: 1 a set": "--objective.cut-points 1",
    "cuts: 4 a set": "--objective.cut-points 4",
    "cuts: 5 to 30 %, 16 genes": "--objective.cut-high 0.3 --objective.prompt-genes 16",
    "cuts: 5 to 30 %": "--objective.cut-high 0.3",
    "cuts: 5 to 90 %": "--objective.cut-high 0.9",
    "cuts: 20 to 60 %": "--objective.cut-low 0.2",
    "targets: 32": "--objective.target-genes 32",
    "no training sets over 200 genes": f"--data.corpus {SHORT}",
    "positions: learned": "--model.position learned",
    "layers: 2": "--model.num-layers 2",
    "layers: 2, cuts: 1 a set": "--model.num-layers 2 --objective.cut-points 1",
    "layers: 12, bfloat16": "--model.num-layers 12 --model.matmul-dtype bfloat16",
    "layers: 12, bfloat16, the residual stream too": "--model.num-layers 12 --model.matmul-dtype bfloat16 "
    "--model.residual-dtype bfloat16",
    "hidden width: 1024": "--model.hidden-width 1024",
    "width: 64": "--model.width 64 --model.hidden-width 128",
    "width: 256": "--model.width 256 --model.hidden-width 512",
    "width: 512": _WIDE,
    "width: 512, layers: 6, bfloat16": (f"{_WIDE} --model.num-layers 6 --model.matmul-dtype bfloat16", "width: 512"),
    "dropout: 0.2": "--model.dropout 0.2",
    "7 passes": _LONG,
    "7 passes, dropout: 0.1": (f"{_LONG} --model.dropout 0.1", "7 passes"),
    "7 passes, dropout: 0.2": (f"{_LONG} --model.dropout 0.2", "7 passes"),
    "weight decay: 0.1": "--optimizer.weight-decay 0.1",
    "moving average: 0.99": "--optimizer.ema-decay 0.99",
    "Muon": "--optimizer.kind muon",
    "rate: 3e-4": "--optimizer.learning-rate 3e-4",
    "rate: 3e-3": "--optimizer.learning-rate 3e-3",
    "false genes: up to half": "--objective.false-genes 0.5",
    "library weights: pathways 3 times": "--data.library-weights BioPlanet_2019 3 ConsensusPathDB_2015 3 "
    "PathwayForte_MPath 3 Reactome_2022 3",
    f"{FULL}base": _FULL,
    f"{FULL}library balance 0.5": f"{_FULL} --data.library-balance 0.5",
    f"{FULL}cluster balance 0.5": f"{_FULL} --data.cluster-balance 0.5",
}


def main() -> None:
    """Run the rows, in order, and print the table."""
    names = sys.argv[1:] or [name for name in ROWS if not name.startswith(FULL)]
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"error: {unknown[0]}: no such row; the rows are {', '.join(ROWS)}")
    for index, name in enumerate(names):
        _, against = row(name)
        if against not in names[: index + 1] and not (_directory(against) / RECALL).exists():
            sys.exit(f"error: {name}: is compared with {against}, which has not been run here; name {against} first")
    for name in names:
        keep(name, *row(name))
    print(table())


def _train(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "tcc_jax.train", *arguments], check=True)


def keep(name: str, arguments: str, against: str, train: Callable[[Sequence[str]], None] = _train) -> None:
    """Run a row and write what came out into the results.

    Args:
        name: of the row.
        arguments: what it changes.
        against: the row that its recall of each set is compared with, run before or the same.
        train: called with the arguments of `python -m tcc_jax.train`; another one may change what the decoder does.
    """
    outcome = _run(name, arguments, against, train)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    results["rows"][name] = outcome
    results |= {"config": CONFIG, "machine": f"{platform.system()} {platform.machine()}"}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def row(name: str) -> tuple[str, str]:
    """Return what a row changes, and the row it is compared with."""
    entry = ROWS[name]
    return entry if isinstance(entry, tuple) else (entry, f"{FULL}base" if name.startswith(FULL) else "base")


def _directory(name: str) -> Path:
    return RUNS / "".join(letter if letter.isalnum() else "-" for letter in name)


def _without_long_sets() -> None:
    """Write the small corpus with its long training sets in the test split, which nothing here reads."""
    corpus = open_corpus(SMALL)
    train, test = SPLITS.index("train"), SPLITS.index("test")
    splits = np.where((corpus.splits == train) & (corpus.lengths > MOST_GENES), test, corpus.splits)
    left = np.repeat(splits == train, corpus.lengths)
    counts = np.bincount(corpus.tokens[left], minlength=corpus.vocabulary.size)
    vocabulary = replace(corpus.vocabulary, counts=counts)
    with atomic_folder(SHORT) as folder:
        write_corpus(folder, replace(corpus, splits=splits.astype(np.uint8), vocabulary=vocabulary))


def _run(name: str, arguments: str, against: str, train: Callable[[Sequence[str]], None]) -> dict[str, Any]:
    directory = _directory(name)
    if str(SHORT) in arguments and not SHORT.exists():
        _without_long_sets()
    began = time.perf_counter()
    train([CONFIG, "--run.directory", str(directory), *arguments.split()])
    seconds = time.perf_counter() - began
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "tokens_per_second" in line]
    model = tcc_jax.load(directory)
    corpus = open_corpus(model.checkpoint.config.data.corpus)
    masked = validation_masks(corpus, len(corpus.indices("validation")))
    weights = np.ones(len(masked))
    if name.startswith(FULL):
        masked, weights = _alike_by_library(masked)
    methods = {"model": model.score}
    if name == against:
        neighbours = SetNeighbours(TrainingIndex(corpus), 500, 3.0)
        methods |= {"popularity": popularity(corpus.vocabulary), "set-kNN": neighbours}
    recalls = {}
    for method, scorer in methods.items():
        parts = [masked[start : start + 128] for start in range(0, len(masked), 128)]
        recalls[method] = np.concatenate(
            [recall_of_each(np.asarray(scorer([one.visible for one in part])), part) for part in parts]
        )
    np.save(directory / RECALL, recalls["model"])
    return {
        "arguments": arguments,
        "seconds": round(seconds, 1),
        "epochs": steps[-1]["epoch"],
        "training_loss": steps[-1]["loss"],
        "recall": {method: _with_interval(values * weights) for method, values in recalls.items()},
        "against": against,
        "difference": _with_interval((recalls["model"] - np.load(_directory(against) / RECALL)) * weights),
    }


def _alike_by_library(masked: list[MaskedSet]) -> tuple[list[MaskedSet], np.ndarray]:
    """Return the first sets of each library, and weights of mean 1 that make every library count alike."""
    taken: collections.Counter[str] = collections.Counter()
    chosen = []
    for one in masked:
        if taken[one.library] < SETS_A_LIBRARY:
            taken[one.library] += 1
            chosen.append(one)
    weights = np.array([1 / taken[one.library] for one in chosen])
    return chosen, weights / weights.mean()


def _with_interval(values: np.ndarray) -> list[float]:
    low, high = bootstrap(values[:, None])
    return [float(values.mean()), float(low[0]), float(high[0])]


def table() -> str:
    """Return the results as a Markdown table: the rows in the order of `ROWS`, then those of other scripts."""
    rows = json.loads(RESULTS.read_text())["rows"]
    lines = ["| row | recall, 95 % interval | against base | verdict | passes | s |", "|---|---|---|---|--:|--:|"]
    for name in [*(name for name in ROWS if name in rows), *(name for name in rows if name not in ROWS)]:
        row = rows[name]
        difference, low, high = row["difference"]
        against = verdict = ""
        if name != row["against"]:
            other = "" if row["against"] in ("base", f"{FULL}base") else f" from *{row['against']}*"
            against = f"{difference:+.4f} ({low:+.4f} to {high:+.4f}){other}"
            verdict = "better" if low > 0 else "worse" if high < 0 else "level"
        for method, recall in row["recall"].items():
            label = name if method == "model" else method
            rest = (
                f"{against} | {verdict} | {row['epochs']:.1f} | {row['seconds']:.0f}" if method == "model" else " | | |"
            )
            lines.append("| {} | {:.4f} ({:.4f} to {:.4f}) | {} |".format(label, *recall, rest))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
