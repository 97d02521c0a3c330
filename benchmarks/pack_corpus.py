"""Pack a prepared corpus into one small file, and unpack it on the machine that trains.

    python -m benchmarks.pack_corpus pack corpora/full full.tcc
    python -m benchmarks.pack_corpus unpack full.tcc corpora/full

The genes of each set are sorted, so their file order is lost: an unpacked corpus has a hash of its own, and training
with `data.gene_order = "file"` refuses it. Sorted ids are kept as differences, the low and the high byte of each in a
stream of its own, and everything goes through xz.
"""

from __future__ import annotations

import itertools
import json
import lzma
import sys
from pathlib import Path

import numpy as np

from tcc_jax.corpus.store import Corpus, description_hash, open_corpus
from tcc_jax.files import atomic_folder, sha256
from tcc_jax.terminal import UserError, command, log

MAGIC = b"tcc_jax packed corpus 1\n"
# Texts of a corpus that are packed as they are; sets.tsv and genes.tsv are small beside the tokens.
TEXTS = ("corpus.json", "genes.tsv", "sets.tsv")
# A difference is under 2^16: ids past 65,535 would need a third stream.
LARGEST_ID = 2**16 - 1


def pack(corpus: Corpus, file: Path) -> int:
    """Write a corpus to one file and return its size in bytes.

    Raises:
        UserError: the file exists, or the vocabulary has more than 65,536 ids.
    """
    if file.exists():
        raise UserError(f"{file}: exists; choose another name or remove it")
    if corpus.vocabulary.size > LARGEST_ID + 1:
        raise UserError(f"{corpus.path}: {corpus.vocabulary.size:,} ids; at most {LARGEST_ID + 1:,} can be packed")
    differences = _sorted_differences(corpus)
    parts = [(corpus.path / name).read_bytes() for name in TEXTS]
    parts += [corpus.offsets.astype("<i8").tobytes()]
    parts += [(differences & 0xFF).astype(np.uint8).tobytes(), (differences >> 8).astype(np.uint8).tobytes()]
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(MAGIC)
            packed = [lzma.compress(part, preset=6) for part in parts]
            out.write(json.dumps([len(part) for part in packed]).encode() + b"\n")
            for part in packed:
                out.write(part)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file.stat().st_size


def unpack(file: Path, out: Path) -> str:
    """Write the corpus of a packed file into a new folder, and return its hash.

    Raises:
        UserError: not a packed corpus, a damaged one, or `out` exists.
    """
    try:
        data = file.read_bytes()
        if not data.startswith(MAGIC):
            raise ValueError("it does not begin as one")
        sizes, _, rest = data[len(MAGIC) :].partition(b"\n")
        bounds = np.cumsum([0, *json.loads(sizes)])
        parts = [lzma.decompress(rest[start:end]) for start, end in itertools.pairwise(bounds)]
        *texts, packed_offsets, low, high = parts
    except (ValueError, TypeError, lzma.LZMAError) as error:
        raise UserError(f"{file}: not a packed corpus, or a damaged one ({error}); pack it again") from None
    differences = np.frombuffer(low, np.uint8) + (np.frombuffer(high, np.uint8).astype(np.int64) << 8)
    offsets = np.frombuffer(packed_offsets, "<i8")
    meta = json.loads(texts[0])
    with atomic_folder(out) as folder:
        for name, text in zip(TEXTS[1:], texts[1:], strict=True):
            (folder / name).write_bytes(text)
        tokens = _running_sums(differences, offsets).astype(np.uint16)
        for name, array in (("tokens.npy", tokens), ("offsets.npy", offsets)):
            np.save(folder / name, array, allow_pickle=False)
        meta["packed_from"] = meta["corpus_hash"]
        meta["files"] = {name: sha256(folder / name) for name in meta["files"]}
        meta["corpus_hash"] = description_hash(meta)
        (folder / "corpus.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    return open_corpus(out).hash


def _sorted_differences(corpus: Corpus) -> np.ndarray:
    owner = np.repeat(np.arange(corpus.num_sets), corpus.lengths)
    keys = owner * (LARGEST_ID + 1) + np.asarray(corpus.tokens, np.int64)
    keys.sort()
    tokens = keys % (LARGEST_ID + 1)
    differences = np.diff(tokens, prepend=0)
    starts = corpus.offsets[:-1]
    differences[starts] = tokens[starts]
    return differences


def _running_sums(differences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    sums = np.cumsum(differences)
    before = np.concatenate([[0], sums])[offsets[:-1]]
    return sums - np.repeat(before, np.diff(offsets))


@command
def main() -> None:
    """Run the command."""
    arguments = sys.argv[1:]
    if len(arguments) != 3 or arguments[0] not in ("pack", "unpack"):
        raise UserError("python -m benchmarks.pack_corpus pack CORPUS FILE, or unpack FILE CORPUS")
    source, out = map(Path, arguments[1:])
    if arguments[0] == "pack":
        log(f"{out}: {pack(open_corpus(source), out):,} bytes")
    else:
        log(f"{out}: corpus {unpack(source, out)[:12]}")


if __name__ == "__main__":
    main()
