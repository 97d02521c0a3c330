import numpy as np
import pytest

from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.completion.ranker import rank
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import FAMILY, make_corpus


def brute_force_neighbours(corpus, visible, neighbours, power):
    train = [set(corpus.genes(index).tolist()) for index in corpus.indices("train")]
    idf = {id_: np.log(len(train) / max(1, sum(id_ in one for one in train))) for id_ in range(corpus.vocabulary.size)}
    norm = {index: np.sqrt(sum(idf[id_] ** 2 for id_ in one)) for index, one in enumerate([*train, set(visible)])}
    similarity = [
        sum(idf[id_] ** 2 for id_ in one & set(visible)) / norm[index] / norm[len(train)]
        for index, one in enumerate(train)
    ]
    nearest = sorted(range(len(train)), key=lambda index: -similarity[index])[:neighbours]
    scores = np.zeros(corpus.vocabulary.size)
    for index in nearest:
        scores[list(train[index])] += similarity[index] ** power
    return scores


# Of these sets the fifth and sixth nearest are never equally near.
@pytest.mark.parametrize("neighbours", [500, 5])
def test_set_neighbours_equal_brute_force(tmp_path, neighbours):
    corpus = make_corpus(tmp_path / "corpus")
    rng = np.random.default_rng(0)
    visible = [rng.choice(60, rng.integers(1, 9), replace=False).astype(np.int32) + NUM_SPECIAL for _ in range(40)]
    scores = SetNeighbours(TrainingIndex(corpus), neighbours)(visible)
    for row, ids in enumerate(visible):
        expected = brute_force_neighbours(corpus, ids.tolist(), neighbours, 3)
        np.testing.assert_allclose(scores[row], expected, rtol=1e-4, atol=1e-6)


def test_nearest_sets_alone_count(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [corpus.genes(int(index))[:4].astype(np.int32) for index in corpus.indices("test")[:5]]
    scores = SetNeighbours(TrainingIndex(corpus), neighbours=1)(visible)
    held = [set(corpus.genes(int(index)).tolist()) for index in corpus.indices("train")]
    for row in scores:
        assert set(np.flatnonzero(row).tolist()) in held


def test_nothing_visible_leaves_all_genes_tied(tmp_path):
    scores = SetNeighbours(TrainingIndex(make_corpus(tmp_path / "corpus")))(
        [np.array([16], np.int32), np.empty(0, np.int32)]
    )
    assert (scores[1] == 0).all() and (scores[0] > 0).any()


def test_set_neighbours_find_the_family(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    visible = [np.arange(NUM_SPECIAL, NUM_SPECIAL + 4, dtype=np.int32)]
    ids, _ = rank(SetNeighbours(TrainingIndex(corpus)), visible, [16])
    assert (ids[0] < NUM_SPECIAL + FAMILY).all()
