"""Exports: the weights of a checkpoint in safetensors, readable without Orbax, JAX or this package.

    model.safetensors  the arrays, named by their place in the model
    config.json        what they are: format version, step, model, vocabulary and corpus hashes, SHA-256 of the arrays
    genes.tsv          what the ids mean

Names, with V ids in the vocabulary, width D, hidden width F, N heads of size H = D / N; kernels multiply from the
right (y = x W), and layer i runs from 0:

    embedding [V, D], output_bias [V], position_embedding [T, D] (learned positions only), final_norm.scale [D]
    blocks.i.attention_norm.scale [D], blocks.i.feed_forward_norm.scale [D]
    blocks.i.attention.{query,key,value,output}.kernel, blocks.i.feed_forward.{expand,contract}.kernel

The logits are h . embedding + output_bias. Ids 0 to 15 are special and have no meaning as an output but for 2, <end>.

In int8 each of these with two axes is q, and beside it lies NAME.row_scale, float32, one s for each index of its first
axis: the value is q s, at most s / 2 from the one that was trained. Vectors stay float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tcc_jax.config import from_dict
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.files import atomic_folder, sha256
from tcc_jax.model.decoder import Params, abstract_params
from tcc_jax.runs.checkpoint import VOCABULARY_FILE, LoadedCheckpoint
from tcc_jax.storage import on_this_machine
from tcc_jax.terminal import UserError

# By type: what opened exports before there was int8 still opens the others.
EXPORT_VERSIONS = {"float32": 1, "bfloat16": 1, "int8": 2}
FORMAT = "tcc_jax export"
ARRAYS_FILE = "model.safetensors"
DESCRIPTION_FILE = "config.json"
# Their first axis is padded inside the decoder; an export has just the ids there are.
_OVER_VOCABULARY = ("embedding", "output_bias")
_ROW_SCALE = ".row_scale"
_LARGEST = 127


def write_export(checkpoint: LoadedCheckpoint, out: Path, dtype: str = "float32", *, overwrite: bool = False) -> None:
    """Write an export.

    Args:
        checkpoint: what to export.
        out: the folder to make; it appears whole or not at all.
        dtype: float32, bfloat16 for half the size (8 bits of mantissa are kept), or int8 for a quarter (each row of a
            matrix in 255 steps of its own).
        overwrite: take the place of a folder that is there.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    size = checkpoint.vocabulary.size
    arrays = {}
    for path, array in jax.tree.leaves_with_path(checkpoint.params):
        name = _name(path)
        array = array[:size] if name in _OVER_VOCABULARY else array
        if dtype != "int8":
            arrays[name] = np.asarray(array.astype(jnp.dtype(dtype)))
        elif array.ndim == 1:
            arrays[name] = np.asarray(array)
        else:
            arrays[name], arrays[name + _ROW_SCALE] = _in_steps(np.asarray(array))
    with atomic_folder(out, marker=ARRAYS_FILE, replace=overwrite) as folder:
        (folder / ARRAYS_FILE).write_bytes(safetensors.numpy.save(arrays, metadata={"format": "np"}))
        checkpoint.vocabulary.write(folder / VOCABULARY_FILE)
        meta = {name: value for name, value in checkpoint.meta.items() if name not in ("files", "record_sha256")}
        description = meta | {
            "format": FORMAT,
            "format_version": EXPORT_VERSIONS[dtype],
            "dtype": dtype,
            "arrays_sha256": sha256(folder / ARRAYS_FILE),
        }
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an export."""
    return (folder / ARRAYS_FILE).is_file() and (folder / DESCRIPTION_FILE).is_file()


def read_export(folder: Path) -> LoadedCheckpoint:
    """Open an export, of this machine or of a bucket, for use, its parameters in float32.

    Raises:
        UserError: it is damaged, of another format version, of another vocabulary than its genes.tsv, or its arrays are
            not those of its configuration.
    """
    meta = _read_description(folder)
    with on_this_machine(folder, ARRAYS_FILE, VOCABULARY_FILE) as copy:
        if sha256(copy / ARRAYS_FILE) != meta.get("arrays_sha256"):
            raise UserError(f"{folder}: the export is damaged: {ARRAYS_FILE} is not as it was written; export again")
        vocabulary = Vocabulary.read(copy / VOCABULARY_FILE)
        arrays = safetensors.numpy.load_file(copy / ARRAYS_FILE)
    if vocabulary.hash != meta["vocabulary_hash"]:
        raise UserError(f"{folder}: the export is damaged: {VOCABULARY_FILE} is not as it was written; export again")
    config = from_dict(meta["config"], str(folder))
    target = abstract_params(config.model, vocabulary.size, meta["row_length"])
    _check_shapes(folder, arrays, target, vocabulary.size, meta["dtype"])

    def array_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values, scale = arrays[_name(path)], arrays.get(_name(path) + _ROW_SCALE)
        array = jnp.asarray(values if scale is None else values * scale[:, None], leaf.dtype)
        return jnp.pad(array, [(0, leaf.shape[0] - array.shape[0]), *[(0, 0)] * (array.ndim - 1)])

    params = jax.tree.map_with_path(array_of, target)
    return LoadedCheckpoint(meta, config, vocabulary, params, folder, meta["step"])


def _in_steps(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(values).max(axis=1) / np.float32(_LARGEST)
    # A row of zeros has no step; in float64 the nearest one is not missed by a rounding.
    steps = np.where(scale == 0, 1, scale).astype(np.float64)[:, None]
    return np.clip(np.rint(values / steps), -_LARGEST, _LARGEST).astype(np.int8), scale


def _check_shapes(folder: Path, arrays: dict[str, np.ndarray], target: Params, size: int, dtype: str) -> None:
    expected = {}
    for path, leaf in jax.tree.leaves_with_path(target):
        name = _name(path)
        expected[name] = (size, *leaf.shape[1:]) if name in _OVER_VOCABULARY else leaf.shape
        if dtype == "int8" and len(leaf.shape) > 1:
            expected[name + _ROW_SCALE] = expected[name][:1]
    found = {name: array.shape for name, array in arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            has, asked = (shapes.get(name, "no such array") for shapes in (found, expected))
            raise UserError(
                f"{folder}: the export is damaged: {name} is {has} in {ARRAYS_FILE}, and {asked} by {DESCRIPTION_FILE}"
            )


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        kind, version, dtype = meta["format"], meta["format_version"], meta["dtype"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / DESCRIPTION_FILE}: not the description of an export; export again") from None
    if kind != FORMAT or EXPORT_VERSIONS.get(str(dtype)) != version:
        known = ", ".join(f"{number} in {name}" for name, number in EXPORT_VERSIONS.items())
        raise UserError(
            f"{folder}: {kind} of format {version} in {dtype}, this tcc_jax reads {FORMAT} {known}; export it again"
        )
    return meta


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
