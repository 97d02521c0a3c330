"""`python -m tcc_jax.bench data|train|sample|checkpoint`: how fast this machine does it, on made-up data by default."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tcc_jax.benchmarking.synthetic import SMALLEST_VOCABULARY, synthetic_corpus
from tcc_jax.config import Config, from_dict, read_toml, validate
from tcc_jax.corpus.store import open_corpus
from tcc_jax.files import check_output_file
from tcc_jax.terminal import UserError, command, parse_arguments

_PROGRAM = "python -m tcc_jax.bench"
# A CPU runs a small model; the defaults of the configuration are the 120M model.
_CPU_SHAPE: dict[str, Any] = {
    "model": {"num_layers": 4, "width": 128, "num_heads": 4, "matmul_dtype": "float32"},
    "training": {"batch_rows": 32, "row_length": 256, "segments_per_row": 16},
}
_CPU_VOCABULARY, _VOCABULARY = 5_000, 36_000
_MOST_SETS = 10_000_000
_CPU_BATCH, _BATCH = 100, 1_000
_STEPS = {"data": 200, "train": 10, "sample": 10, "checkpoint": 1}


@dataclass(frozen=True)
class Options:
    """Measure the loader, a training step, completion or a checkpoint. Fields of the run follow as for train:
    --model.num-layers 6."""

    measure: tyro.conf.Positional[Literal["data", "train", "sample", "checkpoint"]]
    """What to measure."""
    json: Path | None = None
    """File to write: results, device, versions, configuration, command."""
    against: Path | None = None
    """An earlier such file of the same measure: its medians and the ratios are shown beside the new ones."""
    config: Path | None = None
    """TOML file of a run; else 12 layers of width 768, rows of 1024, or on a CPU 4 of 128, rows of 256."""
    corpus: Path | None = None
    """A prepared corpus; else random gene sets with lengths as in the real one."""
    vocabulary: int | None = None
    """Size of the random sets' vocabulary; 36,000, or on a CPU without --config 5,000."""
    sets: int = 20_000
    """Number of random sets."""
    windows: int = 5
    """Timed windows, of which the median, the smallest and the largest are reported."""
    steps: int | None = None
    """Steps in a window: batches of data (200), training steps (10), repeats of one set's completion (10)."""
    batch: int | None = None
    """Sets that `sample` completes at once, beside one set alone; 1,000, or on a CPU 100."""


@command
def main() -> None:
    """Run the command."""
    own, overrides = _separate(sys.argv[1:])
    options = parse_arguments(Options, own, prog=_PROGRAM)
    _check(options)
    # Imported here: --help and mistakes answer before the seconds that jax takes to import.
    import jax

    from tcc_jax.benchmarking import measures, records

    earlier = records.read_record(options.against, options.measure) if options.against else None
    on_cpu = jax.default_backend() == "cpu"
    small = on_cpu and not options.config
    config = read_toml(options.config, check=False) if options.config else from_dict(_CPU_SHAPE if small else {})
    config = validate(parse_arguments(Config, overrides, default=config, prog=_PROGRAM), "the command line")
    size = options.vocabulary or (_CPU_VOCABULARY if small else _VOCABULARY)
    corpus = open_corpus(options.corpus) if options.corpus else synthetic_corpus(size, options.sets)
    windows, steps = options.windows, options.steps or _STEPS[options.measure]
    batch = options.batch or (_CPU_BATCH if on_cpu else _BATCH)
    record = {"measure": options.measure, "command": [_PROGRAM, *sys.argv[1:]], **records.surroundings()}
    measure = {
        "data": lambda: measures.measure_data(config, corpus, windows, steps),
        "train": lambda: measures.measure_train(config, corpus, windows, steps),
        "sample": lambda: measures.measure_sample(config, corpus, windows, steps, batch),
        "checkpoint": lambda: measures.measure_checkpoint(config, corpus, windows),
    }[options.measure]
    results = measure()
    if attention := results.pop("attention", None):
        record["attention"] = attention
    record |= {
        "corpus": {"hash": corpus.hash, "sets": corpus.num_sets, "vocabulary": corpus.vocabulary.size},
        "config": config.to_dict(),
        "windows": windows,
        "steps_per_window": steps,
        "formula": measures.FORMULA,
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(records.as_table(results, earlier and earlier["results"]))
    if attention:
        print(f"attention: {attention}")
    if earlier and (unlike := records.differences(record, earlier)):
        print(f"unlike the earlier record: {'; '.join(unlike)}")
    if options.measure == "train" and results["mfu"] is None:
        print(f"mfu: no peak recorded for {record['device']}")


def _separate(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the command's own arguments and those of the run: flags with a dot, and the values after them."""
    own: list[str] = []
    overrides: list[str] = []
    kind = own
    for argument in arguments:
        if argument.startswith("--"):
            kind = overrides if "." in argument.partition("=")[0] else own
        kind.append(argument)
    return own, overrides


def _check(options: Options) -> None:
    for name in ("windows", "steps", "batch", "sets"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if options.corpus and options.vocabulary:
        raise UserError("--vocabulary: is for random sets; leave it out with --corpus")
    if options.vocabulary is not None and not SMALLEST_VOCABULARY <= options.vocabulary <= 2**24:
        raise UserError(f"--vocabulary {options.vocabulary}: must lie between {SMALLEST_VOCABULARY} and {2**24:,}")
    if options.sets > _MOST_SETS:
        raise UserError(f"--sets {options.sets}: must be at most {_MOST_SETS:,}")
    if options.json:
        check_output_file(options.json)


if __name__ == "__main__":
    main()
