"""What an evaluation hides: which genes of a set are visible, which are to be found, and the table they are tested in.

The default protocol hides a random 80 %; the protocol of the TCC experiment hides the last genes of each line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcc_jax.completion.overlap import LARGEST_UNIVERSE
from tcc_jax.completion.sets import OUTSIDE, KnownSet
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.terminal import UserError

COUNT_COLUMNS = ("name", "hits", "missed", "extra", "neither")
_FALSE_GENES = 1


@dataclass(frozen=True)
class MaskedSet:
    """A set with most of its genes hidden.

    Attributes:
        name: the set's name.
        library: the library it comes from.
        place: the set's index among those that were read.
        outside: genes of the set that are not in the vocabulary.
        visible: int32 ids shown to the model.
        hidden: int32 ids to be found, none of them visible.
        hidden_count: hidden genes in the statistics; with the TCC protocol also those that are not in the vocabulary.
        drawn_count: genes to draw.
        universe: genes in the statistics.
        outside_background: genes of the set that are in the vocabulary, but not in the background.
    """

    name: str
    library: str
    place: int
    outside: int
    visible: np.ndarray
    hidden: np.ndarray
    hidden_count: int
    drawn_count: int
    universe: int
    outside_background: int = 0


class DrawnCounts(NamedTuple):
    """One line of a table of drawn counts: the 2 x 2 table of a published completion."""

    hits: int
    drawn: int
    hidden: int
    universe: int
    line: int


Skipped = tuple[KnownSet, str]


def mask_sets(
    sets: Sequence[KnownSet],
    candidates_V: np.ndarray,
    visible_share: float = 0.2,
    seed: int = 0,
    false_share: float = 0.0,
) -> tuple[list[MaskedSet], list[Skipped]]:
    """Hide genes of each set at random.

    Of the L genes that are candidates max(1, round(visible_share x L)) stay visible, at least one is hidden. Which ones
    depends on the seed and the set's place in `sets`, not on the other sets. As many genes are to be drawn as are
    hidden; the universe is the candidates that are not visible: whatever could be drawn.

    Args:
        sets: what to mask.
        candidates_V: [V] bool, the ids that may be shown and drawn: `genes_of` a vocabulary, or a background.
        visible_share: share of a set that stays visible.
        seed: chooses what is visible, and the false genes.
        false_share: share of the prompts, over all sets, that is made of candidates that are not in the set, beside the
            visible ones.

    Returns:
        The masked sets in order, and the sets that can't be evaluated, each with the reason.
    """
    masked, skipped = [], []
    candidates = np.flatnonzero(candidates_V)
    for place, known in enumerate(sets):
        ids = known.ids[candidates_V[known.ids]]
        length, outside_background = len(ids), len(known.ids) - len(ids)
        if length < 2:
            where = "the background" if outside_background else "the vocabulary"
            skipped.append((known, f"{length} of its {len(known.ids) + known.outside} genes in {where}; 2 are needed"))
            continue
        order = np.random.default_rng([seed, place]).permutation(ids)
        cut = min(max(1, round(visible_share * length)), length - 1)
        visible, hidden = order[:cut], order[cut:]
        if false_share:
            others = np.setdiff1d(candidates, ids)
            random = np.random.default_rng([seed, place, _FALSE_GENES])
            # Rounded up with the probability of the fraction: of one or two visible genes 20 % would never be one.
            number = min(math.floor(false_share / (1 - false_share) * cut + random.random()), len(others))
            # Mixed in, not appended: a model that looks at the order must not tell them by their place.
            false = random.choice(others, number, replace=False)
            visible = random.permutation(np.concatenate([visible, false])).astype(np.int32)
        count = len(hidden)
        universe = len(candidates) - len(visible)
        masked.append(
            MaskedSet(
                known.name, known.library, place, known.outside, visible, hidden, count, count, universe,
                outside_background,
            )
        )  # fmt: skip
    return masked, skipped


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


def genes_of(num_ids: int) -> np.ndarray:
    """Return [V] bool: the ids of a vocabulary that are genes, not special."""
    return np.arange(num_ids) >= NUM_SPECIAL


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
