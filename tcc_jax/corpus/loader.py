"""Batches of packed rows: a pure function of (corpus, settings, seed, step), the same on any number of hosts.

Grain reads ahead in threads; the state of the loader is the step number.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator

import grain
import numpy as np

from tcc_jax.config import Config, DataConfig
from tcc_jax.corpus.packing import Plan, plan_rows, prompt_lengths, segment_lengths
from tcc_jax.corpus.store import Corpus, Split
from tcc_jax.corpus.vocabulary import END, START
from tcc_jax.terminal import UserError

Batch = dict[str, np.ndarray]


class BatchSource(grain.sources.RandomAccessDataSource):
    """Batches by step. Every epoch deals the sets of each length anew to the slots of the plan, and shuffles the rows.

    Without weights an epoch shows every set once. With them, a set of weight w is seen w / (mean weight of the sets)
    times in an epoch on average, by systematic resampling: floor or ceiling of that each time. An epoch keeps its
    rows, so sets drawn more often than there are slots of their length go to the nearest ones left free: in a shorter
    slot a set gives a fresh random subset, in a longer one it leaves padding.

    A batch is a dict of int32 arrays, B rows of T tokens with at most M segments:
        tokens: [B, T] ids, 0 is padding.
        segments: [B, T] number of the segment in its row, from 1; 0 is padding.
        starts: [B, M] column of each segment's `<start>`; 0 for unused slots.
        gene_counts: [B, M] genes in each segment; 0 for unused slots.

    With `prompt_genes` a segment is only the prompt that `packing.prompt_lengths` allows, without `<end>`, and the
    genes left out come beside it:
        set_sizes: [B, M] genes in the whole set; 0 for unused slots.
        targets: [B, M, R] ids of R = `target_genes` of those left out, or of all, then 0.
    """

    def __init__(self, config: Config, corpus: Corpus, split: Split, num_hosts: int = 1, host: int = 0) -> None:
        """Plan the epoch. `training.batch_rows` is over all hosts; this one gives rows host * B / num_hosts and on.

        A training set's weight is that of its library, 1 unless named, times the number of sets of its library in the
        split to the power -`library_balance`, times the number in its near-duplicate cluster to the power
        -`cluster_balance`. Sets of other splits weigh the same.

        Raises:
            UserError: the split is empty, the rows cannot be divided among the hosts, genes are to come in the order of
                their files and the corpus has lost it, a library with a weight is not in the corpus (the nearest ones
                are named), or no set has a weight over 0.
        """
        training, objective = config.training, config.objective
        rows, row_length = training.batch_rows, training.row_length
        if rows % num_hosts:
            raise UserError(f"training.batch_rows = {rows}: must be a multiple of the number of hosts, {num_hosts}")
        if config.data.gene_order == "file" and "packed_from" in corpus.meta:
            raise UserError(
                f"data.gene_order = 'file': {corpus.path} was unpacked from a file that does not keep it; prepare the "
                "corpus from the GMT files, or train with data.gene_order = 'shuffled'"
            )
        self._corpus = corpus
        self._sets = corpus.indices(split)
        if not len(self._sets):
            raise UserError(f"{corpus.path}: no {split} sets in this corpus; prepare it with a larger share")
        self._prompt_genes, self._prompt_share = objective.prompt_genes, objective.cut_high
        self._target_genes = objective.target_genes if objective.prompt_genes else 0
        self._lengths = np.minimum(self._whole_lengths(corpus.lengths[self._sets]), row_length)
        self._weights = _set_weights(corpus, split, config.data if split == "train" else DataConfig())
        self.plan: Plan = plan_rows(self._lengths, row_length, training.segments_per_row)
        self._batch_rows, self._segments_per_row = rows, training.segments_per_row
        self._host_rows = slice(host * rows // num_hosts, (host + 1) * rows // num_hosts)
        self._seed, self._gene_order = config.run.seed, config.data.gene_order
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._slots_by_length = np.argsort(self.plan.slot_lengths, kind="stable")

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many sets are seen as there are; batches run on over the end of an epoch."""
        return self.plan.num_rows / self._batch_rows

    def __len__(self) -> int:
        """Return a number of steps no run reaches: batches go on for ever."""
        return 2**40

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step, this host's rows."""
        rows = np.arange(self._batch_rows)[self._host_rows] + step * self._batch_rows
        plan, length, most = self.plan, self.plan.row_length, self._segments_per_row
        batch = {
            "tokens": np.zeros((len(rows), length), np.int32),
            "segments": np.zeros((len(rows), length), np.int32),
            "starts": np.zeros((len(rows), most), np.int32),
            "gene_counts": np.zeros((len(rows), most), np.int32),
        }
        if self._prompt_genes:
            batch["set_sizes"] = np.zeros((len(rows), most), np.int32)
            batch["targets"] = np.zeros((len(rows), most, self._target_genes), np.int32)
        epochs, places = np.divmod(rows, plan.num_rows)
        for epoch in np.unique(epochs):
            order, dealt, copies = self._epoch(int(epoch))
            here = np.flatnonzero(epochs == epoch)
            planned = order[places[here]]
            first_slots = plan.row_starts[planned]
            row, in_row = _ragged(plan.row_starts[planned + 1] - first_slots)
            slots = first_slots[row] + in_row
            self._fill(batch, here[row], in_row, plan.slot_lengths[slots], dealt[slots], copies[slots], int(epoch))
        return batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batch of the start step, then of the next, for ever, read ahead by Grain's threads."""
        dataset = grain.MapDataset.source(self)[start_step:]
        # NumPy works outside the interpreter's lock, and an accelerator has many cores beside it.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(8, max(2, cores // 2))
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))

    def _whole_lengths(self, gene_counts: np.ndarray) -> np.ndarray:
        """Return the tokens of segments that nothing cuts short."""
        if self._prompt_genes:
            return prompt_lengths(gene_counts, self._prompt_genes, self._prompt_share)
        return segment_lengths(gene_counts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the order of the plan's rows, and for each slot its set and which copy of it in this epoch."""
        epochs = self._epochs
        if epoch not in epochs:
            # A batch may reach over the end of an epoch, so two are kept. Threads replace the dict, never change it.
            epochs = dict([*epochs.items(), (epoch, self._deal(epoch))][-2:])
            self._epochs = epochs
        return epochs[epoch]

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.Generator(np.random.Philox([self._seed, epoch]))
        order = random.permutation(self.plan.num_rows)
        shuffled = random.permutation(len(self._sets))
        drawn, copies = _ragged(self._counts(random))
        shuffled = shuffled[np.argsort(self._lengths[drawn[shuffled]], kind="stable")]
        drawn, copies, slots = drawn[shuffled], copies[shuffled], self._slots_by_length
        # Each set goes to a slot of its length while there is one, and the rest, by length, to the slots then free:
        # no other way cuts and pads less.
        fits, taken = _in_common(self._lengths[drawn], self.plan.slot_lengths[slots])
        fitted, slots = np.argsort(~fits, kind="stable"), slots[np.argsort(~taken, kind="stable")]
        dealt, numbers = np.empty_like(drawn), np.empty_like(copies)
        dealt[slots], numbers[slots] = self._sets[drawn[fitted]], copies[fitted]
        return order, dealt, numbers

    def _counts(self, random: np.random.Generator) -> np.ndarray:
        """Return [sets] how often each set is seen in an epoch, by systematic resampling; they add up to the sets."""
        number, weights = len(self._weights), self._weights
        if (weights == weights[0]).all():
            return np.ones(number, np.int64)
        # Drawn along weights, and along lengths within: what sets of one weight are due is met to within one set.
        shuffled = random.permutation(number)
        shuffled = shuffled[np.lexsort((self._lengths[shuffled], weights[shuffled]))]
        sums = np.cumsum(weights[shuffled])
        last = np.minimum(np.floor(sums / sums[-1] * number + random.random()), number).astype(np.int64)
        counts = np.empty(number, np.int64)
        counts[shuffled] = np.diff(last, prepend=0)
        return counts

    def _fill(
        self,
        batch: Batch,
        rows: np.ndarray,
        in_row: np.ndarray,
        slot_lengths: np.ndarray,
        sets: np.ndarray,
        copies: np.ndarray,
        epoch: int,
    ) -> None:
        offsets = self._corpus.offsets
        set_starts, gene_counts = offsets[sets], offsets[sets + 1] - offsets[sets]
        lengths = np.minimum(self._whole_lengths(gene_counts), slot_lengths)
        has_end = gene_counts + 2 == lengths
        kept_counts = lengths - 1 - has_end
        drawn_counts = np.minimum(kept_counts + self._target_genes, gene_counts)
        genes, owner, place = self._drawn_genes(set_starts, gene_counts, drawn_counts, copies, epoch)
        if self._prompt_genes:
            beyond = place >= kept_counts[owner]
            who, where = owner[beyond], (place - kept_counts[owner])[beyond]
            batch["targets"][rows[who], in_row[who], where] = genes[beyond]
            batch["set_sizes"][rows, in_row] = gene_counts
            genes, owner, place = genes[~beyond], owner[~beyond], place[~beyond]

        # Segments of a row follow one another: a start is the sum of the lengths before it in its row.
        before = np.cumsum(lengths) - lengths
        starts = before - before[np.flatnonzero(in_row == 0)[np.cumsum(in_row == 0) - 1]]
        batch["tokens"][rows, starts] = START
        batch["tokens"][rows[owner], starts[owner] + 1 + place] = genes
        batch["tokens"][rows[has_end], (starts + gene_counts + 1)[has_end]] = END
        segment, within = _ragged(lengths)
        batch["segments"][rows[segment], starts[segment] + within] = in_row[segment] + 1
        batch["starts"][rows, in_row] = starts
        batch["gene_counts"][rows, in_row] = kept_counts

    def _drawn_genes(
        self, set_starts: np.ndarray, gene_counts: np.ndarray, counts: np.ndarray, copies: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw `counts` genes of each set: return them flat, with the set each belongs to and its place there."""
        owner, place = _ragged(gene_counts)
        flat = set_starts[owner] + place
        mentions = flat + copies[owner] * len(self._corpus.tokens)
        keys = _hash(np.uint64(self._seed), np.uint64(epoch), mentions.astype(np.uint64))
        # Owner in the high bits: one sort of 64-bit integers shuffles every set within itself. Stable, so that a tie
        # of two keys is broken alike wherever the set lies.
        keys = (owner.astype(np.uint64) << np.uint64(40)) | (keys >> np.uint64(24))
        flat = flat[np.argsort(keys, kind="stable")][place < counts[owner]]
        owner, place = _ragged(counts)
        if self._gene_order == "file":
            flat = flat[np.lexsort((flat, owner))]
        return self._corpus.tokens[flat], owner, place


def _set_weights(corpus: Corpus, split: Split, data: DataConfig) -> np.ndarray:
    known = sorted(set(corpus.libraries))
    for name in data.library_weights:
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(name, known, cutoff=0.0))
            raise UserError(
                f"data.library_weights: {name}: no such library in {corpus.path}; the nearest are {nearest}"
            )
    sets = corpus.indices(split)
    libraries = [corpus.libraries[index] for index in sets]
    weights = np.array([data.library_weights.get(library, 1.0) for library in libraries])
    for groups, exponent in ((libraries, data.library_balance), (corpus.clusters[sets], data.cluster_balance)):
        if exponent:
            _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
            weights *= sizes[group] ** -exponent
    if not weights.any():
        raise UserError(
            f"data.library_weights: every library with {split} sets in {corpus.path} has weight 0; give one a weight"
        )
    return weights


def _in_common(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for two ascending arrays of lengths, masks of the largest part of each that the other has too."""
    counts = [np.bincount(lengths, minlength=max(ours[-1], theirs[-1]) + 1) for lengths in (ours, theirs)]
    both = np.minimum(*counts)
    ours_in_both, theirs_in_both = (
        _ragged(count)[1] < both[lengths] for count, lengths in zip(counts, (ours, theirs), strict=True)
    )
    return ours_in_both, theirs_in_both


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for parts of `counts` items laid end to end, the part of each item and its place in it."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _hash(seed: np.uint64, epoch: np.uint64, values: np.ndarray) -> np.ndarray:
    # splitmix64's finaliser (Steele, Lea and Flood 2014): a random number for each mention that depends on nothing
    # else, so that every host, and every way to cut an epoch into batches, sees the same order.
    with np.errstate(over="ignore"):
        mixed = values + (seed * np.uint64(0xD1342543DE82EF95)) + (epoch * np.uint64(0x9E3779B97F4A7C15))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))
