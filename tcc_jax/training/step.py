"""One step of training and one of evaluation: the only place of the package that is jitted for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tcc_jax.config import Config
from tcc_jax.model.decoder import Params, merge
from tcc_jax.model.objective import LOSSES, cut_positions
from tcc_jax.training.optimizer import learning_rate, make_optimizer
from tcc_jax.training.sharding import over_rows, replicated
from tcc_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# Streams of randomness drawn from the run's seed; the parameters use the seed's key itself.
_TRAIN_STREAM, _EVAL_STREAM = 1, 2


def make_train_step(config: Config, vocabulary_size: int, mesh: Mesh) -> Callable[[TrainState, Batch], Any]:
    """Return the jitted `train_step(state, batch) -> (state, metrics)`; it reuses the memory of the state it is given.

    A batch has `tokens` and `segments` [B, T] and `starts` and `gene_counts` [B, M], int32, its rows spread over the
    mesh. Metrics are scalars over the global batch: `loss_sum` (nats), `scored` (positions), `gradient_norm` (before
    clipping), `learning_rate`, `tokens` (useful ones), `sets`, `skipped` (1 if the loss or gradient was not finite: the
    parameters and the optimizer's state then stay as they were) and `skipped_in_a_row`, this step included. Randomness
    is a function of the seed and the step.
    """
    optimizer = make_optimizer(config.optimizer, config.training.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(_stream(config, _TRAIN_STREAM), state.step)

        def mean_loss(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            loss_sum, scored = _loss(config, vocabulary_size, params, batch, key, training=True)
            return loss_sum / jnp.maximum(scored, 1), (loss_sum, scored)

        gradient, (loss_sum, scored) = jax.grad(mean_loss, has_aux=True)(state.params)
        gradient_norm = optax.tree.norm(gradient)
        sound = jnp.isfinite(loss_sum) & jnp.isfinite(gradient_norm)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        new = (optax.apply_updates(state.params, updates), optimizer_state)
        params, optimizer_state = jax.tree.map(
            lambda after, before: jnp.where(sound, after, before), new, (state.params, state.optimizer)
        )
        skipped_in_a_row = jnp.where(sound, 0, state.skipped_in_a_row + 1)
        metrics = {
            "loss_sum": loss_sum,
            "scored": scored,
            "gradient_norm": gradient_norm,
            # A skipped update leaves the schedule where it was.
            "learning_rate": learning_rate(config.optimizer, config.training.steps, state.step - state.skipped),
            "tokens": jnp.sum(batch["segments"] > 0),
            "sets": jnp.sum(batch["gene_counts"] > 0),
            "skipped": 1 - sound,
            "skipped_in_a_row": skipped_in_a_row,
        }
        skipped = state.skipped + 1 - sound
        return TrainState(state.step + 1, params, optimizer_state, skipped, skipped_in_a_row), metrics

    whole, rows = replicated(mesh), over_rows(mesh)
    return jax.jit(train_step, donate_argnums=0, in_shardings=(whole, rows), out_shardings=(whole, whole))


def make_eval_step(config: Config, vocabulary_size: int, mesh: Mesh) -> Callable[[Params, Batch, np.int32], Any]:
    """Return the jitted `eval_step(params, batch, index) -> (loss_sum, scored)`, without dropout.

    `index` is the batch's number in the evaluation, int32: it decides the cut points, which are the same at every step.
    """

    def eval_step(params: Params, batch: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(_stream(config, _EVAL_STREAM), index)
        return _loss(config, vocabulary_size, params, batch, key, training=False)

    whole, rows = replicated(mesh), over_rows(mesh)
    return jax.jit(eval_step, in_shardings=(whole, rows, whole), out_shardings=whole)


def _loss(
    config: Config, vocabulary_size: int, params: Params, batch: Batch, key: jax.Array, *, training: bool
) -> tuple[jax.Array, jax.Array]:
    objective, tokens_BT, segments_BT = config.objective, batch["tokens"], batch["segments"]
    dropout_key, cut_key = jax.random.split(key)
    decoder = merge(config.model, vocabulary_size, config.training.row_length, params)
    h_BTD = decoder(tokens_BT, segments_BT, dropout_key if training else None)
    positions_BC = weights_BC = None
    if objective.cut_points:
        cuts = (objective.cut_points, objective.cut_low, objective.cut_high)
        drawn = cut_positions(cut_key, tokens_BT, batch["starts"], batch["gene_counts"], *cuts)
        positions_BC, weights_BC = (array_BMK.reshape(len(tokens_BT), -1) for array_BMK in drawn)
    return LOSSES[objective.kind](decoder, h_BTD, tokens_BT, segments_BT, positions_BC, weights_BC)


def _stream(config: Config, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.run.seed), stream)
