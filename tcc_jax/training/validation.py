"""Evaluation while training: the loss, and the recall by a function that is passed in, on the validation sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from tcc_jax.config import Config
from tcc_jax.corpus.loader import BatchSource
from tcc_jax.corpus.store import Corpus
from tcc_jax.model.decoder import Params
from tcc_jax.training.sharding import replicated, shard_batch
from tcc_jax.training.state import TrainState

Poll = Callable[[], None]
Recall = Callable[[Params, int, Poll], float]
"""(parameters on one device, step, poll) -> share of the hidden genes found; calls `poll` between pieces of work."""
MakeRecall = Callable[[Config, Corpus], Recall]


class Abandoned(Exception):
    """An evaluation given up half-way: `poll` raises it when the run is asked to stop."""


def make_validation(
    config: Config,
    corpus: Corpus,
    eval_step: Callable,
    source: BatchSource | None,
    mesh: Mesh,
    make_recall: MakeRecall | None,
) -> Callable[[TrainState, int, Poll], dict[str, float]]:
    """Return `validate(state, step, poll) -> values`: the same numbers for the same parameters, whenever it is called.

    Args:
        config: the run.
        corpus: its corpus.
        eval_step: from `tcc_jax.training.step.make_eval_step`.
        source: batches of the validation sets; None if the corpus has none, then there are no values.
        mesh: the devices.
        make_recall: gives the function that measures `validation_recall`, or None.
    """
    if source is None:
        return lambda state, step, poll: {}
    num_batches = min(config.training.eval_steps, math.ceil(source.steps_per_epoch))
    recall = make_recall(config, corpus) if make_recall and config.training.recall_sets else None
    gather = jax.jit(lambda params: params, out_shardings=replicated(mesh))

    # The loop's guard is for steps; between them, what an evaluation moves makes nobody wait.
    @jax.transfer_guard("allow")
    def validate(state: TrainState, step: int, poll: Poll) -> dict[str, float]:
        sums = []
        # From step 0 each time: every evaluation sees the same batches.
        for index, batch in enumerate(itertools.islice(source.batches(), num_batches)):
            poll()
            sums.append(eval_step(state.evaluated, shard_batch(batch, mesh), np.int32(index)))
        loss_sum, scored = np.array(jax.device_get(sums), np.float64).sum(axis=0).tolist()
        values = {"validation_loss": loss_sum / max(scored, 1)}
        if recall:
            poll()
            values["validation_recall"] = recall(_on_one_device(gather(state.evaluated)), step, poll)
        return values

    return validate


def _on_one_device(params: Params) -> Params:
    device = jax.local_devices()[0]
    return jax.tree.map(lambda array: jax.device_put(array.addressable_data(0), device), params)
