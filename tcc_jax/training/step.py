"""One step of training and one of evaluation: the only place of the package that is jitted for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcc_jax.config import Config
from tcc_jax.model.attention import segment_offsets
from tcc_jax.model.decoder import Execution, Params, merge, padded_vocabulary_size
from tcc_jax.model.kernels import choose_backend, make_attend
from tcc_jax.model.objective import LOSSES, Beyond, cut_positions, remaining_set_loss, with_false_genes
from tcc_jax.terminal import UserError
from tcc_jax.training.optimizer import learning_rate, make_optimizer
from tcc_jax.training.sharding import over_rows, replicated, spread_heads
from tcc_jax.training.state import TrainState, abstract_state

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# Streams of randomness drawn from the run's seed; the parameters use the seed's key itself.
_TRAIN_STREAM, _EVAL_STREAM = 1, 2
# Logits a device holds at once. On a CPU, small chunks are as fast as any, at less than half the processor time of
# autodiff over the whole; an accelerator wants them in one piece, as far as its memory allows (on a TPU 2 GiB of
# bfloat16, on a GPU 8): cutting costs passes over the hidden states and the gradients.
_LOGITS_AT_ONCE = {"cpu": 2**22, "tpu": 2**30}
_LOGITS_AT_ONCE_ELSEWHERE = 2**32
# Microbatches in one pass of the loop. On a CPU a second one fills the cores that small operations leave idle; the
# activations of both may be held at once, for which an accelerator has no memory to spare.
_MICROBATCHES_AT_ONCE = {"cpu": 2}


def make_train_step(config: Config, vocabulary_size: int, mesh: Mesh) -> Any:
    """Return the jitted `train_step(state, batch) -> (state, metrics)`; it reuses the memory of the state it is given.

    A batch is one of `tcc_jax.corpus.loader.BatchSource`, its rows spread over the
    mesh. Metrics are scalars over the global batch: `loss_sum` (nats), `scored` (positions), `gradient_norm` (before
    clipping), `learning_rate`, `tokens` (useful ones), `keys` (that they attend to, in all), `sets`, `skipped` (1 if
    the loss or gradient was not finite: the parameters and the optimizer's state then stay as they were) and
    `skipped_in_a_row`, this step included. Randomness is a function of the seed and the step.
    """
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    loss_of = _make_loss(config, vocabulary_size, mesh, training=True)
    microbatches = config.training.microbatches

    def loss_and_gradient(params: Params, batch: Batch, key: jax.Array) -> Any:
        (loss_sum, scored), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch, key)
        return loss_sum, scored, gradient

    def accumulate(params: Params, batch: Batch, key: jax.Array) -> Any:
        # Every device cuts its own rows into parts, so that none moves to another device.
        parts = {
            name: jax.lax.with_sharding_constraint(
                jnp.swapaxes(array.reshape(-1, microbatches, *array.shape[1:]), 0, 1),
                NamedSharding(mesh, PartitionSpec(None, *over_rows(mesh).spec)),
            )
            for name, array in batch.items()
        }

        def add(carry: tuple[Any, Batch], key: jax.Array) -> tuple[tuple[Any, Batch], None]:
            sums, parts = carry
            # The next part is always the first of them. With an index in its place, XLA on a CPU looks a segment up by
            # that index again for every score of attention.
            part = {name: array[0] for name, array in parts.items()}
            parts = {name: jnp.roll(array, -1, axis=0) for name, array in parts.items()}
            return (jax.tree.map(jnp.add, sums, loss_and_gradient(params, part, key)), parts), None

        zero = jnp.zeros((), jnp.float32)
        sums = (zero, zero, jax.tree.map(jnp.zeros_like, params))
        at_once = _MICROBATCHES_AT_ONCE.get(mesh.devices.flat[0].platform, 1)
        keys = jax.random.split(key, microbatches)
        return jax.lax.scan(add, (sums, parts), keys, unroll=at_once)[0][0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(_stream(config, _TRAIN_STREAM), state.step)
        take = loss_and_gradient if microbatches == 1 else accumulate
        loss_sum, scored, gradient = take(state.params, batch, key)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(scored, 1), gradient)
        gradient_norm = optax.tree.norm(gradient)
        sound = jnp.isfinite(loss_sum) & jnp.isfinite(gradient_norm)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        new = (params, optimizer_state, _averaged(config, state, params))
        params, optimizer_state, average = jax.tree.map(
            lambda after, before: jnp.where(sound, after, before), new, (state.params, state.optimizer, state.average)
        )
        skipped = state.skipped + 1 - sound
        skipped_in_a_row = jnp.where(sound, 0, state.skipped_in_a_row + 1)
        segments_BT = batch["segments"]
        metrics = {
            "loss_sum": loss_sum,
            "scored": scored,
            "gradient_norm": gradient_norm,
            # A skipped update leaves the schedule where it was.
            "learning_rate": learning_rate(config.optimizer, config.training.steps, state.step - state.skipped),
            "tokens": jnp.sum(segments_BT > 0),
            "keys": jnp.sum(jnp.where(segments_BT > 0, segment_offsets(segments_BT) + 1, 0), dtype=jnp.float32),
            "sets": jnp.sum(batch["gene_counts"] > 0),
            "skipped": 1 - sound,
            "skipped_in_a_row": skipped_in_a_row,
        }
        return TrainState(state.step + 1, params, optimizer_state, skipped, skipped_in_a_row, average), metrics

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, vocabulary_size, mesh))
    whole, rows = replicated(mesh), over_rows(mesh)
    return jax.jit(train_step, donate_argnums=0, in_shardings=(layout, rows), out_shardings=(layout, whole))


def attention_backend(config: Config, mesh: Mesh) -> str:
    """Return the attention kernel that a run's steps use on a mesh, in all blocks but those that `attention_in_words`
    names.

    Raises:
        UserError: `compute.attention` asks for one that these devices or this model cannot have.
    """
    device, model, asked = mesh.devices.flat[0], config.model, config.compute.attention
    if not _whole_blocks(config):
        if asked not in ("auto", "xla"):
            raise UserError(
                f"compute.attention = {asked}: no block can use it, since with objective.cut_points the last one asks "
                "from few positions and model.num_layers is 1; choose auto or xla"
            )
        asked = "xla"
    return choose_backend(
        asked,
        platform=device.platform,
        compute_capability=float(device.compute_capability) if device.platform in ("gpu", "cuda") else None,
        row_length=config.training.row_length,
        head_size=model.width // model.num_heads,
        dtype=model.matmul_dtype,
        device_kind=device.device_kind,
    )


def attention_in_words(config: Config, mesh: Mesh) -> str:
    """Say which attention kernel a run's steps use, and in which blocks.

    Where cut points alone are scored, the last block asks from few positions and does so in plain XLA.
    """
    backend, whole, layers = attention_backend(config, mesh), _whole_blocks(config), config.model.num_layers
    if backend == "xla" or whole == layers:
        return backend
    return f"{backend} in {whole} of {layers} blocks, xla in the last, which asks from few positions"


def _whole_blocks(config: Config) -> int:
    return config.model.num_layers - bool(config.objective.cut_points)


def make_eval_step(config: Config, vocabulary_size: int, mesh: Mesh) -> Any:
    """Return the jitted `eval_step(params, batch, index) -> (loss_sum, scored)`, without dropout.

    `index` is the batch's number in the evaluation, int32: it decides the cut points, which are the same at every step.
    """
    loss_of = _make_loss(config, vocabulary_size, mesh, training=False)

    def eval_step(params: Params, batch: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return loss_of(params, batch, jax.random.fold_in(_stream(config, _EVAL_STREAM), index))

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, vocabulary_size, mesh).params)
    whole, rows = replicated(mesh), over_rows(mesh)
    return jax.jit(eval_step, in_shardings=(layout, rows, whole), out_shardings=whole)


def _make_loss(config: Config, vocabulary_size: int, mesh: Mesh, *, training: bool) -> Callable:
    objective, compute, row_length = config.objective, config.compute, config.training.row_length
    backend = attention_backend(config, mesh)
    attend = make_attend(backend, segments_per_row=config.training.segments_per_row)
    execution = Execution(
        attend=attend if backend == "xla" else spread_heads(attend, mesh),
        remat=compute.remat,
        scan_layers=compute.scan_layers,
        place=lambda x_BTD: jax.lax.with_sharding_constraint(x_BTD, over_rows(mesh)),
    )
    logits = _LOGITS_AT_ONCE.get(mesh.devices.flat[0].platform, _LOGITS_AT_ONCE_ELSEWHERE) * mesh.size
    tile = compute.logits_tile or logits // padded_vocabulary_size(vocabulary_size)

    def loss_of(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_BT, segments_BT = batch["tokens"], batch["segments"]
        dropout_key, cut_key, false_key = jax.random.split(key, 3)
        # Whole in width before the lookup and the logits: XLA would rather copy the activations to all devices.
        table = NamedSharding(mesh, PartitionSpec("tensor"))
        params = params | {"embedding": jax.lax.with_sharding_constraint(params["embedding"], table)}
        decoder = merge(config.model, vocabulary_size, row_length, params)
        shown_BT, replaced_BT = tokens_BT, None
        if training and objective.false_genes:
            shown_BT, replaced_BT = with_false_genes(
                false_key, tokens_BT, segments_BT, objective.false_genes, vocabulary_size
            )
        positions_BC = weights_BC = None
        if objective.cut_points:
            cuts = (objective.cut_points, objective.cut_low, objective.cut_high, batch.get("set_sizes"))
            drawn = cut_positions(cut_key, tokens_BT, batch["starts"], batch["gene_counts"], *cuts)
            positions_BC, weights_BC = (array_BMK.reshape(len(tokens_BT), -1) for array_BMK in drawn)
        h_BCD = decoder(shown_BT, segments_BT, dropout_key if training else None, execution, positions_BC)
        scored = (decoder, h_BCD, tokens_BT, segments_BT, positions_BC, weights_BC, replaced_BT, tile)
        if objective.prompt_genes:
            beyond = Beyond(batch["targets"], batch["set_sizes"] - batch["gene_counts"])
            return remaining_set_loss(*scored, beyond)
        return LOSSES[objective.kind](*scored)

    return loss_of


def _averaged(config: Config, state: TrainState, params: Params) -> Params:
    # While there are few steps to average over, the average follows fast and forgets where it started.
    updates = (state.step - state.skipped).astype(jnp.float32)
    decay = jnp.minimum(config.optimizer.ema_decay, (1 + updates) / (10 + updates))
    return (
        jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params) if state.average else {}
    )


def _stream(config: Config, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.run.seed), stream)
