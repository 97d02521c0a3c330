"""`python -m tcc_jax.aot CONFIG.toml --topology v5e:2x4`: compile the training step for hardware that is not here.

Prints what the step needs of each device's memory against what there is; exits with 1 if it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tcc_jax.config import Config, toml_first, validate
from tcc_jax.files import check_output_file
from tcc_jax.storage import as_path
from tcc_jax.terminal import UserError, command, log, parse_arguments, table

if TYPE_CHECKING:
    from tcc_jax.training.ahead import Compiled, Target


@dataclass(frozen=True)
class Options:
    """Compile the training step of a run for TPUs or GPUs that are not here, and say whether it fits."""

    topology: str
    """Devices: GENERATION:SHAPE for TPUs, such as v5e:2x4 (v4, v5e, v5p, v6e, tpu7x), or h200:COUNT."""
    fit: bool = False
    """Look for the largest training.batch_rows that fits, instead of compiling the one of the configuration."""
    vocabulary_size: int = 0
    """Ids in the vocabulary; 0 takes that of data.corpus, or 44,902 if the corpus is not here."""
    target_config: str | None = None
    """Description of another GPU than an H200: a text-format stream_executor.GpuTargetConfigProto."""
    json: str | None = None
    """File to write the result to."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@command
def main() -> None:
    """Run the command."""
    options = _parse(sys.argv[1:])
    # The compilers need no device: they must neither wait for one, nor for its lock, nor ask Google what it is.
    os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    from tcc_jax.training.ahead import compile_step, find_target, largest_batch

    target = find_target(options.topology, options.target_config)
    config, size = options.config, _vocabulary_size(options)
    log(f"{len(target.devices)} x {target.devices[0].device_kind}, {size:,} ids; a compilation may take minutes")
    attempts: list[Compiled] = []

    def report(compiled: Compiled) -> None:
        attempts.append(compiled)
        log(_in_words(compiled))

    if options.fit:
        largest_batch(config, size, target, report)
    else:
        report(compile_step(config, size, target))
    _print(config, target, attempts)
    if options.json:
        result = {"format_version": 1, "topology": target.name, "devices": len(target.devices)}
        result |= {"memory_bytes": target.memory_bytes, "vocabulary_size": size, "config": config.to_dict()}
        result |= {"attempts": [dataclasses.asdict(compiled) for compiled in attempts]}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not any(compiled.fits for compiled in attempts):
        raise SystemExit(1)


def _parse(arguments: list[str]) -> Options:
    program = "python -m tcc_jax.aot CONFIG.toml"
    config, arguments = toml_first(arguments, f"{program} --topology v5e:2x4")
    options = parse_arguments(Options, arguments, default=Options(tyro.MISSING, config=config), prog=program)
    if options.vocabulary_size and not 32 <= options.vocabulary_size <= 2**24:
        raise UserError(f"--vocabulary-size {options.vocabulary_size}: must lie between 32 and {2**24:,}")
    if options.json:
        check_output_file(options.json)
    return dataclasses.replace(options, config=validate(options.config, "the configuration"))


def _vocabulary_size(options: Options) -> int:
    if options.vocabulary_size:
        return options.vocabulary_size
    if not as_path(options.config.data.corpus).is_dir():
        return 44_902
    from tcc_jax.corpus.store import open_corpus

    return open_corpus(options.config.data.corpus).vocabulary.size


def _in_words(compiled: Compiled) -> str:
    rows, seconds = f"{compiled.batch_rows:,} rows", f"{compiled.seconds:.0f} s"
    if compiled.failed:
        return f"error: {rows}: the compiler failed ({seconds}): {compiled.reason}"
    verdict = "fits" if compiled.fits else "does not fit"
    aside = "" if compiled.triton else f"; products by cuBLAS alone, since with Triton: {compiled.reason}"
    return f"{rows}: {verdict} ({seconds}{aside})"


def _print(config: Config, target: Target, attempts: list[Compiled]) -> None:
    def gib(count: int) -> str:
        return f"{count / 2**30:.2f}"

    rows = [
        [
            f"{compiled.batch_rows:,}",
            f"{compiled.batch_rows * config.training.row_length:,}",
            gib(compiled.state_bytes),
            ("unknown" if compiled.failed else "too much")
            if compiled.temporary_bytes is None
            else gib(compiled.temporary_bytes),
            gib(target.memory_bytes),
            "unknown" if compiled.failed else "yes" if compiled.fits else "no",
        ]
        for compiled in sorted(attempts, key=lambda compiled: compiled.batch_rows)
    ]
    print(table(["rows", "tokens a step", "state GiB", "temporary GiB", "of GiB on a device", "fits"], rows))
    if chosen := next((compiled.attention for compiled in attempts if compiled.attention), ""):
        print(f"attention: {chosen}")


if __name__ == "__main__":
    main()
