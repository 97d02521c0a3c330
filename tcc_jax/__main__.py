"""`python -m tcc_jax` (or `tcc-jax`): lists the commands, or runs one of them."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "prepare": "GMT files -> a prepared corpus: harmonised, filtered, deduplicated, split",
    "train": "a corpus and a TOML file -> a run directory with checkpoints and metrics",
    "eval": "a checkpoint and gene sets -> completions of unseen sets, with statistics and baselines",
    "complete": "a checkpoint and some genes -> the genes that belong with them",
    "export": "a checkpoint -> weights in safetensors, readable without Orbax or JAX",
    "aot": "a TOML file and a topology -> whether its training step fits TPUs or GPUs that are not here",
    "bench": "how fast this machine loads data, trains, completes and saves, and how that compares with before",
    "download": "Enrichr libraries and the HGNC table -> a folder of GMT files",
}


def main() -> None:
    """Run `tcc_jax.<command>`, or print one line for each command."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        sys.argv = [f"python -m tcc_jax.{arguments[0]}", *arguments[1:]]
        importlib.import_module(f"tcc_jax.{arguments[0]}").main()
        return
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"error: no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    print("usage: python -m tcc_jax.COMMAND --help\n")
    for name, summary in COMMANDS.items():
        print(f"  {name:<10} {summary}")


if __name__ == "__main__":
    main()
