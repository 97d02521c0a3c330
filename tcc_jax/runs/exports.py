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
from tcc_jax.model.decoder import abstract_params
from tcc_jax.runs.checkpoint import VOCABULARY_FILE, LoadedCheckpoint
from tcc_jax.storage import on_this_machine
from tcc_jax.terminal import UserError

EXPORT_VERSION = 1
FORMAT = "tcc_jax export"
ARRAYS_FILE = "model.safetensors"
DESCRIPTION_FILE = "config.json"
# Their first axis is padded inside the decoder; an export has just the ids there are.
_OVER_VOCABULARY = ("embedding", "output_bias")


def write_export(checkpoint: LoadedCheckpoint, out: Path, dtype: str = "float32", *, overwrite: bool = False) -> None:
    """Write an export.

    Args:
        checkpoint: what to export.
        out: the folder to make; it appears whole or not at all.
        dtype: float32, or bfloat16 for half the size (8 bits of mantissa are kept).
        overwrite: take the place of a folder that is there.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    size = checkpoint.vocabulary.size
    arrays = {}
    for path, array in jax.tree.leaves_with_path(checkpoint.params):
        name = _name(path)
        array = array[:size] if name in _OVER_VOCABULARY else array
        arrays[name] = np.asarray(array.astype(jnp.dtype(dtype)))
    with atomic_folder(out, marker=ARRAYS_FILE, replace=overwrite) as folder:
        (folder / ARRAYS_FILE).write_bytes(safetensors.numpy.save(arrays, metadata={"format": "np"}))
        checkpoint.vocabulary.write(folder / VOCABULARY_FILE)
        meta = {name: value for name, value in checkpoint.meta.items() if name not in ("files", "record_sha256")}
        description = meta | {
            "format": FORMAT,
            "format_version": EXPORT_VERSION,
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

    def shape_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return (vocabulary.size, *leaf.shape[1:]) if _name(path) in _OVER_VOCABULARY else leaf.shape

    def array_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = jnp.asarray(arrays[_name(path)], leaf.dtype)
        return jnp.pad(array, [(0, leaf.shape[0] - array.shape[0]), *[(0, 0)] * (array.ndim - 1)])

    target = abstract_params(config.model, vocabulary.size, meta["row_length"])
    expected = {_name(path): shape_of(path, leaf) for path, leaf in jax.tree.leaves_with_path(target)}
    found = {name: array.shape for name, array in arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            has, asked = (shapes.get(name, "no such array") for shapes in (found, expected))
            raise UserError(
                f"{folder}: the export is damaged: {name} is {has} in {ARRAYS_FILE}, and {asked} by {DESCRIPTION_FILE}"
            )
    params = jax.tree.map_with_path(array_of, target)
    return LoadedCheckpoint(meta, config, vocabulary, params, folder, meta["step"])


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        kind, version = meta["format"], meta["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / DESCRIPTION_FILE}: not the description of an export; export again") from None
    if (kind, version) != (FORMAT, EXPORT_VERSION):
        raise UserError(
            f"{folder}: {kind} of format {version}, this tcc_jax reads {FORMAT} {EXPORT_VERSION}; export it again"
        )
    return meta


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
