"""`python -m tcc_jax.train CONFIG.toml [--section.field value]`: train a model, or go on with a run that stopped.

SIGTERM, SIGINT, SIGHUP and a maintenance notice finish the step, save and exit with 0; a second SIGTERM or SIGINT ends
at once. Where another host of the run is gone without a word, the exit code is 75: the same command goes on.
Several hosts find each other under Slurm, Open MPI and on TPU slices; elsewhere by the [hosts] section of the
configuration or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tcc_jax.config import parse_command_line
from tcc_jax.files import cache_folder
from tcc_jax.terminal import command
from tcc_jax.training.preemption import Stop

if TYPE_CHECKING:
    from tcc_jax.config import Config
    from tcc_jax.corpus.store import Corpus
    from tcc_jax.training.validation import Poll, Recall


@command
def main() -> None:
    """Run the command."""
    stop = Stop()
    # From here on, before the seconds that tyro and jax take to import, and to the end of the process.
    stop.hear_signals()
    config = parse_command_line(sys.argv[1:], command="train")
    _keep_compilations()
    import jax

    from tcc_jax.training.hosts import join_hosts

    peers = join_hosts(config.hosts)
    with peers or contextlib.nullcontext():
        if jax.default_backend() == "tpu":
            stop.watch_metadata()
        from tcc_jax.training.loop import train

        train(config, stop, _make_recall, peers)


def _keep_compilations() -> None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compilations"))


def _make_recall(config: Config, corpus: Corpus) -> Recall:
    """Return the recall on some validation sets with 80 % of their genes hidden, as `eval` measures it."""
    import numpy as np

    from tcc_jax.completion.model import Model
    from tcc_jax.completion.protocol import genes_of, mask_sets
    from tcc_jax.completion.ranker import rank
    from tcc_jax.completion.sets import sets_from_corpus
    from tcc_jax.training.checkpoint import LoadedCheckpoint

    sets = sets_from_corpus(corpus, "validation")[: config.training.recall_sets]
    masked, _ = mask_sets(sets, genes_of(corpus.vocabulary.size), seed=config.run.seed)

    def recall(params: dict, step: int, poll: Poll) -> float:
        model = Model(LoadedCheckpoint({}, config, corpus.vocabulary, params, Path(config.run.directory), step))
        drawn, _ = rank(
            model.score,
            [entry.visible for entry in masked],
            [entry.drawn_count for entry in masked],
            lambda count: poll(),
        )
        shares = [
            np.isin(ids, entry.hidden).sum() / len(entry.hidden) for ids, entry in zip(drawn, masked, strict=True)
        ]
        return float(np.mean(shares)) if shares else 0.0

    return recall


if __name__ == "__main__":
    main()
