"""Batches: what a row holds, purity in (seed, step), hosts, epochs, subsets of long sets, library weights."""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from tcc_jax.config import Config, DataConfig, TrainingConfig, from_dict
from tcc_jax.corpus.loader import BatchSource
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL, START
from tcc_jax.terminal import UserError
from tests.corpus.corpora import make_corpus

SETTINGS = dict(row_length=32, batch_rows=8, segments_per_row=3, seed=5)
SECTIONS = {
    "run": ("seed",),
    "data": ("gene_order", "library_weights", "library_balance", "cluster_balance"),
    "objective": ("prompt_genes", "cut_high", "target_genes"),
    "training": ("row_length", "batch_rows", "segments_per_row"),
}


def source_of(corpus, split, num_hosts=1, host=0, **settings):
    values = {
        section: {name: settings.pop(name) for name in names if name in settings} for section, names in SECTIONS.items()
    }
    assert not settings
    return BatchSource(from_dict(values, check=False), corpus, split, num_hosts, host)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("loader"))


def segments_of(batch):
    """Yield the tokens of each segment, and check that starts, counts and segment numbers agree with them."""
    for row in range(len(batch["tokens"])):
        tokens, segments = batch["tokens"][row], batch["segments"][row]
        used = int(segments.max())
        assert (np.diff(segments[segments > 0]) >= 0).all()
        assert not tokens[segments == 0].any()
        assert not batch["gene_counts"][row, used:].any()
        for number in range(1, used + 1):
            columns = np.flatnonzero(segments == number)
            assert columns[0] == batch["starts"][row, number - 1]
            segment = tokens[columns]
            genes = segment[segment >= NUM_SPECIAL]
            assert len(genes) == batch["gene_counts"][row, number - 1] == len(set(genes.tolist()))
            assert segment[0] == START
            assert segment.tolist() == [START, *genes, *([END] if segment[-1] == END else [])]
            yield segment


def epoch_of_segments(source, epoch):
    rows = range(epoch * source.plan.num_rows, (epoch + 1) * source.plan.num_rows)
    return [s for row in rows for s in segments_of(source[row])]


def test_an_epoch_shows_every_training_set_once(corpus):
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": 1})
    for epoch in (0, 1):
        segments = epoch_of_segments(source, epoch)
        whole = {frozenset(s[1:-1].tolist()) for s in segments if s[-1] == END}
        cut = [s[1:] for s in segments if s[-1] != END]
        sets = [corpus.genes(index) for index in corpus.indices("train")]
        assert whole == {frozenset(genes.tolist()) for genes in sets if len(genes) <= 30}
        longer = [set(genes.tolist()) for genes in sets if len(genes) > 30]
        assert len(cut) == len(longer) > 0
        for genes in cut:
            assert len(genes) == 31 and any(set(genes.tolist()) <= long for long in longer)


def test_epochs_differ_in_order_subsets_and_rows(corpus):
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": 1})
    first, second = (epoch_of_segments(source, epoch) for epoch in (0, 1))
    assert len(first) == len(second)
    assert {tuple(s) for s in first}.isdisjoint({tuple(s) for s in second if len(s) > 12})
    cut = [{frozenset(s.tolist()) for s in segments if s[-1] != END} for segments in (first, second)]
    assert cut[0] != cut[1]


def test_orders_are_uniform(corpus):
    # The first gene of a set should be each of its genes equally often: chi-square over many epochs.
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": 1})
    target = frozenset(corpus.genes(corpus.indices("train")[0]).tolist())
    index = int(corpus.indices("train")[0])
    firsts = []
    for epoch in range(2000):
        where = np.array([index])
        start, count = corpus.offsets[where], corpus.offsets[where + 1] - corpus.offsets[where]
        firsts.append(int(source._drawn_genes(start, count, count, np.zeros(1, np.int64), epoch)[0][0]))
    counts = np.array([firsts.count(gene) for gene in target])
    expected = 2000 / len(target)
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(target) - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    one, two = (source_of(corpus, "train", **SETTINGS) for _ in range(2))
    for step in (0, 3, 40):
        for key, array in one[step].items():
            np.testing.assert_array_equal(array, two[step][key])
    other = source_of(corpus, "train", **{**SETTINGS, "seed": 6})
    assert (one[0]["tokens"] != other[0]["tokens"]).any()


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_share_one_global_batch(corpus, num_hosts):
    whole = source_of(corpus, "train", **SETTINGS)
    parts = [source_of(corpus, "train", **SETTINGS, num_hosts=num_hosts, host=host) for host in range(num_hosts)]
    for step in (0, 17):
        for key, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), array)


def test_loader_continues_at_any_step(corpus):
    straight = list(itertools.islice(source_of(corpus, "train", **SETTINGS).batches(), 12))
    resumed = list(itertools.islice(source_of(corpus, "train", **SETTINGS).batches(7), 5))
    for expected, batch in zip(straight[7:], resumed, strict=True):
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])


def test_file_order(corpus):
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": 1}, gene_order="file")
    sets = {tuple(corpus.genes(index).tolist()) for index in corpus.indices("train")}
    for segment in epoch_of_segments(source, 0):
        if segment[-1] == END:
            assert tuple(segment[1:-1].tolist()) in sets


def test_long_sets_in_file_order_give_fresh_subsets(corpus):
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": 1}, gene_order="file")
    long = {tuple(corpus.genes(index).tolist()) for index in corpus.indices("train") if corpus.lengths[index] > 30}
    subsets = [{tuple(s[1:].tolist()) for s in epoch_of_segments(source, epoch) if s[-1] != END} for epoch in (0, 1)]
    assert subsets[0] != subsets[1]
    for subset in subsets[0] | subsets[1]:
        # In the order of the file: the subset is what is left of its set when the others are struck out.
        assert any(tuple(gene for gene in genes if gene in subset) == subset for genes in long)


def test_errors(corpus, tmp_path):
    with pytest.raises(UserError, match="multiple of the number of hosts"):
        source_of(corpus, "train", **SETTINGS, num_hosts=3)
    empty = make_corpus(tmp_path / "none", validation_share=0.0)
    with pytest.raises(UserError, match="no validation sets"):
        source_of(empty, "validation", **SETTINGS)


def numbered_corpus(sizes):
    """Return a corpus of `sizes` (library -> genes in each of its sets) where every mention is a gene of its own."""
    lengths = [length for of_library in sizes.values() for length in of_library]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(
        path=Path("numbered"),
        meta={},
        vocabulary=None,
        names=[],
        libraries=[library for library, of_library in sizes.items() for _ in of_library],
        other_names=[],
        splits=np.zeros(len(lengths), np.uint8),
        clusters=np.zeros(len(lengths), np.int64),
        tokens=np.arange(NUM_SPECIAL, NUM_SPECIAL + offsets[-1]).astype(np.uint16),
        offsets=offsets,
    )


def weighted_source(corpus, library_weights, **settings):
    """Return a source whose batches are whole epochs, and the sets of a batch's segments."""
    rows = source_of(corpus, "train", **SETTINGS).plan.num_rows
    settings = {**SETTINGS, "batch_rows": rows, **settings}
    source = source_of(corpus, "train", **settings, library_weights=library_weights)

    def sets_of(batch):
        firsts = np.array([segment[1] - NUM_SPECIAL for segment in segments_of(batch)])
        return np.searchsorted(corpus.offsets, firsts, side="right") - 1

    return source, sets_of


MIXED = {
    "plain": [5 + i % 24 for i in range(60)],
    "often": [5 + i * i % 37 for i in range(50)],
    "rare": [6 + i % 30 for i in range(45)],
    "never": [7 + i % 20 for i in range(45)],
}
WEIGHTS = {"often": 3.7, "rare": 0.4, "never": 0.0}


def test_equal_weights_give_the_batches_of_none():
    # Recorded before there were weights.
    corpus = numbered_corpus({f"L{i}": [5 + i * i % 37] for i in range(200)})
    for weights in ({}, {f"L{i}": 0.1 for i in range(200)}):
        source = source_of(corpus, "train", **SETTINGS, library_weights=weights)
        digest = hashlib.sha256()
        for step in (0, 1, 11, 40):
            for _, array in sorted(source[step].items()):
                digest.update(array.tobytes())
        assert digest.hexdigest() == "3c2138b2dc3d4c629d7c78473de56cc5783e6bdc4688d57299f66cab29dc73d1"


def test_sets_are_seen_in_proportion_to_the_weight_of_their_library():
    corpus = numbered_corpus(MIXED)
    source, sets_of = weighted_source(corpus, WEIGHTS)
    weights = np.array([WEIGHTS.get(library, 1.0) for library in corpus.libraries])
    expected = weights / weights.mean()
    epochs = 400
    counts = np.array([np.bincount(sets_of(source[epoch]), minlength=len(weights)) for epoch in range(epochs)])
    assert (counts.sum(axis=1) == len(weights)).all()
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    assert not counts[:, weights == 0].any()
    for weight in np.unique(weights):
        due = expected[weights == weight].sum()
        assert (abs(counts[:, weights == weight].sum(axis=1) - due) < 1).all()
    # A count is its floor or one more, independently in each epoch. Hoeffding: its mean over the epochs is off by more
    # than t with probability 2 exp(-2 epochs t^2) at most; t is such that all 200 sets together have one of 1e-6.
    t = np.sqrt(np.log(2 * len(weights) / 1e-6) / (2 * epochs))
    assert t < 0.16
    assert (abs(counts.mean(axis=0) - expected) < t).all()


def test_a_set_is_weighted_by_the_sizes_of_its_library_and_of_its_cluster():
    corpus = numbered_corpus({"large": [10] * 8, "small": [10] * 2, "single": [10], "other": [10] * 3})
    # The first four sets of the large library are near-duplicates, and one of the small library is another.
    clusters = np.array([0, 0, 0, 0, 1, 2, 3, 4, 0, 5, 6, 0, 7, 8])
    # What is not trained on does not count.
    held_out = {"splits": np.array([0] * 11 + [1] * 3, np.uint8), "libraries": [*corpus.libraries[:11], *["large"] * 3]}
    corpus = dataclasses.replace(corpus, clusters=clusters, **held_out)
    clusters = clusters[:11]
    shares = np.array([1 / 8] * 8 + [1 / 2] * 2 + [1.0])
    cases = [
        ({"library_balance": 1.0}, shares),
        ({"library_balance": 0.5}, shares**0.5),
        ({"cluster_balance": 1.0}, np.where(clusters == 0, 1 / 5, 1)),
        ({"cluster_balance": 0.5, "library_balance": 1.0}, np.where(clusters == 0, 5**-0.5, 1) * shares),
    ]
    for settings, weights in cases:
        source, sets_of = weighted_source(corpus, {"single": 0.5}, **settings)
        weights = weights * np.where(np.arange(11) == 10, 0.5, 1)
        epochs = 400
        seen = sum(np.bincount(sets_of(source[epoch]), minlength=len(weights)) for epoch in range(epochs)) / epochs
        # Hoeffding, as above: 11 sets in 4 cases.
        t = np.sqrt(np.log(2 * 44 / 1e-6) / (2 * epochs))
        np.testing.assert_allclose(seen, weights / weights.mean(), atol=t)
    assert t < 0.16
    data = DataConfig(library_weights={"single": 0.5}, cluster_balance=0.5, library_balance=1.0)
    training = TrainingConfig(row_length=32, batch_rows=1, segments_per_row=4)
    config = Config(data=data, training=training)
    np.testing.assert_allclose(BatchSource(config, corpus, "train")._weights, weights)
    np.testing.assert_array_equal(BatchSource(config, corpus, "validation")._weights, 1)


def test_weights_leave_the_rows_of_an_epoch():
    corpus = numbered_corpus(MIXED)
    plain = source_of(corpus, "train", **SETTINGS)
    source, sets_of = weighted_source(corpus, WEIGHTS)
    assert source.plan.num_rows == plain.plan.num_rows
    np.testing.assert_array_equal(source.plan.slot_lengths, plain.plan.slot_lengths)
    for epoch in range(3):
        batch = source[epoch]
        assert len(sets_of(batch)) == corpus.num_sets
        assert sorted(batch["segments"].max(axis=1)) == sorted(np.diff(source.plan.row_starts))


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_weighted_batches_are_the_same_on_any_number_of_hosts(num_hosts):
    corpus = numbered_corpus(MIXED)
    settings = dict(**SETTINGS, library_weights=WEIGHTS)
    whole = source_of(corpus, "train", **settings)
    parts = [source_of(corpus, "train", **settings, num_hosts=num_hosts, host=host) for host in range(num_hosts)]
    last = whole.plan.num_rows // 8  # reaches over the end of the first epoch
    for step in (0, last, 40):
        for key, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), array)
    resumed = next(whole.batches(40))
    np.testing.assert_array_equal(resumed["tokens"], whole[40]["tokens"])


def test_sets_go_to_the_slots_nearest_in_length():
    corpus = numbered_corpus(MIXED)
    source, _ = weighted_source(corpus, WEIGHTS)
    for epoch in range(3):
        _, sets, _ = source._epoch(epoch)
        lengths, slots = np.minimum(corpus.lengths[sets] + 2, 32), source.plan.slot_lengths
        off = abs(lengths[:, None] - slots)
        assert abs(lengths - slots).sum() == off[linear_sum_assignment(off)].sum() > 0
        in_common = np.minimum(np.bincount(lengths, minlength=33), np.bincount(slots, minlength=33)).sum()
        assert (lengths == slots).sum() == in_common > 100


def test_slots_of_a_left_out_library_take_subsets_of_longer_sets():
    corpus = numbered_corpus({"short": [10] * 12, "long": [25] * 4})
    source, sets_of = weighted_source(corpus, {"short": 0.0}, gene_order="file")
    batch = source[0]
    segments = list(segments_of(batch))
    assert (sets_of(batch) >= 12).all()
    cut = [s for s in segments if s[-1] != END]
    assert sorted(len(s) for s in segments) == [12] * 12 + [27] * 4
    # Each long set is seen four times; the copies that are cut are other subsets.
    assert len(cut) == 12 == len({tuple(s) for s in cut})


def test_slots_of_a_left_out_library_take_shorter_sets_and_padding():
    corpus = numbered_corpus({"short": [10] * 12, "long": [25] * 4})
    source, sets_of = weighted_source(corpus, {"long": 0.0})
    batch = source[0]
    segments = list(segments_of(batch))
    assert (sets_of(batch) < 12).all()
    assert [len(s) for s in segments] == [12] * 16 and all(s[-1] == END for s in segments)
    # Twice in an epoch is two orders.
    assert len({tuple(s) for s in segments}) == 16


def test_errors_of_library_weights():
    corpus = numbered_corpus(MIXED)
    with pytest.raises(UserError, match=r"data\.library_weights: offen: no such library in numbered; .* often"):
        source_of(corpus, "train", **SETTINGS, library_weights={"offen": 2.0})
    with pytest.raises(UserError, match="every library with train sets in numbered has weight 0"):
        source_of(corpus, "train", **SETTINGS, library_weights=dict.fromkeys(MIXED, 0.0))


PROMPTS = dict(prompt_genes=9, cut_high=0.5, target_genes=12)


def prompts_of(batch):
    """Yield, for each segment, its genes, the targets beyond it and the size of its set."""
    for row, slot in np.argwhere(batch["set_sizes"] > 0):
        start, count = batch["starts"][row, slot], batch["gene_counts"][row, slot]
        targets = batch["targets"][row, slot]
        prompt = batch["tokens"][row, start + 1 : start + 1 + count]
        yield tuple(prompt.tolist()), targets[targets > 0].tolist(), int(batch["set_sizes"][row, slot])


def test_a_prompt_and_the_targets_beyond_it_are_a_fresh_part_of_one_set():
    corpus = numbered_corpus({"made": [2 + i % 45 for i in range(90)]})
    rows = source_of(corpus, "train", **SETTINGS, **PROMPTS).plan.num_rows
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": rows}, **PROMPTS)
    seen = []
    for epoch in (0, 1):
        batch = source[epoch]
        assert END not in batch["tokens"]
        assert len(list(segments_of(batch))) == 90
        prompts = list(prompts_of(batch))
        assert sorted(size for _, _, size in prompts) == sorted(corpus.lengths.tolist())
        for prompt, targets, size in prompts:
            genes = np.array([*prompt, *targets])
            owners = np.searchsorted(corpus.offsets, genes - NUM_SPECIAL, side="right")
            assert len(set(owners)) == 1 and len(set(genes)) == len(genes)
            assert corpus.lengths[owners[0] - 1] == size
            assert len(prompt) == min(max(1, size // 2), 9)
            assert len(targets) == min(12, size - len(prompt))
        seen.append({prompt for prompt, _, size in prompts if size > 10})
    assert seen[0].isdisjoint(seen[1])


def test_targets_are_any_genes_of_the_set_alike():
    # Each of 30 genes is a target with probability 12 / 30: a chi-square over many epochs.
    corpus = numbered_corpus({"made": [30]})
    source = source_of(corpus, "train", **{**SETTINGS, "batch_rows": 1}, **PROMPTS)
    epochs = 3000
    targets = np.concatenate([source[epoch]["targets"][0, 0] for epoch in range(epochs)])
    counts = np.bincount(targets - NUM_SPECIAL, minlength=30)
    assert counts.sum() == 12 * epochs
    # The counts of a draw without replacement vary by (1 - 12 / 30) of those with.
    statistic = ((counts - counts.mean()) ** 2).sum() / counts.mean() / (1 - 12 / 30) * (29 / 30)
    assert statistic < 66, "chi-square with 29 degrees of freedom, p = 1e-4"


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_prompts_are_the_same_on_any_number_of_hosts(corpus, num_hosts):
    one = source_of(corpus, "train", **SETTINGS, **PROMPTS)
    hosts = [source_of(corpus, "train", **SETTINGS, **PROMPTS, num_hosts=num_hosts, host=h) for h in range(num_hosts)]
    for step in (0, 7, 60):
        for name, array in one[step].items():
            np.testing.assert_array_equal(np.concatenate([host[step][name] for host in hosts]), array)
