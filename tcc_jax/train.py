"""`python -m tcc_jax.train CONFIG.toml [--section.field value]`: train a model, or go on with a run that stopped.

SIGTERM, SIGINT, SIGHUP and a maintenance notice finish the step, save and exit with 0; a second SIGTERM or SIGINT ends
at once. Where another host of the run is gone without a word, the exit code is 75: the same command goes on.
Several hosts find each other under Slurm, Open MPI and on TPU slices; elsewhere by the [hosts] section of the
configuration or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

from __future__ import annotations

import contextlib
import sys

from tcc_jax.config import parse_command_line
from tcc_jax.files import keep_compilations
from tcc_jax.runs.preemption import Stop
from tcc_jax.terminal import command


@command
def main() -> None:
    """Run the command."""
    stop = Stop()
    # From here on, before the seconds that tyro and jax take to import, and to the end of the process.
    stop.hear_signals()
    config = parse_command_line(sys.argv[1:], command="train")
    keep_compilations()
    import jax

    from tcc_jax.runs.hosts import join_hosts

    peers = join_hosts(config.hosts)
    with peers or contextlib.nullcontext():
        if jax.default_backend() == "tpu":
            stop.watch_metadata()
        from tcc_jax.evaluation.recall import make_recall
        from tcc_jax.training.loop import train

        train(config, stop, make_recall, peers)


if __name__ == "__main__":
    main()
