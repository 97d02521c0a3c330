"""Checkpoints of a run: Orbax arrays beside a JSON description, written in the background, read onto any mesh.

RUN/checkpoints/STEP holds `state` (step, params, optimizer state) and `meta` (the whole configuration, the hashes of
the corpus and the vocabulary, versions). RUN/genes.tsv says what the ids mean.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tcc_jax import __version__
from tcc_jax.config import Config, from_dict
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.model.decoder import Params, abstract_params
from tcc_jax.terminal import UserError
from tcc_jax.training.sharding import with_sharding

FORMAT_VERSION = 1
_FOLDER = "checkpoints"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
VOCABULARY_FILE = "genes.tsv"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint opened for use.

    Attributes:
        meta: what its JSON description holds.
        config: the configuration of its run.
        vocabulary: what its ids mean.
        params: nested dicts of float32 arrays on the default device; `tcc_jax.model.decoder.merge` takes them.
        run_directory: the run it belongs to.
        step: the optimizer step it was saved after.
    """

    meta: dict[str, Any]
    config: Config
    vocabulary: Vocabulary
    params: Params
    run_directory: Path
    step: int


def read_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Open a checkpoint for use: its parameters, without the optimizer state or the mesh it was trained on.

    Args:
        path: a run directory (its latest step), or one step inside it (RUN/checkpoints/STEP).

    Raises:
        UserError: no such directory, no checkpoint inside, a damaged one, or one of another vocabulary than
            RUN/genes.tsv.
    """
    run_directory, step = _locate(Path(path))
    meta = read_meta(run_directory, step)
    folder = _step_folder(run_directory, step)
    config = from_dict(meta["config"], str(folder))
    vocabulary = Vocabulary.read(run_directory / VOCABULARY_FILE)
    if vocabulary.hash != meta["vocabulary_hash"]:
        raise UserError(
            f"{folder}: trained on the vocabulary {meta['vocabulary_hash'][:12]}, but "
            f"{run_directory / VOCABULARY_FILE} is {vocabulary.hash[:12]}; put the run's own file back"
        )
    target = {"params": abstract_params(config.model, meta["vocabulary_size"], meta["row_length"])}
    target = with_sharding(target, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with _damage_named(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params = reader.restore((folder / "state").absolute(), args=arguments)["params"]
    return LoadedCheckpoint(meta, config, vocabulary, params, run_directory, step)


def latest_step(run_directory: Path) -> int | None:
    """Return the newest complete checkpoint of a run, or None. A save that was cut off does not count."""
    folder = run_directory / _FOLDER
    if not folder.is_dir():
        return None
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
    return max(steps, default=None)


def read_meta(run_directory: Path, step: int) -> dict[str, Any]:
    """Return the JSON description of a checkpoint.

    Raises:
        UserError: it is damaged, or of a format this version does not read.
    """
    folder = _step_folder(run_directory, step)
    for item in ("state", "meta"):
        if not (folder / item).is_dir():
            raise UserError(f"{folder}: the checkpoint is damaged and cannot be read: {item} is missing")
    with _damage_named(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore((folder / "meta").absolute())
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder}: checkpoint format {meta.get('format_version')}, this tcc_jax reads {FORMAT_VERSION}"
        )
    return meta


def restore_state(run_directory: Path, step: int, abstract: Any) -> Any:
    """Return the training state of a checkpoint, laid out as `abstract` says (`tcc_jax.training.state.abstract_state`).

    Raises:
        UserError: it is damaged.
    """
    folder = _step_folder(run_directory, step)
    with _damage_named(folder), ocp.StandardCheckpointer() as reader:
        return reader.restore((folder / "state").absolute(), abstract)


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
        "packages": {"tcc-jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def check_same_run(meta: dict[str, Any], config: Config, corpus: Corpus) -> None:
    """Check that a run can go on from a checkpoint with this configuration and corpus.

    Raises:
        UserError: the model, vocabulary or corpus is another; the first difference is named.
    """
    advice = f"choose another run.directory than {config.run.directory}"
    saved = from_dict(meta["config"], config.run.directory)
    pairs = {f"model.{field.name}": _field(field.name, saved.model, config.model) for field in fields(config.model)}
    if config.model.position == "learned":
        pairs["training.row_length"] = (meta["row_length"], config.training.row_length)
    for name, (before, now) in pairs.items():
        if before != now:
            raise UserError(f"{name} = {now}, but the checkpoint to resume from has {before}; {advice}")
    for name, now in (("vocabulary", corpus.vocabulary.hash), ("corpus", corpus.hash)):
        before = meta[f"{name}_hash"]
        if before != now:
            raise UserError(
                f"{corpus.path}: its {name} ({now[:12]}) is not that of the checkpoint to resume from "
                f"({before[:12]}); {advice}"
            )


class CheckpointWriter:
    """Saves checkpoints in the background; leaving the `with` block waits for the last one.

    Args:
        run_directory: the run.
        keep: checkpoints kept, newest first.
    """

    def __init__(self, run_directory: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((run_directory / _FOLDER).absolute(), options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begin to save; the arrays are safe to overwrite when this returns. Waits for a save still under way."""
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=arguments)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _locate(path: Path) -> tuple[Path, int]:
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory or checkpoint")
    if path.name.isdigit() and path.absolute().parent.name == _FOLDER:
        return path.absolute().parent.parent, int(path.name)
    step = latest_step(path)
    if step is None:
        raise UserError(f"{path}: no checkpoint here; give a run directory, or one step in its {_FOLDER} folder")
    return path, step


def _step_folder(run_directory: Path, step: int) -> Path:
    return run_directory / _FOLDER / str(step)


def _field(name: str, before: Any, now: Any) -> tuple[Any, Any]:
    return getattr(before, name), getattr(now, name)


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Missing files, cut files and wrong shapes surface as a dozen types from three libraries.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}: the checkpoint is damaged and cannot be read: {reason[:200]}") from error
