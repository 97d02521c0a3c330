"""The training loop: dispatch a step, send the next batch, read older metrics, so that the device never waits.

A run lives in one directory (`tcc_jax.runs.run_directory`); an existing one resumes. A run killed at any moment and
started again ends with the same bits as one that was never stopped: the batch is a function of the step, randomness of
the seed and the step, and a checkpoint holds the state and the sums of the metrics line it falls into. A GPU promises
the same bits twice only with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tcc_jax.config import Config, profile_window
from tcc_jax.corpus.loader import Batch, BatchSource
from tcc_jax.corpus.spectral import spectral_vectors
from tcc_jax.corpus.store import Corpus, open_corpus
from tcc_jax.model.decoder import count_parameters
from tcc_jax.runs.checkpoint import (
    check_same_run,
    describe,
    find_checkpoint,
    latest_step,
    read_checkpoint,
    restore_state,
)
from tcc_jax.runs.hosts import Peers
from tcc_jax.runs.preemption import Stop
from tcc_jax.runs.run_directory import METRICS_FILE, RunDirectory, check_shared, open_run_directory
from tcc_jax.runs.saving import CheckpointWriter, best_step, read_record, step_folder, whole_steps
from tcc_jax.storage import as_path
from tcc_jax.terminal import UserError, progress
from tcc_jax.training.agreement import Agreement
from tcc_jax.training.metrics import Profile, model_flops_utilization
from tcc_jax.training.report import Board, MetricsFile, Report, require_tensorboard
from tcc_jax.training.sharding import make_mesh, rows_here, shard_batch
from tcc_jax.training.state import TrainState, abstract_state, create_state, frequency_bias
from tcc_jax.training.step import attention_in_words, make_eval_step, make_train_step
from tcc_jax.training.validation import Abandoned, MakeRecall, make_validation

SKIPPED_FOLDER = "skipped"
PROFILE_FOLDER = "profile"
TENSORBOARD_FOLDER = "tensorboard"
_NOTHING = contextlib.nullcontext()

InFlight = collections.deque[tuple[int, dict[str, jax.Array], Any]]
"""(step, its metrics, this host's rows of its batch) of the steps that the devices may still be at work on."""


def train(
    config: Config, stop: Stop | None = None, make_recall: MakeRecall | None = None, peers: Peers | None = None
) -> None:
    """Train a model to `training.steps`, from the start or from a checkpoint of `run.directory`.

    Each line of metrics.jsonl has `step` (steps taken), `loss` (nats per scored position, the mean over the steps since
    the last line; null if all were skipped), `skipped_steps` (among them), `learning_rate` and `gradient_norm` (of that
    step; null if it is not finite), `tokens_per_second` (useful tokens), `sets_per_second`, `mfu` and `mfu_segments`
    (`tcc_jax.training.metrics.model_flops_utilization`), `data_wait` (share of the time in which the loop waited for
    the loader), `memory_bytes` and `memory_peak_bytes` (`tcc_jax.training.metrics.memory_bytes`), `seconds` (spent in
    this run, resumes included) and `epoch`; or `step`, `validation_loss` and, where measured, `validation_recall`.

    Args:
        config: the run.
        stop: a request to stop, which may come from another thread; without one, SIGTERM and SIGINT are heard here.
            The step in flight is finished and saved, and the function returns.
        make_recall: called with the configuration and the corpus, gives the function that measures the recall on
            validation sets, which decides what the best checkpoint is.
        peers: the watch over the other processes of the run, told here what to say when one is gone.

    Raises:
        UserError: a corpus, mesh or run directory that cannot be used, a damaged checkpoint, updates skipped too often
            in a row, or a last checkpoint that could not be saved.
    """
    if config.training.tensorboard:
        require_tensorboard()
    corpus = open_corpus(config.data.corpus)
    if not len(corpus.indices("train")):
        raise UserError(f"{config.data.corpus}: no training sets in this corpus")
    mesh = make_mesh(config)
    hearing = contextlib.nullcontext(stop) if stop is not None else Stop()
    with (
        hearing as stop,
        open_run_directory(as_path(config.run.directory), config.training.steps) as directory,
        # While status.json can still be written.
        peers.speak_first() if peers else _NOTHING,
    ):
        stop.on_leave = lambda message: directory.status("stopped", message=message)
        if peers:
            peers.on_loss = functools.partial(_lost, directory)
        if jax.process_count() > 1:
            # A host that left alone would leave the others waiting: all stop together, after the first step.
            stop.must_save()
        directory.status("starting")
        check_shared(directory.path)
        Run(config, corpus, mesh, directory, stop, make_recall).run()


class Run:
    """One process's part of a run: from the state it starts with to the end, or to a request to stop."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        mesh: Mesh,
        directory: RunDirectory,
        stop: Stop,
        make_recall: MakeRecall | None,
    ) -> None:
        """Find where to start; nothing is written yet but status.json."""
        self.config, self.corpus, self.mesh, self.directory, self.stop = config, corpus, mesh, directory, stop
        self.make_recall = make_recall
        self.first, self.meta = self._find_start()
        directory.saved(self.first if self.meta else None)
        if self.meta:
            check_same_run(self.meta, config, corpus)
        # What can be refused is, before anything is written.
        self.attention = attention_in_words(config, mesh)
        self.rows = rows_here(mesh, config.training.batch_rows)
        self.source = BatchSource(config, corpus, "train", *self.rows)

    def run(self) -> None:
        """Train to the end or to a request to stop."""
        config, directory, path = self.config, self.directory, self.directory.path
        if self.first >= config.training.steps and not self.meta.get("evaluation_due"):
            steps = f"{config.training.steps:,} steps"
            directory.log(f"{path}: already trained to step {self.first:,}; nothing left of {steps}")
            directory.status("finished", step=self.first)
            return
        state = self._first_state()
        directory.describe(config, self.corpus.vocabulary, self.first)
        devices = f"{self.mesh.size} {jax.default_backend()} device" + ("s" if self.mesh.size > 1 else "")
        num_sets = len(self.corpus.indices("train"))
        directory.log(f"{path}: {count_parameters(state.params):,} parameters, {num_sets:,} training sets, {devices}")
        directory.log(f"attention: {self.attention}")
        plan, most = self.source.plan, config.training.segments_per_row
        used = len(plan.slot_lengths) / (plan.num_rows * most)
        directory.log(f"packing: rows {plan.fullness:.1%} full, {used:.0%} of their {most} places for sets taken")
        directory.status("compiling", step=self.first)
        has_board = config.training.tensorboard and jax.process_index() == 0
        writes = jax.process_index() == 0
        metrics_file = MetricsFile(directory.local / METRICS_FILE, self.first, directory.log, writes=writes)

        def put_metrics_in_place() -> None:
            metrics_file.sync()
            directory.sync()

        with (
            contextlib.closing(metrics_file),
            CheckpointWriter(
                path,
                config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
                recalls=metrics_file.recalls if config.checkpoint.keep_best else None,
                check=directory.check,
                before_seal=put_metrics_in_place,
                saved=directory.saved,
                note=directory.note,
                warn=directory.log,
            ) as self.checkpoints,
            progress("training", config.training.steps, done=self.first) as advance,
            Board(directory.local / TENSORBOARD_FOLDER, self.first, directory.log) if has_board else _NOTHING as board,
            Profile(
                profile_window(config.training.profile_steps), directory.local / PROFILE_FOLDER, directory.log
            ) as self.profile,
            # What moves between host and devices is said in so many words: anything else would make one wait.
            jax.transfer_guard("disallow"),
        ):
            utilization = functools.partial(
                model_flops_utilization, config, self.corpus.vocabulary.size, self.mesh.devices.flatten().tolist()
            )
            self.report = Report(config, metrics_file, board, directory, advance, utilization, self.meta)
            self._run_steps(state)

    def _find_start(self) -> tuple[int, dict[str, Any]]:
        path, found = self.directory.path, None
        if jax.process_index() == 0:
            found = find_checkpoint(path, self.config.checkpoint.resume, self.directory.log)
        if jax.process_count() == 1:
            return found or (0, {})
        # One host checks the files and puts damaged ones aside; the others take its word.
        step = int(multihost_utils.broadcast_one_to_all(np.int32(found[0] if found else 0)))
        return step, read_record(step_folder(path, step)) if step else {}

    def _first_state(self) -> TrainState:
        config, vocabulary = self.config, self.corpus.vocabulary
        if self.meta:
            self.directory.log(f"{self.directory.path}: going on from step {self.first:,}")
            abstract = abstract_state(config, vocabulary.size, self.mesh)
            return restore_state(self.directory.path, self.first, abstract)
        if config.checkpoint.init_from:
            return _with_weights_of(config, self.corpus, create_state(config, vocabulary.size, None, self.mesh))
        num_sets = len(self.corpus.indices("train"))
        bias_V = frequency_bias(vocabulary.counts, num_sets) if config.objective.frequency_bias else None
        vectors_VD = spectral_vectors(self.corpus, config.model.width) if config.objective.spectral_start else None
        if vectors_VD is not None and jax.process_count() > 1:
            # The last bits depend on the number of cores: all take those of one host.
            vectors_VD = np.asarray(multihost_utils.broadcast_one_to_all(vectors_VD))
        return create_state(config, vocabulary.size, bias_V, self.mesh, vectors_VD)

    def _run_steps(self, state: TrainState) -> None:
        config, report, stop = self.config, self.report, self.stop
        report.steps_per_epoch = self.source.steps_per_epoch
        train_step = make_train_step(config, self.corpus.vocabulary.size, self.mesh)
        self.validate = make_validation(
            config,
            self.corpus,
            make_eval_step(config, self.corpus.vocabulary.size, self.mesh),
            BatchSource(config, self.corpus, "validation", *self.rows)
            if len(self.corpus.indices("validation"))
            else None,
            self.mesh,
            self.make_recall,
        )
        self.asked = Agreement(self.mesh, late=0)
        due = self.meta.get("evaluation_due") and self.first not in report.evaluated
        if due and not self._evaluate(self.first, state):
            return self._stopped(self.first)
        late = config.compute.steps_in_flight - 1
        agreed, in_flight = Agreement(self.mesh, late), InFlight()
        every_seconds, last_save = 60 * config.checkpoint.every_minutes, time.monotonic()
        batches = self.source.batches(self.first)
        batch, arrays = self._fetch(batches)
        for step in range(self.first + 1, config.training.steps + 1):
            self.profile.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, arrays)
            self.profile.after(step, state)
            in_flight.append((step, metrics, batch))
            stop.must_save()
            is_last = step == config.training.steps
            if not is_last:
                # On its way to the devices while they are at work on this step.
                batch, arrays = self._fetch(batches)
            due = every_seconds > 0 and time.monotonic() - last_save >= every_seconds and jax.process_index() == 0
            if due:
                # Asked for once: several hosts hear of it only some steps later.
                last_save = time.monotonic()
            stopping, save_by_time = agreed.exchange(bool(stop), due)
            self._read(in_flight, late, state)
            evaluates = config.training.eval_every > 0 and (is_last or step % config.training.eval_every == 0)
            saves = is_last or stopping or save_by_time or step % config.checkpoint.every_steps == 0
            if saves or evaluates or report.skipping:
                # Wait for this very step: what is saved has its numbers written down, and a run that skips updates
                # stops at the step that was one too many.
                self._read(in_flight, 0, state)
            evaluation_due = evaluates and (stopping or not self._evaluate(step, state))
            # One host says what is best, lest another finds a last digit different and saves alone.
            says_best = jax.process_index() == 0 and report.is_best(step)
            if saves or evaluation_due or (evaluates and any(self.asked.exchange(says_best))):
                self._save(step, state, evaluation_due)
                last_save = time.monotonic()
            if stopping or evaluation_due:
                return self._stopped(step)
        self.directory.status("saving", step=config.training.steps)
        self._await_last_save()
        self._say_what_is_next()
        self.directory.status("finished", step=config.training.steps)
        return None

    def _fetch(self, batches: Iterator[Batch]) -> tuple[Batch, dict[str, jax.Array]]:
        began = time.monotonic()
        batch = next(batches)
        self.report.waited(time.monotonic() - began)
        return batch, _put(batch, self.mesh)

    def _read(self, in_flight: InFlight, most: int, state: TrainState) -> None:
        """Report steps, oldest first, until at most `most` are left in flight; `state` is that after the newest."""
        while len(in_flight) > most:
            step, metrics, batch = in_flight.popleft()
            skips = self.report.step(step, jax.device_get(metrics))
            if skips >= self.config.training.skips_before_stop:
                self._give_up(step, skips, batch, None if in_flight else state)

    def _give_up(self, step: int, skips: int, batch: Batch, state: TrainState | None) -> None:
        name = f"{SKIPPED_FOLDER}/step-{step}-host-{jax.process_index()}.npz"
        file = self.directory.path / name
        where = f"the batch is in {file}"
        try:
            (self.directory.local / SKIPPED_FOLDER).mkdir(exist_ok=True)
            np.savez(self.directory.local / name, **batch)  # type: ignore[arg-type]
        except OSError as error:
            where = f"the batch could not be written to {file} ({error.strerror})"
        if state is not None:
            # Its parameters are those of the last good update.
            self._save(step, state, evaluation_due=False)
            self.checkpoints.wait()
        last = self.checkpoints.saved_step or self.first
        raise UserError(
            f"step {step}: the loss or its gradient was not finite {skips} times in a row; none of these updates was "
            f"made, {where}, the last checkpoint is of step {last}; "
            "a lower optimizer.learning_rate or a longer warm-up may help"
        )

    def _evaluate(self, step: int, state: TrainState) -> bool:
        self.directory.status("evaluating", step=step)
        try:
            self.report.validation(step, functools.partial(self.validate, state, step, self._poll))
        except Abandoned:
            return False
        return True

    def _poll(self) -> None:
        # All hosts measure the same and call this as often: they give up together.
        if any(self.asked.exchange(bool(self.stop))):
            raise Abandoned

    def _save(self, step: int, state: TrainState, evaluation_due: bool) -> None:
        self.directory.check()
        meta = describe(self.config, self.corpus, step, self.report.seconds())
        meta |= self.report.to_keep() | {"evaluation_due": evaluation_due}
        self.checkpoints.save(step, state, meta)

    def _say_what_is_next(self) -> None:
        path, last, recalls = self.directory.path, self.config.training.steps, self.report.recalls

        def command(checkpoint: Path, report: str) -> str:
            return f"python -m tcc_jax.eval --checkpoint {shlex.quote(str(checkpoint))} --out {shlex.quote(report)}"

        folder, report = step_folder(path, last), f"reports/{path.name}"
        self.directory.log(f"the checkpoint is {folder}; evaluate it with {command(path, report)}")
        best = best_step(recalls)
        if best in whole_steps(path) and recalls[best] > recalls.get(last, -1.0):
            folder = step_folder(path, best)
            self.directory.log(
                f"best validation recall {recalls[best]:.4f} at step {best:,}: {folder}; "
                f"evaluate it with {command(folder, f'{report}-{best}')}"
            )

    def _stopped(self, step: int) -> None:
        self.directory.status("saving", step=step)
        self._await_last_save()
        message = f"{self.stop.reason or 'another host'}: step {step:,} is saved; the same command goes on from there"
        self.directory.log(message)
        self.directory.status("stopped", step=step, message=message)

    def _await_last_save(self) -> None:
        self.checkpoints.wait()
        if self.checkpoints.failure:
            raise UserError(
                f"{self.directory.path}: {self.checkpoints.failure}; mend it, then the same command goes on from the "
                "checkpoint before"
            )


def _with_weights_of(config: Config, corpus: Corpus, state: TrainState) -> TrainState:
    source = config.checkpoint.init_from
    other = read_checkpoint(source)
    if other.vocabulary.hash != corpus.vocabulary.hash:
        raise UserError(
            f"{source}: its vocabulary ({other.vocabulary.hash[:12]}) is not that of {corpus.path} "
            f"({corpus.vocabulary.hash[:12]}); prepare the corpus with the same genes"
        )
    shapes, other_shapes = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in (jax.tree.leaves_with_path(state.params), jax.tree.leaves_with_path(other.params))
    )
    for name in sorted(shapes.keys() | other_shapes.keys()):
        if shapes.get(name) != other_shapes.get(name):
            raise UserError(
                f"{source}: its {name} is {other_shapes.get(name, 'missing')}, this run's is "
                f"{shapes.get(name, 'missing')}; the [model] sections must have the same shape"
            )
    params = jax.tree.map(
        lambda new, old: jax.make_array_from_callback(old.shape, old.sharding, np.asarray(new).__getitem__),
        other.params,
        state.params,
    )
    return state._replace(params=params, average=jax.tree.map(jnp.copy, params) if state.average else {})


def _put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    # On several hosts JAX takes this for a transfer that nobody asked for.
    with jax.transfer_guard_host_to_device("allow"):
        return shard_batch(batch, mesh)


def _lost(directory: RunDirectory, what: str, goes_on: bool) -> None:
    step = latest_step(directory.path) or 0
    message = f"{what}; start all processes again with the same command, the run goes on from step {step:,}"
    directory.log(f"error: {message}")
    directory.status("stopped" if goes_on else "failed", message=message)
