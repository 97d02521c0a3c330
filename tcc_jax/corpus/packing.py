"""Packing: which set lengths share a row. A plan follows from the lengths alone; an epoch only shuffles it.

A set takes `<start>`, its genes and `<end>`; one that does not fit gives a random subset, without `<end>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of slots; a slot takes any set of its length.

    Attributes:
        row_length: tokens in a row.
        slot_lengths: [slots] int64 tokens in each slot, row after row.
        row_starts: [rows + 1] int64; row r has slots row_starts[r] : row_starts[r + 1].
    """

    row_length: int
    slot_lengths: np.ndarray
    row_starts: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return len(self.row_starts) - 1

    @property
    def fullness(self) -> float:
        """Share of the tokens of all rows that are not padding."""
        return float(self.slot_lengths.sum()) / (self.num_rows * self.row_length)


def segment_lengths(gene_counts: np.ndarray) -> np.ndarray:
    """Return [sets] int64 tokens of whole sets of `gene_counts` genes: `<start>`, genes, `<end>`."""
    return np.asarray(gene_counts, np.int64) + 2


def prompt_lengths(gene_counts: np.ndarray, prompt_genes: int, prompt_share: float) -> np.ndarray:
    """Return [sets] int64 tokens of the prompts of sets of `gene_counts` genes: `<start>` and the genes to be shown.

    Args:
        gene_counts: [sets] genes in each set.
        prompt_genes: most genes of a prompt.
        prompt_share: largest share of a set's genes in its prompt, under 1. At least one gene is shown where the set
            has two, and one is left out.
    """
    # As in `cut_positions`: a little slack, for 0.6 * 5 may lie under 3.
    shown = np.floor(prompt_share * gene_counts + 1e-4)
    return 1 + np.minimum(np.clip(shown, 1, None), np.minimum(gene_counts - 1, prompt_genes)).astype(np.int64)


def plan_rows(lengths: np.ndarray, row_length: int, segments_per_row: int) -> Plan:
    """Pack segments into rows, one row after the other, from a count of the segments left of each length.

    A row takes the longest segment that fits, again and again (first fit decreasing, Johnson 1973). That leaves the
    short segments to the end, where rows would close at `segments_per_row` half empty; so once full rows would need
    more than three quarters of `segments_per_row` on average, each takes its share of the shortest before it fills up.
    Deterministic, and a function of the multiset of lengths.

    Args:
        lengths: [segments] tokens, each from 1 to `row_length`.
        row_length: tokens in a row.
        segments_per_row: most segments in a row.
    """
    left = np.bincount(lengths, minlength=row_length + 1).tolist()
    # Bit l says whether a segment of length l is left: the longest that fits is then a mask and a highest bit.
    available = sum(1 << length for length, count in enumerate(left) if count)
    segments_left, tokens_left = len(lengths), int(lengths.sum())
    slots: list[int] = []
    row_starts = [0]
    while segments_left:
        share = -(-segments_left * row_length // tokens_left)
        num_shortest = share - 2 if 4 * share > 3 * segments_per_row else 0
        room, taken = row_length, 0
        while taken < segments_per_row and (fitting := available & ((2 << room) - 1)):
            shortest = 0 < taken <= num_shortest
            length = ((fitting & -fitting) if shortest else fitting).bit_length() - 1
            left[length] -= 1
            if not left[length]:
                available ^= 1 << length
            slots.append(length)
            room -= length
            taken += 1
        segments_left -= taken
        tokens_left -= row_length - room
        row_starts.append(len(slots))
    return Plan(row_length, np.array(slots, np.int64), np.array(row_starts, np.int64))
