"""`python -m tcc_jax.train CONFIG.toml [--section.field value]`: train a model, or go on with a run that stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tcc_jax.config import parse_command_line
from tcc_jax.terminal import run_command


def main() -> None:
    """Run the command."""
    run_command(_train)


def _train() -> None:
    config = parse_command_line(sys.argv[1:], command="train")
    _keep_compilations()
    # Imported here: --help and mistakes in the configuration answer before the seconds that jax takes to import.
    from tcc_jax.training.loop import train

    train(config)


def _keep_compilations() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "tcc_jax" / "compilations"))


if __name__ == "__main__":
    main()
