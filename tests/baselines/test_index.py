"""The index of training sets against loops over sets."""

import numpy as np
import pytest

from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import make_corpus


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")


def test_sets_and_genes_find_each_other(corpus):
    index = TrainingIndex(corpus)
    train = [set(corpus.genes(int(number)).tolist()) for number in corpus.indices("train")]
    assert len(index) == len(train) and index.numbers.tolist() == corpus.indices("train").tolist()
    assert index.lengths.tolist() == [len(one) for one in train]
    for gene in range(corpus.vocabulary.size):
        holding = [place for place, one in enumerate(train) if gene in one]
        assert index.holding(gene).tolist() == holding and index.counts[gene] == len(holding)
    ids = np.array([NUM_SPECIAL + 7, NUM_SPECIAL, 0], np.int32)
    sets_P, genes_P = index.postings(ids)
    expected = [(place, gene) for gene in ids.tolist() for place, one in enumerate(train) if gene in one]
    assert list(zip(sets_P.tolist(), genes_P.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(index.members.toarray()[3].nonzero()[0], sorted(train[3]))


def test_the_best_jaccard_equals_a_slow_loop(corpus):
    train = [set(corpus.genes(int(number)).tolist()) for number in corpus.indices("train")]
    rng = np.random.default_rng(0)
    sets = [np.array(sorted(train[4]), np.int32), np.empty(0, np.int32)]
    sets += [NUM_SPECIAL + rng.choice(60, 9, replace=False).astype(np.int32) for _ in range(5)]
    expected = [max(len(one & set(ids.tolist())) / len(one | set(ids.tolist())) for one in train) for ids in sets]
    done = []
    np.testing.assert_allclose(TrainingIndex(corpus).best_jaccard(sets, done.append), expected, rtol=1e-12)
    assert expected[0] == 1 and sum(done) == len(sets)
