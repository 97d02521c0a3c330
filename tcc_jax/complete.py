"""`python -m tcc_jax.complete`: propose the genes that belong with the given ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from tcc_jax.completion.options import CompleteOptions, Format
from tcc_jax.files import keep_compilations
from tcc_jax.terminal import command, parse_arguments


@command
def main() -> None:
    """Run the command."""
    options = parse_arguments(CompleteOptions, prog="python -m tcc_jax.complete")
    options.check()
    keep_compilations()
    # Imported here: --help and mistakes answer before the seconds that jax takes to import.
    from tcc_jax.completion.completions import write_completions

    write_completions(options, _format(options))


def _format(options: CompleteOptions) -> Format:
    if options.format is not None:
        return options.format
    ending = Path(options.out or "").suffix.removeprefix(".")
    if ending in get_args(Format):
        return ending  # type: ignore[return-value]
    return "table" if options.out is None and sys.stdout.isatty() else "tsv"


if __name__ == "__main__":
    main()
