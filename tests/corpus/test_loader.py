"""Batches: what a row holds, purity in (seed, step), hosts, epochs, subsets of long sets."""

import itertools

import numpy as np
import pytest

from tcc_jax.corpus.loader import BatchSource, make_loader
from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL, START
from tcc_jax.terminal import UserError
from tests.corpus.corpora import make_corpus

SETTINGS = dict(row_length=32, batch_rows=8, segments_per_row=3, seed=5)


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
    source = BatchSource(corpus, "train", **{**SETTINGS, "batch_rows": 1})
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
    source = BatchSource(corpus, "train", **{**SETTINGS, "batch_rows": 1})
    first, second = (epoch_of_segments(source, epoch) for epoch in (0, 1))
    assert len(first) == len(second)
    assert {tuple(s) for s in first}.isdisjoint({tuple(s) for s in second if len(s) > 12})
    cut = [{frozenset(s.tolist()) for s in segments if s[-1] != END} for segments in (first, second)]
    assert cut[0] != cut[1]


def test_orders_are_uniform(corpus):
    # The first gene of a set should be each of its genes equally often: chi-square over many epochs.
    source = BatchSource(corpus, "train", **{**SETTINGS, "batch_rows": 1})
    target = frozenset(corpus.genes(corpus.indices("train")[0]).tolist())
    index = int(corpus.indices("train")[0])
    firsts = []
    for epoch in range(2000):
        where = np.array([index])
        start, count = corpus.offsets[where], corpus.offsets[where + 1] - corpus.offsets[where]
        firsts.append(int(source._drawn_genes(start, count, count, epoch)[0][0]))
    counts = np.array([firsts.count(gene) for gene in target])
    expected = 2000 / len(target)
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(target) - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    one, two = (BatchSource(corpus, "train", **SETTINGS) for _ in range(2))
    for step in (0, 3, 40):
        for key, array in one[step].items():
            np.testing.assert_array_equal(array, two[step][key])
    other = BatchSource(corpus, "train", **{**SETTINGS, "seed": 6})
    assert (one[0]["tokens"] != other[0]["tokens"]).any()


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_share_one_global_batch(corpus, num_hosts):
    whole = BatchSource(corpus, "train", **SETTINGS)
    parts = [BatchSource(corpus, "train", **SETTINGS, num_hosts=num_hosts, host=host) for host in range(num_hosts)]
    for step in (0, 17):
        for key, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), array)


def test_loader_continues_at_any_step(corpus):
    straight = list(itertools.islice(make_loader(corpus, "train", **SETTINGS), 12))
    resumed = list(itertools.islice(make_loader(corpus, "train", **SETTINGS, start_step=7), 5))
    for expected, batch in zip(straight[7:], resumed, strict=True):
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])


def test_file_order(corpus):
    source = BatchSource(corpus, "train", **{**SETTINGS, "batch_rows": 1}, gene_order="file")
    sets = {tuple(corpus.genes(index).tolist()) for index in corpus.indices("train")}
    for segment in epoch_of_segments(source, 0):
        if segment[-1] == END:
            assert tuple(segment[1:-1].tolist()) in sets


def test_long_sets_in_file_order_give_fresh_subsets(corpus):
    source = BatchSource(corpus, "train", **{**SETTINGS, "batch_rows": 1}, gene_order="file")
    long = {tuple(corpus.genes(index).tolist()) for index in corpus.indices("train") if corpus.lengths[index] > 30}
    subsets = [{tuple(s[1:].tolist()) for s in epoch_of_segments(source, epoch) if s[-1] != END} for epoch in (0, 1)]
    assert subsets[0] != subsets[1]
    for subset in subsets[0] | subsets[1]:
        # In the order of the file: the subset is what is left of its set when the others are struck out.
        assert any(tuple(gene for gene in genes if gene in subset) == subset for genes in long)


def test_errors(corpus, tmp_path):
    with pytest.raises(UserError, match="multiple of the number of hosts"):
        BatchSource(corpus, "train", **SETTINGS, num_hosts=3)
    empty = make_corpus(tmp_path / "none", validation_share=0.0)
    with pytest.raises(UserError, match="no validation sets"):
        make_loader(empty, "validation", **SETTINGS)
