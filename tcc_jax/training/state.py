"""The state of training: step, parameters and optimizer state, made where it will live."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tcc_jax.config import Config
from tcc_jax.model.decoder import END, Params, initial_params, proposable_ids, start_from_vectors
from tcc_jax.training.optimizer import make_optimizer
from tcc_jax.training.sharding import place_state, replicated


class TrainState(NamedTuple):
    """What a step takes and gives.

    Attributes:
        step: int32 scalar, optimizer steps taken.
        params: nested dicts of float32 arrays.
        optimizer: the state of the optax chain.
        skipped: int32 scalar, steps whose update was skipped because the loss or gradient was not finite.
        skipped_in_a_row: int32 scalar, how many of them were the last ones.
        average: moving average of the parameters, or an empty dict if none is kept.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    average: Params

    @property
    def evaluated(self) -> Params:
        """The parameters to evaluate and export: their average where one is kept."""
        return self.average or self.params


def create_state(
    config: Config, vocabulary_size: int, bias_V: np.ndarray | None, mesh: Mesh, vectors_VD: np.ndarray | None = None
) -> TrainState:
    """Return the state at step 0; every array is born on its devices.

    Args:
        config: the run; its seed decides the parameters.
        vocabulary_size: V, ids in the vocabulary.
        bias_V: [V] float32, the output bias to start from; None starts it at zero.
        mesh: the devices.
        vectors_VD: [V, D] float32, directions the embedding starts from (`corpus.spectral.spectral_vectors`); a zero
            vector leaves an id at its random start, and None leaves all.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, vocabulary_size, mesh))
    make = jax.jit(lambda *arrays: _initial(config, vocabulary_size, *arrays), out_shardings=shardings)
    arrays = (None if array is None else jax.device_put(array, replicated(mesh)) for array in (bias_V, vectors_VD))
    return make(*arrays)


def abstract_state(config: Config, vocabulary_size: int, mesh: Mesh) -> TrainState:
    """Return the state's shapes, types and shardings (`jax.ShapeDtypeStruct`), without making any array."""
    return place_state(jax.eval_shape(lambda: _initial(config, vocabulary_size)), mesh)


def frequency_bias(counts_V: np.ndarray, num_sets: int) -> np.ndarray:
    """Return the output bias at which an untrained decoder predicts each gene as often as the training sets hold it.

    Over all prefixes of a set in random order every gene is the target once, and <end> once: the logit of a gene is the
    log of its count and that of <end> the log of the number of sets, over their total, with half a count added to each.

    Args:
        counts_V: [V] int64, training sets that hold each gene, 0 for special ids (`Vocabulary.counts`).
        num_sets: number of training sets.

    Returns:
        [V] float32; 0 at the special ids that can never be proposed.
    """
    counts_V = counts_V.astype(np.float64)
    counts_V[END] = num_sets
    proposable_V = proposable_ids(len(counts_V))[: len(counts_V)]
    smoothed_V = np.where(proposable_V, counts_V + 0.5, 0)
    return np.log(np.where(proposable_V, smoothed_V / smoothed_V.sum(), 1)).astype(np.float32)


def _initial(
    config: Config, vocabulary_size: int, bias_V: jax.Array | None = None, vectors_VD: jax.Array | None = None
) -> TrainState:
    key = jax.random.key(config.run.seed)
    params = initial_params(config.model, vocabulary_size, config.training.row_length, key)
    if bias_V is not None:
        params["output_bias"] = params["output_bias"].at[:vocabulary_size].set(bias_V)
    if vectors_VD is not None:
        params = start_from_vectors(params, vectors_VD)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {}
    return TrainState(zero, params, optimizer.init(params), skipped=zero, skipped_in_a_row=zero, average=average)
