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


def segment_lengths(gene_counts: np.ndarray, row_length: int) -> np.ndarray:
    """Return [sets] int64 tokens of sets of `gene_counts` genes: `<start>`, genes, `<end>`, cut to fit a row."""
    return np.minimum(gene_counts + 2, row_length).astype(np.int64)


def plan_rows(lengths: np.ndarray, row_length: int, segments_per_row: int) -> Plan:
    """Pack segments into rows by best fit decreasing.

    Each segment, longest first, goes to the fullest row that still takes it (Johnson 1973); a row closes at
    `segments_per_row`. Deterministic, and a function of the multiset of lengths alone.

    Args:
        lengths: [segments] tokens, each from 1 to `row_length`.
        row_length: tokens in a row.
        segments_per_row: most segments in a row.
    """
    rows: list[list[int]] = []
    # Rows by the room they have left; bit r of `open_rooms` says whether a row with room r is open. Finding the
    # smallest room that fits is then a shift and a lowest-bit, whatever the number of rows.
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    open_rooms = 0
    for length in np.sort(lengths)[::-1].tolist():
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            candidates = by_room[room]
            row = candidates.pop()
            if not candidates:
                open_rooms ^= 1 << room
            rows[row].append(length)
        else:
            room, row = row_length, len(rows)
            rows.append([length])
        room -= length
        if room and len(rows[row]) < segments_per_row:
            by_room[room].append(row)
            open_rooms |= 1 << room
    sizes = np.array([len(row) for row in rows], np.int64)
    flat = np.array([length for row in rows for length in row], np.int64)
    return Plan(row_length, flat, np.concatenate([[0], np.cumsum(sizes)]))
