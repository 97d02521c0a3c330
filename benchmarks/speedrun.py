"""Time to quality: `python -m benchmarks.speedrun CONFIG --gmt tcc1000.gmt --drawn-counts TABLE --out FILE.json`.

Makes the state that CONFIG starts from, trains it, completes the reference sets at the start, at steps that grow by a
quarter or more and at the end, and tells when each mark was passed. Nothing is chosen by what is measured.

Seconds are those of `tcc_jax.training.loop.train` up to a step, without the measurements: reading and packing,
compilation, steps and the validation's loss. The start (spectral vectors) is counted apart, and both together are given
beside. Imports are in neither, nor is the one checkpoint, written at the end; the whole command's
time holds them. RUN-start holds the start and RUN-export the final weights in bfloat16. Run from the repository's root.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tyro

from tcc_jax.config import Config, read_toml, validate
from tcc_jax.corpus.store import Corpus, open_corpus
from tcc_jax.corpus.vocabulary import Vocabulary, genes_of
from tcc_jax.files import keep_compilations
from tcc_jax.terminal import UserError, command, log, parse_arguments

if TYPE_CHECKING:  # It imports jax, which must not be before `keep_compilations`.
    from tcc_jax.baselines import Scorer

_ALPHA = 0.05
# The goals: significant sets and recall with as many genes drawn as hidden, then with the original's drawn counts.
MARKS: tuple[tuple[str, float], ...] = (
    ("hidden_significant", 660),
    ("hidden_significant", 900),
    ("hidden_significant", 930),
    ("hidden_recall", 0.33),
    ("recorded_significant", 950),
    ("recorded_recall", 0.40),
)
_MEANING = {"hidden": "the hidden count", "recorded": "the original's drawn counts"}
# A step is measured where it is so many times the last one that was.
_GROWTH = 1.25


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
    """Steps before the first measurement; the others are at multiples of it."""
    steps: int = 0
    """Steps of the run, over which its schedule goes; 0 takes those of the configuration."""
    start: Literal["host", "device"] = "host"
    """Where the vectors of a spectral start are made: as `train` makes them, or by benchmarks/device_spectral.py."""
    limit: float = 0
    """Seconds of this command, measurements included, after which training stops where it is; 0 sets no limit."""


class Seen(NamedTuple):
    """What a run has seen up to a step: sets, useful tokens, and the arithmetic for them."""

    sets: int
    tokens: int
    flops: float


@command
def main() -> None:
    """Run the command."""
    began = time.perf_counter()
    options = parse_arguments(Options, prog="python -m benchmarks.speedrun")
    config, corpus = prepare(options)
    directory = Path(config.run.directory)
    start, export = (directory.with_name(f"{directory.name}-{name}") for name in ("start", "export"))
    for folder in (directory, start, export):
        if folder.exists():
            raise UserError(f"{folder}: exists; remove it, or choose another run.directory than {config.run.directory}")
    keep_compilations()
    import jax

    from tcc_jax.runs.checkpoint import packages, read_checkpoint
    from tcc_jax.runs.exports import write_export

    reference = read_reference(options, corpus.vocabulary)
    start_seconds = write_start(config, corpus, start, on_device=options.start == "device")
    log(f"{start}: the start, {start_seconds:.1f} s")
    run = Run(config, corpus, reference, start_seconds)
    run.measure(read_checkpoint(start))
    run.train(start, options.every, began + options.limit if options.limit else None)
    final = read_checkpoint(directory)
    if run.points[-1]["step"] != final.step:
        run.measure(final)
    write_export(final, export, "bfloat16")
    record = {
        "config": config.to_dict(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": packages(),
        "start": options.start,
        "start_seconds": round(start_seconds, 2),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "points": run.points,
        "marks": first_points(run.points),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def prepare(options: Options) -> tuple[Config, Corpus]:
    """Return the run, with the steps asked for, and its corpus.

    Raises:
        UserError: a corpus or configuration that cannot be used, or a number of steps.
    """
    if options.every < 1 or options.steps < 0:
        raise UserError("--every must be at least 1 and --steps at least 0")
    config = read_toml(options.config)
    if options.steps:
        training = dataclasses.replace(config.training, steps=options.steps)
        config = validate(dataclasses.replace(config, training=training), str(options.config))
    return config, open_corpus(config.data.corpus)


def write_start(config: Config, corpus: Corpus, out: Path, *, on_device: bool = False) -> float:
    """Write the parameters that a run starts from as an export, and return the seconds it took to make them."""
    import jax

    from benchmarks.device_spectral import device_vectors
    from tcc_jax.corpus.spectral import spectral_vectors
    from tcc_jax.runs.checkpoint import LoadedCheckpoint, describe
    from tcc_jax.runs.exports import write_export
    from tcc_jax.training.sharding import make_mesh
    from tcc_jax.training.state import create_state, frequency_bias

    began, objective, vocabulary = time.perf_counter(), config.objective, corpus.vocabulary
    num_sets = len(corpus.indices("train"))
    bias_V = frequency_bias(vocabulary.counts, num_sets) if objective.frequency_bias else None
    make_vectors = device_vectors if on_device else spectral_vectors
    vectors_VD = make_vectors(corpus, config.model.width) if objective.spectral_start else None
    params = create_state(config, vocabulary.size, bias_V, make_mesh(config), vectors_VD).params
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    meta = describe(config, corpus, 0, 0.0)
    write_export(LoadedCheckpoint(meta, config, vocabulary, params, out, 0), out)
    return seconds


class Run:
    """A run that is measured as it goes.

    Attributes:
        points: the measurements, by step.
    """

    def __init__(self, config: Config, corpus: Corpus, reference: Reference, start_seconds: float) -> None:
        """Nothing is trained yet; `start_seconds` are those of the start."""
        self.config, self.corpus, self.reference, self.start_seconds = config, corpus, reference, start_seconds
        self.points: list[dict[str, Any]] = []
        self._seconds, self._seen = 0.0, count_seen(config, corpus)

    def measure(self, checkpoint: Any, **values: float) -> None:
        """Complete the reference sets with a checkpoint, after the seconds of training so far."""
        from tcc_jax.completion.model import Model

        began, step = time.perf_counter(), checkpoint.step
        point = {"step": step, "seconds": round(self._seconds, 2)}
        point |= {"seconds_with_start": round(self._seconds + self.start_seconds, 2)}
        point |= self._seen(step)._asdict() | values
        point |= measure(Model(checkpoint).score, self.reference, self.corpus.vocabulary.size)
        point["measured_in"] = round(time.perf_counter() - began, 2)
        self.points.append(point)
        print(json.dumps(point), flush=True)

    def train(self, start: Path, every: int, until: float | None) -> None:
        """Train from an export, to the end or to the first multiple of `every` after `until` on the clock."""
        from tcc_jax.evaluation.recall import make_recall
        from tcc_jax.runs.checkpoint import LoadedCheckpoint
        from tcc_jax.runs.preemption import Stop
        from tcc_jax.training.loop import train

        config, steps = self.config, self.config.training.steps
        training = dataclasses.replace(
            config.training, eval_every=every, recall_sets=max(config.training.recall_sets, 1)
        )
        # The best checkpoint is not looked for, and only the last one is written.
        checkpoint = dataclasses.replace(
            config.checkpoint, every_steps=steps, every_minutes=0.0, keep=1, keep_best=False, init_from=str(start)
        )
        config = dataclasses.replace(config, training=training, checkpoint=checkpoint)
        if not len(self.corpus.indices("validation")):
            raise UserError(f"{self.corpus.path}: no validation sets: nothing is measured while training")
        began, stop = time.perf_counter(), Stop()

        def make(config: Config, corpus: Corpus) -> Callable[..., float]:
            validation_recall = make_recall(config, corpus)

            def recall(params: Any, step: int, poll: Callable[[], None]) -> float:
                nonlocal began
                called = time.perf_counter()
                self._seconds += called - began
                value = validation_recall(params, step, poll)
                if is_due(step, steps, self.points[-1]["step"]):
                    where = Path(config.run.directory)
                    loaded = LoadedCheckpoint({}, config, corpus.vocabulary, params, where, step)
                    self.measure(loaded, validation_recall=round(value, 4))
                if until is not None and time.perf_counter() > until and step < steps:
                    stop.request(f"--limit: out of time at step {step:,}")
                began = time.perf_counter()
                return value

            return recall

        with stop:
            train(config, stop, make)
        # What came after the last measurement, and the checkpoint.
        if self.points[-1]["step"] < steps:
            self._seconds += time.perf_counter() - began


def is_due(step: int, steps: int, last: int) -> bool:
    """Return whether a step is measured, the last one that was being `last`."""
    return step == steps or step >= _GROWTH * last


def count_seen(config: Config, corpus: Corpus) -> Callable[[int], Seen]:
    """Return the function that gives what a run has seen at a step, by the plan of its rows.

    Where cut points alone are scored, arithmetic counts for as many positions as there are cut points in a set.
    """
    from tcc_jax.corpus.loader import BatchSource
    from tcc_jax.training.flops import flops_per_token

    source = BatchSource(config, corpus, "train")
    num_sets, num_tokens = len(source.plan.slot_lengths), int(source.plan.slot_lengths.sum())
    scored = config.objective.cut_points * num_sets / num_tokens or None
    flops = flops_per_token(config, corpus.vocabulary.size, None, scored)

    def seen(step: int) -> Seen:
        epochs = step / source.steps_per_epoch
        tokens = round(epochs * num_tokens)
        return Seen(round(epochs * num_sets), tokens, tokens * flops)

    return seen


class Reference(NamedTuple):
    """The reference sets and their published tables."""

    sets: list[Any]
    counts: list[Any]


def read_reference(options: Options, vocabulary: Vocabulary) -> Reference:
    """Return the reference sets, and their published tables."""
    from tcc_jax.completion.sets import GeneFinder, read_sets
    from tcc_jax.corpus.gmt import Problems
    from tcc_jax.corpus.symbols import SymbolTable
    from tcc_jax.evaluation.protocol import read_drawn_counts

    finder = GeneFinder(SymbolTable.read(options.hgnc), vocabulary)
    sets = list(read_sets([str(options.gmt)], finder, Problems(), "description"))
    return Reference(sets, read_drawn_counts(options.drawn_counts, sets))


def measure(scorer: Scorer, reference: Reference, size: int) -> dict[str, float]:
    """Return the significant sets and the recall, with as many genes drawn as hidden and as the original drew."""
    from tcc_jax.evaluation.metrics import run_method
    from tcc_jax.evaluation.protocol import mask_last_genes

    candidates_V = genes_of(size)
    scorer, found = remembered(scorer), {}
    for drawn in _MEANING:
        masked = mask_last_genes(*reference, drawn == "hidden", int(candidates_V.sum()))
        outcome = run_method("model", scorer, [masked], candidates_V)
        found[f"{drawn}_significant"] = int(outcome.significant(_ALPHA).sum())
        found[f"{drawn}_recall"] = round(float(outcome.per_set("recall").mean()), 4)
    return found


def remembered(scorer: Scorer) -> Scorer:
    """Return a scorer that asks `scorer` once for the same batch: both counts are drawn from the same scores."""
    kept: dict[bytes, np.ndarray] = {}

    def score(visible: Sequence[np.ndarray]) -> np.ndarray:
        key = b"|".join(np.asarray(ids, np.int32).tobytes() for ids in visible)
        if key not in kept:
            kept[key] = np.asarray(scorer(visible), np.float32)
        return kept[key]

    return score


def first_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each mark its measure, its value and the first point that reaches it, or None."""
    return [
        {"measure": name, "mark": mark, "point": next((point for point in points if point[name] >= mark), None)}
        for name, mark in MARKS
    ]


def table(record: dict[str, Any]) -> str:
    """Return when each mark was passed, and what the start and the last step have."""
    lines = ["| passes | step | seconds | with the start | sets seen | FLOPs |", "|---|--:|--:|--:|--:|--:|"]
    for passed in record["marks"]:
        drawn, _, name = passed["measure"].partition("_")
        mark = f"{passed['mark']:g} {name}, {_MEANING[drawn]}"
        row, point = "not reached | - | - | - | -", passed["point"]
        if point:
            row = f"{point['step']:,} | {point['seconds']:.1f} | {point['seconds_with_start']:.1f} | "
            row += f"{point['sets']:,} | {point['flops']:.2g}"
        lines.append(f"| {mark} | {row} |")
    for point in [record["points"][0], record["points"][-1]]:
        lines += ["", f"At step {point['step']:,}, after {point['seconds']:.0f} s on {record['device']}:"]
        for drawn, meaning in _MEANING.items():
            numbers = f"{point[drawn + '_significant']} significant, recall {point[drawn + '_recall']:.3f}"
            lines.append(f"{numbers} at {meaning}.")
    lines.append(f"The start took {record['start_seconds']:.0f} s, the whole command {record['wall_seconds']:.0f} s.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
