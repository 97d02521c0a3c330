"""The training loop: dispatch step n, read the metrics of step n - 1, so that the device never waits for the host.

A run lives in one directory: config.json, genes.tsv, metrics.jsonl and checkpoints/STEP. An existing one resumes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tcc_jax.config import Config
from tcc_jax.corpus.loader import Loader, make_loader
from tcc_jax.corpus.store import Corpus, Split, open_corpus
from tcc_jax.model.decoder import count_parameters
from tcc_jax.terminal import Advance, UserError, log, progress
from tcc_jax.training.checkpoint import (
    VOCABULARY_FILE,
    CheckpointWriter,
    check_same_run,
    describe,
    latest_step,
    read_meta,
    restore_state,
)
from tcc_jax.training.metrics import MetricsFile, Window
from tcc_jax.training.sharding import make_mesh, shard_batch
from tcc_jax.training.state import TrainState, abstract_state, create_state, frequency_bias
from tcc_jax.training.step import make_eval_step, make_train_step

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"


def train(config: Config) -> None:
    """Train a model to `training.steps`, from the start or from the latest checkpoint of `run.directory`.

    Each line of metrics.jsonl has `step` (steps taken), `loss` (nats per scored position, the mean over the steps since
    the last line), `learning_rate` and `gradient_norm` (of that step), `tokens_per_second` (useful tokens),
    `sets_per_second`, `seconds` (spent in this run, resumes included) and `epoch`; or `step` and `validation_loss`.

    Raises:
        UserError: a corpus, mesh or run directory that cannot be used, or a loss that is not a number.
        KeyboardInterrupt: after an interrupt, once a checkpoint is saved.
    """
    corpus = open_corpus(config.data.corpus)
    num_sets = len(corpus.indices("train"))
    if num_sets == 0:
        raise UserError(f"{config.data.corpus}: no training sets in this corpus")
    mesh = make_mesh(config.mesh.data, config.training.batch_rows)
    directory = Path(config.run.directory)
    _check_directory(directory)
    first, elapsed_seconds = 0, 0.0
    latest = latest_step(directory)
    if latest is not None:
        meta = read_meta(directory, latest)
        check_same_run(meta, config, corpus)
        if latest >= config.training.steps:
            log(f"{directory}: already trained to step {latest:,}; nothing left of {config.training.steps:,} steps")
            return
        log(f"{directory}: going on from step {latest:,}")
        first, elapsed_seconds = latest, meta["elapsed_seconds"]
        state = restore_state(directory, latest, abstract_state(config, corpus.vocabulary.size, mesh))
    else:
        bias_V = frequency_bias(corpus.vocabulary.counts, num_sets) if config.objective.frequency_bias else None
        state = create_state(config, corpus.vocabulary.size, bias_V, mesh)
    directory.mkdir(parents=True, exist_ok=True)
    # First of all, because it marks the folder as a run that may be gone on with.
    (directory / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    corpus.vocabulary.write(directory / VOCABULARY_FILE)
    devices = f"{mesh.size} {jax.default_backend()} device" + ("s" if mesh.size > 1 else "")
    log(f"{directory}: {count_parameters(state.params):,} parameters, {num_sets:,} training sets, {devices}")
    metrics_file = MetricsFile(directory / METRICS_FILE, first)
    with (
        contextlib.closing(metrics_file),
        CheckpointWriter(directory, config.checkpoint.keep) as checkpoints,
        progress("training", config.training.steps, done=first) as advance,
    ):
        report = _Report(config, metrics_file, advance, elapsed_seconds)
        _run_steps(config, corpus, mesh, state, first, report, checkpoints)


def _run_steps(
    config: Config,
    corpus: Corpus,
    mesh: Mesh,
    state: TrainState,
    first: int,
    report: _Report,
    checkpoints: CheckpointWriter,
) -> None:
    training = config.training
    loader = _loader(config, corpus, "train", first)
    report.steps_per_epoch = loader.steps_per_epoch
    train_step = make_train_step(config, corpus.vocabulary.size, mesh)
    validate = _make_validation(config, corpus, mesh)
    previous: tuple[int, Any] | None = None
    with _interrupt_flag() as interrupted:
        for step, batch in zip(range(first + 1, training.steps + 1), loader, strict=False):
            state, metrics = train_step(state, shard_batch(batch, mesh))
            if previous:
                report.step(*previous)
            previous = (step, metrics)
            is_last = step == training.steps or interrupted.is_set()
            saves = is_last or step % config.checkpoint.every_steps == 0
            evaluates = training.eval_every > 0 and (step == training.steps or step % training.eval_every == 0)
            if saves or evaluates:
                # Wait for this very step: a state whose loss is not a number must never be saved.
                report.step(*previous)
                previous = None
            if evaluates:
                report.validation(step, functools.partial(validate, state))
            if saves:
                checkpoints.save(step, state, describe(config, corpus, step, report.seconds()))
            if interrupted.is_set():
                log(f"interrupted: step {step:,} is saved; the same command goes on from there")
                raise KeyboardInterrupt


class _Report:
    def __init__(self, config: Config, file: MetricsFile, advance: Advance, elapsed_seconds: float) -> None:
        self.steps_per_epoch = 1.0
        self._config, self._file, self._advance = config, file, advance
        self._window = Window()
        self._began = time.monotonic() - elapsed_seconds
        self._status = ""

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = jax.device_get(metrics)
        if not (math.isfinite(values["loss_sum"]) and math.isfinite(values["gradient_norm"])):
            raise UserError(
                f"step {step}: the loss or its gradient is not a number (loss {values['loss_sum']}, gradient norm "
                f"{values['gradient_norm']}); nothing newer than the last checkpoint is kept; a lower "
                "optimizer.learning_rate or a longer warm-up may help"
            )
        self._window.add(values)
        if step % self._config.training.log_every == 0 or step == self._config.training.steps:
            line = self._window.take()
            self._status = f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
            self._file.write(
                step=step,
                loss=line["loss"],
                learning_rate=float(values["learning_rate"]),
                gradient_norm=float(values["gradient_norm"]),
                tokens_per_second=line["tokens_per_second"],
                sets_per_second=line["sets_per_second"],
                seconds=round(self.seconds(), 3),
                epoch=round(step / self.steps_per_epoch, 4),
            )
        self._advance(1, self._status)

    def validation(self, step: int, validate: Callable[[], float | None]) -> None:
        began = time.monotonic()
        loss = validate()
        self._window.leave_out(time.monotonic() - began)
        if loss is not None:
            self._file.write(step=step, validation_loss=loss)
            log(f"step {step:,}: validation loss {loss:.4f} nats per scored position")


def _make_validation(config: Config, corpus: Corpus, mesh: Mesh) -> Callable[[TrainState], float | None]:
    if len(corpus.indices("validation")) == 0:
        return lambda state: None
    eval_step = make_eval_step(config, corpus.vocabulary.size, mesh)
    loader = _loader(config, corpus, "validation", 0)
    num_batches = min(config.training.eval_steps, math.ceil(loader.steps_per_epoch))

    def validate(state: TrainState) -> float:
        # The loader starts at step 0 each time: every evaluation sees the same batches.
        sums = [
            eval_step(state.params, shard_batch(batch, mesh), np.int32(index))
            for index, batch in enumerate(itertools.islice(iter(loader), num_batches))
        ]
        loss_sum, scored = np.array(jax.device_get(sums), np.float64).sum(axis=0).tolist()
        return loss_sum / max(scored, 1)

    return validate


def _loader(config: Config, corpus: Corpus, split: Split, start_step: int) -> Loader:
    return make_loader(
        corpus,
        split,
        row_length=config.training.row_length,
        batch_rows=config.training.batch_rows,
        segments_per_row=config.training.segments_per_row,
        seed=config.run.seed,
        gene_order=config.data.gene_order,
        start_step=start_step,
        num_hosts=jax.process_count(),
        host=jax.process_index(),
    )


def _check_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; choose another run.directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG_FILE).exists():
        raise UserError(f"{directory}: not empty and not a run of tcc_jax; choose another run.directory")


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def stop(*_: object) -> None:
        # The first interrupt finishes the step and saves; a second one ends at once.
        flag.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
