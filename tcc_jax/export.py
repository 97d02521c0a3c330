"""`python -m tcc_jax.export --checkpoint DIR --out DIR`: weights in safetensors, readable without Orbax or JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tcc_jax.terminal import command, parse_arguments


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    checkpoint: Path
    """A run directory (its latest step), or one step inside it (RUN/checkpoints/STEP)."""
    out: Path
    """Folder to write: model.safetensors, config.json and genes.tsv."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of the arrays; bfloat16 halves the size, int8 with a scale for each row of a matrix quarters it."""
    overwrite: bool = False
    """Take the place of a folder that is there."""


@command
def main() -> None:
    """Run the command."""
    options = parse_arguments(
        Options, prog="python -m tcc_jax.export", description="Export a checkpoint as safetensors, JSON and a table."
    )
    # Imported here: --help and mistakes answer before the seconds that jax takes to import.
    from tcc_jax.runs.checkpoint import read_checkpoint
    from tcc_jax.runs.exports import write_export

    checkpoint = read_checkpoint(options.checkpoint)
    write_export(checkpoint, options.out, options.dtype, overwrite=options.overwrite)
    print(f"{options.out}: step {checkpoint.step:,}, {options.dtype}")


if __name__ == "__main__":
    main()
