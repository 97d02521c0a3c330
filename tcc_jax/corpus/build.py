"""GMT files to a prepared corpus: harmonise, filter, deduplicate, hold out, split, with counts after every step."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tcc_jax.corpus.gmt import find_gmt_files
from tcc_jax.corpus.harmonise import MappedSets, map_sets, read_sets, report_lines
from tcc_jax.corpus.similarity import Sets, leak_counts, near_duplicate_clusters, nearest, num_bands
from tcc_jax.corpus.store import SPLITS, Corpus
from tcc_jax.corpus.symbols import EMBEDDED_TABLE, SymbolTable
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, SPECIAL_SYMBOLS, Vocabulary
from tcc_jax.files import embedded, sha256
from tcc_jax.terminal import UserError, log, log_lines, progress
from tcc_jax.terminal import table as text_table

# Clusters are made at this Jaccard even where `split_jaccard` is lower: below it MinHash would have to check nearly all
# pairs. The exact comparison with validation and test that follows keeps the promise at any limit.
_CLUSTER_JACCARD = 0.5
_LARGEST_CLUSTER = 0.005
TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The steps of the preparation, in order."""

    hgnc: Path | None = None
    """HGNC table: hgnc_complete_set.txt or a custom download, plain, .gz or .xz. Default: the embedded one."""
    case_insensitive: bool = False
    """Also match symbols that differ by case, such as the mouse's Trp53."""
    min_mapped: float = 0.9
    """Drop sets of which a smaller share of genes maps to HGNC."""
    holdout: tuple[Path, ...] = ()
    """GMT files whose sets, and every set near one of them, are kept out of the corpus; compared on all genes that map,
    and again on those that the corpus keeps."""
    max_jaccard: float = 0.5
    """Jaccard to a held-out set from which a set is dropped."""
    min_sets_per_gene: int = 6
    """Drop genes that occur in fewer sets."""
    min_genes: int = 5
    """Drop sets with fewer genes."""
    split: Literal["random", "library", "tail"] = "random"
    """How test sets are chosen: whole clusters at random, whole libraries, or the last sets in file order."""
    test_library: tuple[str, ...] = ()
    """Libraries that form the test split, with --split library."""
    split_jaccard: float = 0.5
    """Jaccard from which two sets are near-duplicates, which never lie on two sides of the split."""
    drop_near_duplicates: bool = False
    """With --split tail, also drop training sets near a validation or test set; the other splits always do."""
    validation_share: float = 0.01
    """Share of the sets that goes to validation."""
    test_share: float = 0.05
    """Share of the sets that goes to test; with --split library the named libraries decide."""
    seed: int = 0
    """Seed of the split."""


class _Builder:
    """The sets on their way through the steps, and the counts after each."""

    def __init__(self, mapped: MappedSets) -> None:
        self.mapped = mapped
        self.sets = mapped.sets
        self.origin = np.arange(len(mapped.sets))
        self.same_as = np.arange(len(mapped.sets))
        self.counts: list[dict[str, Any]] = []

    def count(self, step: str, flag: str = "") -> None:
        genes = int(np.count_nonzero(np.bincount(self.sets.tokens))) if len(self.sets.tokens) else 0
        self.counts.append(_count(step, len(self.sets), genes, len(self.sets.tokens)))
        if not len(self.sets):
            raise self.failure(f"no gene set is left after the step {step!r}; it is decided by {flag}")

    def failure(self, message: str) -> UserError:
        """Return an error about what is left, and show the counts that led to it."""
        log(counts_table(self.counts))
        return UserError(message)

    def select(self, kept: np.ndarray) -> None:
        self.sets = self.sets.select(kept)
        self.origin = self.origin[kept]

    def collapse(self, preferred: np.ndarray | None = None) -> None:
        """Keep one of each group of sets with the same genes: a preferred one if there is one, else the first."""
        first = _first_equal(self.sets, preferred)
        self.same_as[self.origin] = self.origin[first]
        self.select(first == np.arange(len(self.sets)))

    def other_names(self) -> list[list[str]]:
        # A set collapsed into one that was itself collapsed later belongs to the last of the chain.
        final = self.same_as
        while (final[final] != final).any():
            final = final[final]
        members: dict[int, list[str]] = {}
        for index in np.flatnonzero(final != np.arange(len(final))).tolist():
            name = f"{self.mapped.libraries[index]}/{self.mapped.names[index]}"
            members.setdefault(int(final[index]), []).append(name)
        return [members.get(index, []) for index in self.origin.tolist()]


def build_corpus(gmt: Sequence[Path], options: BuildOptions) -> Corpus:
    """Prepare a corpus in memory; `store.write_corpus` puts it on disk.

    Args:
        gmt: GMT files and folders of them.
        options: the settings of every step.

    Raises:
        UserError: an input that cannot be used, or a step that leaves nothing; the message names it.
    """
    _check(options)
    files = find_gmt_files(gmt)
    holdout_files = find_gmt_files(options.holdout) if options.holdout else []
    table = SymbolTable.read(options.hgnc, options.case_insensitive)
    raw = read_sets(files)
    problems = raw.problems
    log_lines(problems.lines())
    _check_test_libraries(options, raw.libraries)
    read = _count("read", len(raw.sets), len(raw.symbols), len(raw.sets.tokens))
    mapped = map_sets(raw, table, options.min_mapped)
    log_lines(report_lines(mapped.report))
    del raw
    builder = _Builder(mapped)
    num_genes = len(mapped.genes)
    builder.counts.append(read)
    builder.count(f"at least {options.min_mapped:.0%} mapped to HGNC", "--min-mapped")
    builder.collapse(_in_test_library(builder, options))
    builder.count("exact duplicates collapsed")
    held_out = _read_holdout(options, holdout_files, table, mapped.genes)
    if held_out is not None:
        _hold_out(builder, held_out, num_genes, options.max_jaccard)
        builder.count(f"held-out sets and those at Jaccard >= {options.max_jaccard:g} dropped", "--max-jaccard")
    enough = np.bincount(builder.sets.tokens, minlength=num_genes) >= options.min_sets_per_gene
    builder.sets = builder.sets.keep_mentions(enough[builder.sets.tokens])
    builder.select(builder.sets.lengths > 0)
    builder.count(f"genes in fewer than {options.min_sets_per_gene} sets dropped", "--min-sets-per-gene")
    before, left = (count["genes"] for count in builder.counts[-2:])
    if 2 * left < before:
        log(
            f"{left:,} of {before:,} genes are in {options.min_sets_per_gene} sets or more, the others are dropped; "
            "in so small a corpus a lower --min-sets-per-gene keeps more"
        )
    builder.collapse(_in_test_library(builder, options))
    builder.count("exact duplicates collapsed again")
    builder.select(builder.sets.lengths >= options.min_genes)
    builder.count(f"sets under {options.min_genes} genes dropped", "--min-genes")
    if held_out is not None:
        # Without its rare genes a set can be nearer to a held-out one than before: look again at what is trained on.
        _hold_out(builder, _with_genes_of(builder.sets, held_out), num_genes, options.max_jaccard)
        builder.count("near-duplicates of held-out sets dropped again", "--max-jaccard")
    clusters, cluster_sizes = _cluster(builder.sets, num_genes, options)
    splits = _split(builder, clusters, options)
    kept, leaks = _drop_leaks(builder.sets, splits, num_genes, options)
    builder.select(kept)
    splits, clusters = splits[kept], clusters[kept]
    builder.count("training sets near validation or test dropped" if not kept.all() else "split")
    for index, name in enumerate(SPLITS):
        part = builder.sets.select(splits == index)
        builder.counts.append(_count(f"  {name}", len(part), len(np.unique(part.tokens)), len(part.tokens)))
    _check_splits(builder, splits, options)
    vocabulary, ids = _vocabulary(builder.sets, splits, mapped.genes, table)
    leak_report: dict[str, Any] = {"test": leaks}
    if held_out is not None:
        known = _with_genes_of(builder.sets, held_out)
        leak_report["holdout"] = _leaks(known, builder.sets.select(splits == TRAIN), num_genes)
    return Corpus(
        path=Path(),
        meta={
            "options": _options_as_json(options),
            "sources": [{"file": file.name, "sha256": sha256(file)} for file in files],
            "hgnc": _hgnc_source(options),
            "holdout": [{"file": file.name, "sha256": sha256(file)} for file in holdout_files],
            "counts": builder.counts,
            "harmonisation": mapped.report,
            "problems": {kind: int(count) for kind, count in problems.counts.items()},
            "problem_examples": {kind: [Path(place).name for place in e] for kind, e in problems.examples.items()},
            "cluster_sizes": cluster_sizes,
            "leaks": leak_report,
        },
        vocabulary=vocabulary,
        names=[mapped.names[index] for index in builder.origin.tolist()],
        libraries=[mapped.libraries[index] for index in builder.origin.tolist()],
        other_names=builder.other_names(),
        splits=splits,
        clusters=clusters,
        tokens=ids[builder.sets.tokens],
        offsets=builder.sets.offsets,
    )


def counts_table(counts: Sequence[dict[str, Any]]) -> str:
    """Return the counts after every step, as `Corpus.meta` has them, as plain text."""
    return text_table(["step", "sets", "genes", "mentions"], [list(entry.values()) for entry in counts])


def _count(step: str, sets: int, genes: int, mentions: int) -> dict[str, Any]:
    return {"step": step, "sets": int(sets), "genes": int(genes), "mentions": int(mentions)}


def _check(options: BuildOptions) -> None:
    for name in ("min_mapped", "max_jaccard", "split_jaccard", "validation_share", "test_share"):
        if not 0 <= getattr(options, name) <= 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(options, name)}: must lie between 0 and 1")
    if options.max_jaccard == 0 or options.split_jaccard == 0:
        raise UserError("--max-jaccard and --split-jaccard: 0 would drop every set; they must be above 0")
    if options.validation_share + options.test_share >= 1:
        raise UserError("--validation-share and --test-share: together they must be under 1")
    if options.min_genes < 1 or options.min_sets_per_gene < 1:
        raise UserError("--min-genes and --min-sets-per-gene: must be at least 1")
    if (options.split == "library") != bool(options.test_library):
        raise UserError("--split library and --test-library NAME... go together; give both or neither")
    if options.drop_near_duplicates and options.split != "tail":
        raise UserError("--drop-near-duplicates: only for --split tail; the other splits always drop them")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must be 0 or more")


def _check_test_libraries(options: BuildOptions, libraries: list[str]) -> None:
    known = sorted(set(libraries))
    for name in options.test_library:
        if name not in known:
            nearest_name = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"--test-library {name}: no such library among the files; the nearest is {nearest_name}")


def _in_test_library(builder: _Builder, options: BuildOptions) -> np.ndarray | None:
    if options.split != "library":
        return None
    chosen = set(options.test_library)
    return np.array([builder.mapped.libraries[index] in chosen for index in builder.origin.tolist()])


def _first_equal(sets: Sets, preferred: np.ndarray | None) -> np.ndarray:
    # Sums of random 64-bit numbers, one a gene, do not depend on order; 128 bits and the length make a clash of two
    # different sets less likely than a memory error.
    random = np.random.default_rng(0)
    size = int(sets.tokens.max()) + 1 if len(sets.tokens) else 1
    keys = [sets.lengths.astype(np.uint64)]
    for _ in range(2):
        keys.append(sets.sum(random.integers(0, 2**64, size, dtype=np.uint64)[sets.tokens]))
    rank = np.zeros(len(sets), np.int64) if preferred is None else (~preferred).astype(np.int64)
    order = np.lexsort((np.arange(len(sets)), rank, *keys))
    new = np.ones(len(sets), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    first = np.empty(len(sets), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(sets)), 0))]
    return first


def _read_holdout(options: BuildOptions, files: list[Path], table: SymbolTable, genes: list[str]) -> Sets | None:
    if not files:
        return None
    raw = read_sets(files)
    mapped = map_sets(raw, table, min_mapped=0.0)
    names = ", ".join(str(path) for path in options.holdout)
    log_lines(f"held out: {line}" for line in (*raw.problems.lines(), *report_lines(mapped.report)))
    log(f"held out: {len(mapped.sets):,} of the {len(raw.sets):,} sets in {names} have genes that map to HGNC")
    if not len(mapped.sets):
        raise UserError(f"--holdout {names}: no gene in it maps to HGNC, so nothing would be held out")
    # Genes that none of the sets has count in the union at first, so they get numbers past theirs.
    number = {gene: index for index, gene in enumerate(genes)}
    for gene in mapped.genes:
        number.setdefault(gene, len(number))
    renumber = np.array([number[gene] for gene in mapped.genes], np.int32)
    return Sets(renumber[mapped.sets.tokens], mapped.sets.offsets)


def _hold_out(builder: _Builder, held_out: Sets, num_genes: int, limit: float) -> None:
    size = max(num_genes, int(held_out.tokens.max(initial=0)) + 1)
    with progress("comparing with the held-out sets", total=len(held_out)) as advance:
        _, near = nearest(held_out, builder.sets, size, limit, advance)
    builder.select(~near)


def _with_genes_of(sets: Sets, held_out: Sets) -> Sets:
    # The others are gone from the corpus: counted, they would make a copy of one of its sets look unlike it.
    return held_out.keep_mentions(np.isin(held_out.tokens, sets.tokens))


def _cluster(sets: Sets, num_genes: int, options: BuildOptions) -> tuple[np.ndarray, dict[str, int]]:
    if options.split == "tail":
        return np.arange(len(sets)), {}
    limit = max(options.split_jaccard, _CLUSTER_JACCARD)
    with progress("looking for near-duplicates", total=num_bands(limit)[0]) as advance:
        clusters = near_duplicate_clusters(sets, num_genes, limit, options.seed, advance)
    sizes, clusters_of_size = np.unique(np.bincount(clusters), return_counts=True)
    return clusters, {str(size): int(number) for size, number in zip(sizes, clusters_of_size, strict=True)}


def _split(builder: _Builder, clusters: np.ndarray, options: BuildOptions) -> np.ndarray:
    count = len(builder.sets)
    splits = np.full(count, TRAIN, np.uint8)
    num_test = max(1, round(options.test_share * count)) if options.test_share else 0
    num_validation = max(1, round(options.validation_share * count)) if options.validation_share else 0
    if options.split == "tail":
        splits[max(0, count - num_test - num_validation) :] = VALIDATION
        splits[count - num_test :] = TEST
        return splits
    eligible = np.ones(count, bool)
    if options.split == "library":
        in_test = _in_test_library(builder, options)
        assert in_test is not None
        splits[in_test] = TEST
        # A cluster that reaches into the test libraries is no place for validation sets.
        eligible = ~np.isin(clusters, clusters[in_test])
        num_test = 0
    sizes = np.bincount(clusters)
    eligible &= sizes[clusters] <= max(1, _LARGEST_CLUSTER * count)
    candidates = np.random.default_rng(options.seed).permutation(np.unique(clusters[eligible])).tolist()
    for split, room in ((TEST, num_test), (VALIDATION, num_validation)):
        chosen = _fill(candidates, sizes, room)
        splits[np.isin(clusters, list(chosen))] = split
        candidates = [cluster for cluster in candidates if cluster not in chosen]
    return splits


def _fill(clusters: list[int], sizes: np.ndarray, room: int) -> set[int]:
    chosen = set()
    for cluster in clusters:
        if sizes[cluster] <= room:
            chosen.add(cluster)
            room -= sizes[cluster]
        if not room:
            break
    return chosen


def _check_splits(builder: _Builder, splits: np.ndarray, options: BuildOptions) -> None:
    tested = {builder.mapped.libraries[index] for index in builder.origin[splits == TEST].tolist()}
    for name in options.test_library:
        if name not in tested:
            raise builder.failure(f"--test-library {name}: none of its sets is left to test on; see the counts above")
    shares = {TRAIN: 1.0, VALIDATION: options.validation_share, TEST: options.test_share}
    for split, share in shares.items():
        if share and not (splits == split).any():
            raise builder.failure(
                f"no {SPLITS[split]} set is left: there are too few sets, or too many near-duplicates of one another; "
                "give more sets, or do without a split with --validation-share 0 or --test-share 0"
            )


def _drop_leaks(
    sets: Sets, splits: np.ndarray, num_genes: int, options: BuildOptions
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the sets to keep, [sets] bool, and how near the test sets are to what is kept for training."""
    kept = np.ones(len(sets), bool)
    dropping = options.split != "tail" or options.drop_near_duplicates
    if dropping:
        for held, others in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
            targets = np.isin(splits, others) & kept
            queries = sets.select((splits == held) & kept)
            with progress(f"comparing the {SPLITS[held]} sets", total=len(queries)) as advance:
                _, near = nearest(queries, sets.select(targets), num_genes, options.split_jaccard, advance)
            kept[np.flatnonzero(targets)[near]] = False
    return kept, _leaks(sets.select(splits == TEST), sets.select((splits == TRAIN) & kept), num_genes)


def _leaks(queries: Sets, training: Sets, num_genes: int) -> dict[str, Any]:
    with progress("leak report", total=len(queries)) as advance:
        best, _ = nearest(queries, training, num_genes, 1.0, advance)
    return leak_counts(best)


def _vocabulary(sets: Sets, splits: np.ndarray, genes: list[str], table: SymbolTable) -> tuple[Vocabulary, np.ndarray]:
    """Return the vocabulary, and the id of each gene number."""
    counts = np.bincount(sets.select(splits == TRAIN).tokens, minlength=len(genes))
    used = np.flatnonzero(np.bincount(sets.tokens, minlength=len(genes)))
    # `genes` is sorted, so a stable sort by falling count leaves equal counts ordered by symbol.
    order = used[np.argsort(-counts[used], kind="stable")]
    ids = np.zeros(len(genes), np.int64)
    ids[order] = NUM_SPECIAL + np.arange(len(order))
    symbols = [genes[index] for index in order]
    vocabulary = Vocabulary(
        symbols=(*SPECIAL_SYMBOLS, *symbols),
        hgnc_ids=("",) * NUM_SPECIAL + tuple(table.hgnc_ids[symbol] for symbol in symbols),
        counts=np.concatenate([np.zeros(NUM_SPECIAL, np.int64), counts[order]]),
    )
    return vocabulary, ids


def _options_as_json(options: BuildOptions) -> dict[str, Any]:
    # File names only: the same input prepared elsewhere must give the same bytes.
    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in vars(options).items() if name in _OPTION_NAMES}


_OPTION_NAMES = {field.name for field in dataclasses.fields(BuildOptions)}


def _hgnc_source(options: BuildOptions) -> dict[str, str]:
    path = embedded(EMBEDDED_TABLE) if options.hgnc is None else options.hgnc
    return {"file": path.name, "sha256": sha256(path)}
