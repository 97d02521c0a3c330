"""The vocabulary: special ids 0 to 15, then one id a gene, by falling count in the training sets."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tcc_jax.terminal import UserError

PAD, START, END = 0, 1, 2
NUM_SPECIAL = 16
SPECIAL_SYMBOLS = ("<pad>", "<start>", "<end>", *(f"<reserved{index}>" for index in range(3, NUM_SPECIAL)))
HEADER = ("id", "symbol", "hgnc_id", "count")


@dataclass(frozen=True)
class Vocabulary:
    """Symbols by id.

    Attributes:
        symbols: V strings; the first 16 are special, the rest approved gene symbols.
        hgnc_ids: V strings, empty for special ids.
        counts: [V] int64, training sets that hold the gene; 0 for special ids.
    """

    symbols: tuple[str, ...]
    hgnc_ids: tuple[str, ...]
    counts: np.ndarray

    @property
    def size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self.symbols)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Approved gene symbol -> id; special symbols are not in it."""
        return {symbol: index for index, symbol in enumerate(self.symbols) if index >= NUM_SPECIAL}

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the symbols in id order: two vocabularies with the same hash give ids the same meaning."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """Write `genes.tsv`: id, symbol, HGNC id, count."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("\t".join(HEADER) + "\n")
            for index, symbol in enumerate(self.symbols):
                file.write(f"{index}\t{symbol}\t{self.hgnc_ids[index]}\t{self.counts[index]}\n")

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read `genes.tsv`.

        Raises:
            UserError: the file is missing or not such a table.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            header, *rows = (tuple(line.split("\t")) for line in lines)
            ids, symbols, hgnc_ids, counts = zip(*rows, strict=True)
            numbered = ids == tuple(map(str, range(len(ids))))
            if not numbered or (header, symbols[:NUM_SPECIAL]) != (HEADER, SPECIAL_SYMBOLS):
                raise ValueError
            return cls(symbols, hgnc_ids, np.array(list(map(int, counts)), np.int64))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; the vocabulary is missing") from None
        except (ValueError, OverflowError):
            raise UserError(f"{path}: not a vocabulary ({', '.join(HEADER)}); prepare the corpus again") from None


def genes_of(num_ids: int) -> np.ndarray:
    """Return [V] bool: the ids of a vocabulary that are genes, not special."""
    return np.arange(num_ids) >= NUM_SPECIAL
