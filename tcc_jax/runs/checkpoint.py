"""Checkpoints of a run: Orbax arrays beside a JSON description, written in the background, read onto any mesh.

RUN/checkpoints/STEP holds `state` (Orbax: step, params, optimizer state) and `checkpoint.json`: the whole
configuration, the hashes of the corpus and the vocabulary, versions, and a checksum of every file. RUN/genes.tsv says
what the ids mean. RUN may lie in a bucket. Exports (`tcc_jax.runs.exports`) open the same way.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tcc_jax import __version__
from tcc_jax.config import Config, from_dict
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.model.decoder import Params, abstract_params
from tcc_jax.runs.saving import (
    FOLDER,
    FORMAT_VERSION,
    STATE,
    read_record,
    step_folder,
    verify,
    whole_steps,
)
from tcc_jax.storage import absolute, as_path, check_bucket, names_in, on_this_machine, rename_folder
from tcc_jax.terminal import UserError

VOCABULARY_FILE = "genes.tsv"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Fields that may differ when a run goes on. All others decide the numbers, so a new field is compared until it is
# listed here. `training.steps` shapes the schedule, but to train longer is a thing people want; the path of a corpus is
# nothing, its hash is compared; mesh and compute change the last bits only.
_MAY_DIFFER = {
    "run.directory",
    "data.corpus",
    "training.steps",
    "training.log_every",
    "training.eval_every",
    "training.eval_steps",
    "training.recall_sets",
    "training.skips_before_stop",
    "training.profile_steps",
    "training.tensorboard",
    "checkpoint",
    "mesh",
    "compute",
    "hosts",
}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint opened for use.

    Attributes:
        meta: what its JSON description holds.
        config: the configuration of its run.
        vocabulary: what its ids mean.
        params: nested dicts of float32 arrays on the default device; `tcc_jax.model.decoder.merge` takes them.
        run_directory: the run it belongs to, or the export it is.
        step: the optimizer step it was saved after.
    """

    meta: dict[str, Any]
    config: Config
    vocabulary: Vocabulary
    params: Params
    run_directory: Path
    step: int


def read_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Open a checkpoint or an export for use: its parameters, without the optimizer state or the mesh.

    Args:
        path: a run directory (its latest step), one step inside it (RUN/checkpoints/STEP), or an export, of this
            machine or of a bucket.

    Raises:
        UserError: no such directory or bucket, no checkpoint inside, a damaged one, or one of another vocabulary than
            RUN/genes.tsv.
    """
    # Imported here because an export is read into the same LoadedCheckpoint.
    from tcc_jax.runs.exports import is_export, read_export

    path = as_path(path)
    check_bucket(path)
    if is_export(path):
        return read_export(path)
    run_directory, step = _locate(path)
    folder = step_folder(run_directory, step)
    meta = read_record(folder)
    verify(folder, meta)
    config = from_dict(meta["config"], str(folder))
    with on_this_machine(run_directory, VOCABULARY_FILE) as copy:
        vocabulary = Vocabulary.read(copy / VOCABULARY_FILE)
    if vocabulary.hash != meta["vocabulary_hash"]:
        raise UserError(
            f"{folder}: trained on the vocabulary {meta['vocabulary_hash'][:12]}, but "
            f"{run_directory / VOCABULARY_FILE} is {vocabulary.hash[:12]}; put the run's own file back"
        )
    # The average of the parameters, where the run kept one, is what it is evaluated by.
    name = "average" if config.optimizer.ema_decay else "params"
    target = {name: abstract_params(config.model, meta["vocabulary_size"], meta["row_length"])}
    target = with_sharding(target, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with _damage_named(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params = reader.restore(absolute(folder / STATE), args=arguments)[name]
    return LoadedCheckpoint(meta, config, vocabulary, params, run_directory, step)


def find_checkpoint(
    run_directory: Path, resume: str, report: Callable[[str], None]
) -> tuple[int, dict[str, Any]] | None:
    """Find the checkpoint a run goes on from, every file of it checked.

    Args:
        run_directory: the run.
        resume: `latest`, or `last-good` to go past damaged ones, which are renamed to STEP.damaged, a
            second one of that step to STEP.damaged-2, and so on.
        report: where a warning is told.

    Returns:
        The step and the description, or None if the run has no checkpoint yet.

    Raises:
        UserError: the latest one is damaged, or with `last-good` all are.
    """
    damaged: list[tuple[Path, UserError]] = []
    for step in reversed(whole_steps(run_directory)):
        folder = step_folder(run_directory, step)
        try:
            meta = read_record(folder)
            verify(folder, meta)
        except UserError as error:
            if resume != "last-good":
                raise UserError(f"{error}; --resume last-good goes on from the one before it") from None
            damaged.append((folder, error))
            continue
        for bad, damage in damaged:
            report(f"warning: {damage}; put aside, going on from step {step:,}")
            rename_folder(bad, _name_aside(bad))
        return step, meta
    if damaged:
        raise UserError(f"{damaged[0][1]}; no good checkpoint is left in {run_directory / FOLDER}")
    return None


def restore_state(run_directory: Path, step: int, abstract: Any) -> Any:
    """Return the training state of a checkpoint, laid out as `abstract` says (`tcc_jax.training.state.abstract_state`).

    Raises:
        UserError: it is damaged.
    """
    folder = step_folder(run_directory, step)
    with _damage_named(folder), ocp.StandardCheckpointer() as reader:
        return reader.restore(absolute(folder / STATE), abstract)


def describe(config: Config, corpus: Corpus, step: int, elapsed_seconds: float) -> dict[str, Any]:
    """Return the JSON description of a checkpoint: all that is needed to use it, or to go on from it."""
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "elapsed_seconds": round(elapsed_seconds, 3),
        "config": config.to_dict(),
        "corpus_hash": corpus.hash,
        "vocabulary_hash": corpus.vocabulary.hash,
        "vocabulary_size": corpus.vocabulary.size,
        "row_length": config.training.row_length,
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes."""
    return {"tcc-jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def with_sharding(abstract: Any, sharding: jax.sharding.Sharding) -> Any:
    """Return a tree of `jax.ShapeDtypeStruct` whose arrays are to be made with `sharding`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)


def check_same_run(meta: dict[str, Any], config: Config, corpus: Corpus) -> None:
    """Check that a run can go on from a checkpoint with this configuration and corpus.

    Raises:
        UserError: the configuration (but for fields that do not change the numbers), vocabulary or corpus is another;
            the first difference is named.
    """
    advice = f"choose another run.directory than {config.run.directory}"
    saved, now = (c.to_dict() for c in (from_dict(meta["config"], config.run.directory), config))
    for section, values in now.items():
        for field, value in values.items():
            name, before = f"{section}.{field}", saved[section][field]
            if value != before and not _MAY_DIFFER & {section, name}:
                raise UserError(
                    f"{name} = {value}, but the checkpoint to resume from has {before}; {advice}, "
                    f"with --init-from {config.run.directory} to start from its weights"
                )
    for name, hash_ in (("vocabulary", corpus.vocabulary.hash), ("corpus", corpus.hash)):
        before = meta[f"{name}_hash"]
        if before != hash_:
            raise UserError(
                f"{corpus.path}: its {name} ({hash_[:12]}) is not that of the checkpoint to resume from "
                f"({before[:12]}); {advice}"
            )


def latest_step(run_directory: Path) -> int | None:
    """Return the newest complete checkpoint of a run, or None."""
    return max(whole_steps(run_directory), default=None)


def _name_aside(folder: Path) -> Path:
    # The same step may be damaged, taken again and damaged once more.
    taken, first = names_in(folder.parent), f"{folder.name}.damaged"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return folder.with_name(next(name for name in names if name not in taken))


def _locate(path: Path) -> tuple[Path, int]:
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory or checkpoint")
    if path.name.isdigit() and absolute(path).parent.name == FOLDER:
        return absolute(path).parent.parent, int(path.name)
    step = latest_step(path)
    if step is None:
        raise UserError(
            f"{path}: no checkpoint here; give a run directory, one step in its {FOLDER} folder or an export"
        )
    return path, step


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Missing files, cut files and wrong shapes surface as a dozen types from three libraries.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}: the checkpoint is damaged and cannot be read: {reason[:200]}") from error
