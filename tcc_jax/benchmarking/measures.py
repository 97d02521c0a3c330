"""What is measured: the loader, a step of training, completion, and a checkpoint. On one host; all of its devices.

A measurement warms up, then takes several windows, and waits for the device only at the end of each. A result is a
number, or the median, min, max and windows of one, or None where the device does not tell.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tcc_jax.benchmarking.records import spread
from tcc_jax.completion.model import Model
from tcc_jax.completion.sampler import Sampling
from tcc_jax.config import Config, MeshConfig
from tcc_jax.corpus.loader import Batch, BatchSource
from tcc_jax.corpus.store import Corpus
from tcc_jax.model.decoder import count_parameters
from tcc_jax.runs.checkpoint import LoadedCheckpoint, describe, restore_state
from tcc_jax.runs.saving import CheckpointWriter, step_folder
from tcc_jax.storage import temporary_folder
from tcc_jax.terminal import UserError
from tcc_jax.training.flops import flops_per_token, peak_flops
from tcc_jax.training.sharding import make_mesh, shard_batch
from tcc_jax.training.state import TrainState, create_state
from tcc_jax.training.step import attention_in_words, make_train_step

FORMULA = (
    "mfu = useful tokens/s x (6 x matmul parameters, the tied head once, + 6 L D T; head and last block only for "
    "scored positions) / (devices x peak FLOP/s); mfu_segments has 12 L D x keys, those of a token's own segment, "
    "in place of 6 L D T"
)

_WARM_UP = 3
_VISIBLE = 0.2
_LONGEST_COMPLETED = 300
_Results = dict[str, Any]


def measure_data(config: Config, corpus: Corpus, windows: int, steps: int) -> _Results:
    """Measure the loader alone, in one process with its threads: windows of `steps` batches.

    Returns:
        useful_tokens_per_second, sets_per_second, planning_seconds (the packing of an epoch), fill (share of tokens
        that are not padding, over an epoch) and rows_per_epoch.
    """
    began = time.perf_counter()
    source = BatchSource(config, corpus, "train")
    planning_seconds = time.perf_counter() - began
    batches = source.batches()
    # Past what is read ahead while nobody takes it.
    for _ in range(max(_WARM_UP, 16)):
        next(batches)
    rates = []
    for _ in range(windows):
        tokens = sets = 0
        began = time.perf_counter()
        for _ in range(steps):
            batch = next(batches)
            tokens, sets = tokens + useful_tokens(batch), sets + int(np.count_nonzero(batch["gene_counts"]))
        seconds = time.perf_counter() - began
        rates.append((tokens / seconds, sets / seconds))
    return {
        "useful_tokens_per_second": spread([rate for rate, _ in rates]),
        "sets_per_second": spread([rate for _, rate in rates]),
        "planning_seconds": planning_seconds,
        "fill": source.plan.fullness,
        "rows_per_epoch": source.plan.num_rows,
    }


def measure_train(config: Config, corpus: Corpus, windows: int, steps: int) -> _Results:
    """Measure training: windows of `steps` steps, each on a batch of its own, made before the clock starts.

    Returns:
        useful_tokens_per_second, sets_per_second, step_ms; mfu and mfu_segments (`FORMULA`, scored positions as in the
        last step; None without a recorded peak); flops_per_token; compile_seconds (the first step less a median one);
        data_share (time to make a batch in one thread over the time of a step); loss (of the last step); memory_bytes
        (peak of a device; None where it does not tell); parameters; attention (the kernel that was chosen).
    """
    size, mesh = corpus.vocabulary.size, make_mesh(config)
    state = create_state(config, size, None, mesh)
    parameters = count_parameters(state.params)
    train = Trainer(state, make_train_step(config, size, mesh), mesh)
    began = time.perf_counter()
    batches = train_batches(config, corpus, _WARM_UP + windows * steps)
    batch_seconds = (time.perf_counter() - began) / len(batches)
    first_seconds = train.seconds(batches[:1])
    train.seconds(batches[1:_WARM_UP])
    parts = [batches[start : start + steps] for start in range(_WARM_UP, len(batches), steps)]
    seconds = [train.seconds(part) for part in parts]
    step_seconds = spread([duration / steps for duration in seconds])
    tokens = [sum(map(useful_tokens, part)) for part in parts]
    sets = [sum(int(np.count_nonzero(batch["gene_counts"])) for batch in part) for part in parts]
    rates = [count / duration for count, duration in zip(tokens, seconds, strict=True)]
    keys_per_token = sum(map(_visible_keys, batches)) / sum(map(useful_tokens, batches))
    scored = train.scored_per_token()
    flops = flops_per_token(config, size, None, scored), flops_per_token(config, size, keys_per_token, scored)
    device = mesh.devices.flat[0]
    peak = peak_flops(device.device_kind)
    shares = [None if peak is None else [rate * each / (mesh.size * peak) for rate in rates] for each in flops]
    memory = device.memory_stats() or {}
    return {
        "useful_tokens_per_second": spread(rates),
        "sets_per_second": spread([count / duration for count, duration in zip(sets, seconds, strict=True)]),
        "step_ms": spread([1000 * duration / steps for duration in seconds]),
        "mfu": shares[0] and spread(shares[0]),
        "mfu_segments": shares[1] and spread(shares[1]),
        "flops_per_token": flops[0],
        "compile_seconds": first_seconds - step_seconds["median"],
        "data_share": batch_seconds / step_seconds["median"],
        "loss": train.loss(),
        "memory_bytes": memory.get("peak_bytes_in_use"),
        "parameters": parameters,
        "attention": attention_in_words(config, mesh),
    }


def measure_sample(config: Config, corpus: Corpus, windows: int, steps: int, batch: int) -> _Results:
    """Measure completion with fresh parameters, which take as long as trained ones: 20 % of a set's genes are visible.

    Sets over 300 genes are left out.

    Args:
        config: the run.
        corpus: its sets are completed, as many genes each as are hidden.
        windows: how many.
        steps: one set alone is completed that many times in a window; the batch once.
        batch: sets of the batch, or as many as the corpus has.

    Returns:
        ranker_1_sets_per_second and sampler_1_genes_per_second for one set of median length, and the same with the
        batch's size in place of 1.
    """
    alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
    params = create_state(alone, corpus.vocabulary.size, None, make_mesh(alone)).params
    model = Model(LoadedCheckpoint({}, config, corpus.vocabulary, params, Path(), 0))
    middle = np.argsort(corpus.lengths, kind="stable")[corpus.num_sets // 2 :][:1]
    # One set of two thousand genes would decide the time of a whole batch.
    many = np.flatnonzero(corpus.lengths <= _LONGEST_COMPLETED)[:batch]
    results = {}
    for indices, repeats in ((middle, steps), (many, 1)):
        queries, size = [_query(corpus.genes(index)) for index in indices], len(indices)
        genes = sum(count for _, count in queries)
        for name, sampling, units in (("ranker_{}_sets", None, size), ("sampler_{}_genes", Sampling(), genes)):
            _completion_seconds(model, queries, sampling, 1)
            seconds = [_completion_seconds(model, queries, sampling, repeats) for _ in range(windows)]
            results[f"{name.format(size)}_per_second"] = spread([repeats * units / each for each in seconds])
    return results


def measure_checkpoint(config: Config, corpus: Corpus, windows: int) -> _Results:
    """Measure saves of a state of random numbers, and restores, in the folder for temporary files ($TMPDIR).

    Returns:
        pause_seconds (training stands still), save_seconds (until it is sealed, checksums included),
        save_gigabytes_per_second, restore_seconds (from files just written, so mostly from memory), checkpoint_bytes.
    """
    mesh = make_mesh(config)
    state = _filled(create_state(config, corpus.vocabulary.size, None, mesh))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    pauses, saves = [], []
    with temporary_folder() as run:
        with CheckpointWriter(run, keep=1) as writer:
            for step in range(1, windows + 2):
                began = time.perf_counter()
                writer.save(step, state, describe(config, corpus, step, 0.0))
                writer.wait()
                saves.append(time.perf_counter() - began)
                pauses.append(writer.pause_seconds)
                if writer.failure:
                    raise UserError(f"{run}: {writer.failure}")
        written = sum(path.stat().st_size for path in step_folder(run, step).rglob("*") if path.is_file())
        restores = []
        for _ in range(windows):
            began = time.perf_counter()
            jax.block_until_ready(restore_state(run, step, abstract))
            restores.append(time.perf_counter() - began)
    return {
        "pause_seconds": spread(pauses[1:]),
        "save_seconds": spread(saves[1:]),
        "save_gigabytes_per_second": spread([written / seconds / 1e9 for seconds in saves[1:]]),
        "restore_seconds": spread(restores),
        "checkpoint_bytes": written,
    }


class Trainer:
    """A state and the step that takes it on, as training does: batches from the host, no wait between steps."""

    def __init__(self, state: TrainState, step: Callable[[TrainState, dict], Any], mesh: Mesh) -> None:
        self._state, self._step, self._mesh = state, step, mesh
        self._metrics: dict[str, jax.Array] = {}

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Train on the batches and return how long it took, until the last update is there."""
        began = time.perf_counter()
        for batch in batches:
            self._state, self._metrics = self._step(self._state, shard_batch(batch, self._mesh))
        jax.block_until_ready((self._state, self._metrics))
        return time.perf_counter() - began

    def loss(self) -> float:
        """Return the loss of the last step, before its update: nats per scored position."""
        return float(self._metrics["loss_sum"] / self._metrics["scored"])

    def scored_per_token(self) -> float:
        """Return how many positions the last step scored for each useful token."""
        return float(self._metrics["scored"] / self._metrics["tokens"])


def train_batches(config: Config, corpus: Corpus, count: int) -> list[Batch]:
    """Return the first `count` batches of a run."""
    source = BatchSource(config, corpus, "train")
    return [source[step] for step in range(count)]


def useful_tokens(batch: Batch) -> int:
    """Return how many tokens of a batch are not padding."""
    return int(np.count_nonzero(batch["segments"]))


def _visible_keys(batch: Batch) -> int:
    """Count the keys that all tokens see: 1 + 2 + .. + n in a segment of n tokens."""
    segments_BT = batch["segments"]
    rows = np.arange(len(segments_BT))[:, None]
    lengths = np.bincount((rows * (segments_BT.max() + 1) + segments_BT)[segments_BT > 0])
    return int((lengths * (lengths + 1) // 2).sum())


def _filled(state: TrainState) -> TrainState:
    # Moments that are still zero would be compressed to nothing.
    def fill(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.block_until_ready(jax.jit(lambda state: jax.tree.map(fill, state), out_shardings=shardings)(state))


def _query(genes: np.ndarray) -> tuple[np.ndarray, int]:
    visible = max(1, round(_VISIBLE * len(genes)))
    return genes[:visible].astype(np.int32), len(genes) - visible


def _completion_seconds(model: Model, queries: list, sampling: Sampling | None, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        for _ in model.propose(iter(queries), sampling=sampling):
            pass
    return time.perf_counter() - began
