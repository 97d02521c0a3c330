import jax.numpy as jnp
import numpy as np

from tcc_jax.completion.ranker import power_of_two, rank, top_genes
from tcc_jax.corpus.vocabulary import NUM_SPECIAL


def brute_force(scores, visible, count):
    candidates = [id_ for id_ in range(NUM_SPECIAL, len(scores)) if id_ not in set(visible.tolist())]
    order = sorted(candidates, key=lambda id_: (-scores[id_], id_))[:count]
    weights = np.exp(scores[candidates].astype(np.float64) - scores[candidates].max())
    return order, np.exp(scores[order].astype(np.float64) - scores[candidates].max()) / weights.sum()


def test_ranking_equals_brute_force_with_ties_in_any_batch():
    rng = np.random.default_rng(0)
    # Scores on a coarse grid: most have a tie.
    scores = rng.integers(-3, 4, (300, 90)).astype(np.float32)
    visible = [NUM_SPECIAL + rng.choice(74, rng.integers(0, 30), replace=False).astype(np.int32) for _ in scores]
    counts = rng.integers(1, 60, len(scores)).tolist()
    rows = {id(ids): row for row, ids in enumerate(visible)}
    done = []
    ids, probabilities = rank(lambda batch: scores[[rows[id(one)] for one in batch]], visible, counts, done.append)
    assert sum(done) == len(scores)
    for row in range(len(scores)):
        expected, shares = brute_force(scores[row], visible[row], counts[row])
        assert ids[row].tolist() == expected
        np.testing.assert_allclose(probabilities[row], shares, rtol=1e-5)


def test_fewer_candidates_than_asked_for():
    visible = [np.arange(NUM_SPECIAL, 20, dtype=np.int32), np.arange(NUM_SPECIAL, 22, dtype=np.int32)]
    ids, probabilities = rank(lambda batch: np.zeros((len(batch), 22), np.float32), visible, [50, 3])
    assert ids[0].tolist() == [20, 21] and ids[1].tolist() == []
    np.testing.assert_allclose(probabilities[0], [0.5, 0.5])


def test_no_sets():
    assert rank(lambda batch: np.zeros((0, 20)), [], []) == ([], [])


def test_probabilities_leave_out_special_and_visible_ids():
    scores = np.zeros((1, 26), np.float32)
    scores[0, :NUM_SPECIAL] = 50
    scores[0, 17] = 50
    ids, shares, found = top_genes(jnp.asarray(scores), jnp.array([[17, 0]], jnp.int32), 10)
    assert ids[0, :9].tolist() == [16, *range(18, 26)]
    np.testing.assert_allclose(shares[0], [1 / 9] * 9 + [0], rtol=1e-6)
    assert found.tolist() == [9]


def test_power_of_two():
    assert [power_of_two(count) for count in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]
