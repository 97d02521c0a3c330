"""The protocol of the TCC experiment, which hides the last genes of each line, and which genes count as rare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcc_jax.completion.masks import MaskedSet
from tcc_jax.completion.overlap import LARGEST_UNIVERSE
from tcc_jax.completion.sets import OUTSIDE, KnownSet
from tcc_jax.corpus.vocabulary import genes_of
from tcc_jax.terminal import UserError

COUNT_COLUMNS = ("name", "hits", "missed", "extra", "neither")


class DrawnCounts(NamedTuple):
    """One line of a table of drawn counts: the 2 x 2 table of a published completion."""

    hits: int
    drawn: int
    hidden: int
    universe: int
    line: int


def mask_last_genes(
    sets: Sequence[KnownSet], counts: Sequence[DrawnCounts], draw_hidden: bool, num_candidates: int
) -> list[MaskedSet]:
    """Hide the last genes of each line, as many as the TCC experiment hid.

    K, the hidden count, is the recorded hits + missed; the last K symbols of the line are hidden, those before are
    visible; the universe is the recorded total. Hidden genes outside the vocabulary, and those that are visible under
    another symbol, can't be drawn and count as missed. A symbol that stands twice on a line counts once: so did the
    original, by its recorded counts. No set is left out: one whose visible genes are all unknown gets an empty prompt.

    Args:
        sets: what to mask, with their lines.
        counts: of the same sets, in the same order, from `read_drawn_counts`.
        draw_hidden: draw as many genes as are hidden, instead of as many as the original drew.
        num_candidates: genes of the vocabulary.

    Raises:
        UserError: a recorded count that the line or the vocabulary can't have.
    """
    masked = []
    for place, (known, count) in enumerate(zip(sets, counts, strict=True)):
        cut = len(known.line) - count.hidden
        if count.hidden < 1 or cut < 1:
            raise UserError(
                f"line {count.line} of the drawn counts: {count.hidden:,} hidden genes, but the set "
                f"{known.name!r} has {len(known.line):,} genes; at least one must be hidden and one visible"
            )
        before, after = known.line[:cut], known.line[cut:]
        visible = _unique(before[before != OUTSIDE])
        hidden = np.setdiff1d(_unique(after[after != OUTSIDE]), visible)
        drawn = count.hidden if draw_hidden else count.drawn
        if drawn > num_candidates - len(visible):
            raise UserError(
                f"line {count.line} of the drawn counts: {drawn:,} drawn genes, more than the vocabulary has"
            )
        outside = int(np.count_nonzero(known.line == OUTSIDE))
        masked.append(
            MaskedSet(known.name, known.library, place, outside, visible, hidden, count.hidden, drawn, count.universe)
        )
    return masked


def read_drawn_counts(path: str | Path, sets: Sequence[KnownSet]) -> list[DrawnCounts]:
    """Read the published 2 x 2 tables of the sets: a TSV file with the columns name, hits, missed, extra and neither.

    Args:
        path: the file; other columns are ignored.
        sets: the sets it must list, in this order.

    Raises:
        UserError: no such file, other columns, a count that is no number, too large a universe, other sets or another
            order; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of drawn counts") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file of drawn counts") from None
    header = lines[0].split("\t") if lines else []
    missing = [column for column in COUNT_COLUMNS if column not in header]
    if missing:
        raise UserError(f"{path}: line 1: no column {missing[0]!r}; the columns {', '.join(COUNT_COLUMNS)} are needed")
    columns = [header.index(column) for column in COUNT_COLUMNS]
    counts = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UserError(f"{path}: line {number}: {len(fields)} columns, the header has {len(header)}")
        name, *numbers = (fields[column] for column in columns)
        if not all(text.isascii() and text.isdigit() for text in numbers):
            raise UserError(f"{path}: line {number}: {', '.join(COUNT_COLUMNS[1:])} must be whole numbers")
        if number - 2 >= len(sets):
            raise UserError(f"{path}: line {number}: set {name!r}, but the GMT files hold only {len(sets):,} sets")
        if name != sets[number - 2].name:
            raise UserError(
                f"{path}: line {number}: set {name!r}, but the GMT files have {sets[number - 2].name!r} there; "
                "both must list the same sets in the same order"
            )
        hits, missed, extra, neither = map(int, numbers)
        universe = hits + missed + extra + neither
        if universe > LARGEST_UNIVERSE:
            raise UserError(f"{path}: line {number}: universe {universe:,}; at most {LARGEST_UNIVERSE:,} can be tested")
        counts.append(DrawnCounts(hits, hits + extra, hits + missed, universe, number))
    if len(counts) < len(sets):
        raise UserError(
            f"{path}: line {len(lines) + 1}: ends after {len(counts):,} sets, the GMT files hold {len(sets):,}"
        )
    return counts


def rarest_third(counts_V: np.ndarray, sets: Sequence[KnownSet]) -> np.ndarray:
    """Return [V] bool: the genes of a vocabulary that are as rare as the rarest third of the genes in the sets.

    The third is of the different genes of these sets, by the number of training sets that hold them; a third of the
    whole vocabulary would mostly be genes that no set to evaluate holds.
    """
    counts = np.sort(counts_V[np.unique(np.concatenate([one.ids for one in sets]))])
    if len(counts) < 3:
        return np.zeros(len(counts_V), bool)
    return genes_of(len(counts_V)) & (counts_V <= counts[len(counts) // 3 - 1])


def _unique(ids: np.ndarray) -> np.ndarray:
    return np.array(list(dict.fromkeys(ids.tolist())), np.int32)
