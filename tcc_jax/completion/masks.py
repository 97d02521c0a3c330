"""Masked sets: a set of which some genes are visible, and the others are to be found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tcc_jax.completion.sets import KnownSet

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
