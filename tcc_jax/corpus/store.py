"""The prepared corpus on disk: written once, opened memory-mapped, checked against its recorded checksums.

One in a bucket is copied to this machine first, and kept for the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.files import atomic_folder, cache_folder, sha256
from tcc_jax.storage import as_path, check_bucket, copy_file, files_in, is_remote
from tcc_jax.terminal import UserError, progress

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
Split = Literal["train", "validation", "test"]
SETS_HEADER = ("name", "library", "split", "length", "cluster", "other_names")
DESCRIPTION = "corpus.json"
_FILES = ("genes.tsv", "sets.tsv", "tokens.npy", "offsets.npy")


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, read only.

    Attributes:
        path: its folder.
        meta: what corpus.json holds (options, sources, counts after every step, leak report, checksums).
        vocabulary: genes by id.
        names: set names, one a set.
        libraries: the library of each set.
        other_names: for each set, the `library/name` of exact duplicates that were collapsed into it.
        splits: [sets] uint8, index into `SPLITS`.
        clusters: [sets] int64, near-duplicate cluster; a random split keeps a cluster together.
        tokens: flat gene ids of all sets in file order, uint16 or uint32, memory-mapped.
        offsets: [sets + 1] int64; set i holds tokens[offsets[i] : offsets[i + 1]].
    """

    path: Path
    meta: dict[str, Any]
    vocabulary: Vocabulary
    names: list[str]
    libraries: list[str]
    other_names: list[list[str]]
    splits: np.ndarray
    clusters: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def num_sets(self) -> int:
        """Number of gene sets over all splits."""
        return len(self.offsets) - 1

    @property
    def hash(self) -> str:
        """SHA-256 that identifies the whole corpus."""
        return self.meta["corpus_hash"]

    @property
    def lengths(self) -> np.ndarray:
        """[sets] int64, genes in each set."""
        return np.diff(self.offsets)

    def genes(self, index: int) -> np.ndarray:
        """Return the gene ids of set `index`, in file order."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def indices(self, split: Split) -> np.ndarray:
        """Return the indices of a split's sets, ascending, int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split))


def write_corpus(folder: Path, corpus: Corpus) -> None:
    """Write the files of a corpus into an existing, empty folder; `corpus.json` is written last.

    The same corpus gives the same bytes. The caller moves the folder into place (`files.atomic_folder`).
    """
    corpus.vocabulary.write(folder / "genes.tsv")
    lengths = corpus.lengths
    with open(folder / "sets.tsv", "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(SETS_HEADER) + "\n")
        for index, name in enumerate(corpus.names):
            others = json.dumps(corpus.other_names[index], ensure_ascii=False) if corpus.other_names[index] else ""
            split = SPLITS[corpus.splits[index]]
            file.write(
                f"{name}\t{corpus.libraries[index]}\t{split}\t{lengths[index]}\t{corpus.clusters[index]}\t{others}\n"
            )
    dtype = np.uint16 if corpus.vocabulary.size <= 2**16 else np.uint32
    for name, array in (("tokens.npy", corpus.tokens.astype(dtype)), ("offsets.npy", corpus.offsets.astype(np.int64))):
        with open(folder / name, "wb") as binary:
            np.save(binary, array, allow_pickle=False)
    meta = dict(corpus.meta)
    meta["format_version"] = FORMAT_VERSION
    meta["vocabulary_hash"] = corpus.vocabulary.hash
    meta["files"] = {name: sha256(folder / name) for name in _FILES}
    meta["corpus_hash"] = description_hash(meta)
    with open(folder / DESCRIPTION, "w", encoding="utf-8", newline="\n") as file:
        json.dump(meta, file, indent=2, ensure_ascii=False, sort_keys=True)
        file.write("\n")


def open_corpus(path: str | Path) -> Corpus:
    """Open a prepared corpus, of this machine or of a bucket, and check it against its checksums.

    Raises:
        UserError: not a corpus, another format version, a file truncated or edited since it was written, or a bucket
            that cannot be listed.
    """
    path = as_path(path)
    if is_remote(path):
        return replace(_open_copy(path), path=path)
    meta = _read_meta(path)
    for name in _FILES:
        if not (path / name).exists():
            raise UserError(f"{path / name}: the file is missing; prepare the corpus again")
        if sha256(path / name) != meta["files"].get(name):
            raise UserError(f"{path / name}: damaged or edited since it was prepared; prepare the corpus again")
    vocabulary = Vocabulary.read(path / "genes.tsv")
    names, libraries, other_names, splits, clusters = [], [], [], [], []
    with open(path / "sets.tsv", encoding="utf-8", newline="\n") as file:
        next(file)
        for line in file:
            name, library, split, _, cluster, others = line.rstrip("\n").split("\t")
            names.append(name)
            libraries.append(library)
            splits.append(SPLITS.index(split))
            clusters.append(int(cluster))
            other_names.append(json.loads(others) if others else [])
    return Corpus(
        path=path,
        meta=meta,
        vocabulary=vocabulary,
        names=names,
        libraries=libraries,
        other_names=other_names,
        splits=np.array(splits, np.uint8),
        clusters=np.array(clusters, np.int64),
        tokens=np.load(path / "tokens.npy", mmap_mode="r", allow_pickle=False),
        offsets=np.load(path / "offsets.npy", allow_pickle=False),
    )


def _open_copy(path: Path) -> Corpus:
    check_bucket(path)
    folder = cache_folder() / "corpora" / _read_meta(path)["corpus_hash"]
    if (folder / DESCRIPTION).exists():
        # One that was damaged since is fetched again.
        with contextlib.suppress(UserError):
            return open_corpus(folder)
    names = (DESCRIPTION, *_FILES)
    sizes = {name: file.bytes for name, file in files_in(path).items() if name in names}
    with atomic_folder(folder, marker=DESCRIPTION, replace=True) as new:
        with progress(f"{path} -> {folder}", sum(sizes.values())) as advance:
            for name in sizes:
                copy_file(path / name, new / name, advance)
        try:
            open_corpus(new)
        except UserError as error:
            raise UserError(str(error).replace(str(new), str(path))) from None
    return open_corpus(folder)


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not file.exists():
        raise UserError(f"{path}: no prepared corpus here (corpus.json is missing); run python -m tcc_jax.prepare")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a corpus description; prepare the corpus again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format version {version}, this tcc_jax reads {FORMAT_VERSION}; prepare it again")
    if meta.get("corpus_hash") != description_hash(meta):
        raise UserError(f"{file}: damaged or edited since it was prepared; prepare the corpus again")
    return meta


def description_hash(meta: dict[str, Any]) -> str:
    """Return the hash of a corpus, SHA-256 over its description, which holds those of its files."""
    body = {key: value for key, value in meta.items() if key != "corpus_hash"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
