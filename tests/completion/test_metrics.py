import math

import numpy as np
import pytest

from tcc_jax.completion.evaluation import METRICS, best_ids, num_candidates, rank_keys, ranks_of, set_metrics
from tcc_jax.completion.protocol import genes_of
from tcc_jax.corpus.vocabulary import NUM_SPECIAL

SIZE = NUM_SPECIAL + 150


def slow_ranking(scores, visible, candidates):
    ids = [id_ for id_ in range(len(scores)) if candidates[id_] and id_ not in set(visible)]
    return sorted(ids, key=lambda id_: (-float(scores[id_]), id_))


def slow_metrics(ranking, hidden, hidden_count, drawn_count):
    relevant = [id_ in hidden for id_ in ranking]

    def hits(count):
        return sum(relevant[:count])

    gain = sum(1 / math.log2(place + 2) for place in range(min(100, len(ranking))) if relevant[place])
    ideal = sum(1 / math.log2(place + 2) for place in range(min(100, hidden_count)))
    precisions = [hits(place + 1) / (place + 1) for place, found in enumerate(relevant) if found]
    right = total = 0
    for first, one in enumerate(relevant):
        for second, other in enumerate(relevant):
            if one and not other:
                total += 1
                right += first < second
    first = next((place + 1 for place, found in enumerate(relevant) if found), None)
    values = {
        "hits": hits(drawn_count),
        "recall": hits(drawn_count) / hidden_count,
        "precision": hits(drawn_count) / drawn_count if drawn_count else 0.0,
        "recall_at_hidden": hits(hidden_count) / hidden_count,
        "precision_at_hidden": hits(hidden_count) / hidden_count,
        "ndcg_at_100": gain / ideal,
        "average_precision": sum(precisions) / hidden_count,
        "reciprocal_rank": 1 / first if first else 0.0,
        "auroc": right / total if total else math.nan,
    }
    for cut in (10, 50, 100):
        values[f"recall_at_{cut}"] = hits(cut) / hidden_count
        values[f"precision_at_{cut}"] = hits(cut) / cut
    return values


def random_case(rng):
    # Ties of both signs of zero, infinities and duplicates: the order must still be that of a plain sort.
    scores = rng.choice([0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, *rng.normal(size=60)], SIZE).astype(np.float32)
    candidates = genes_of(SIZE) & (rng.random(SIZE) < rng.choice([0.3, 1.0]))
    genes = rng.permutation(np.flatnonzero(candidates)).astype(np.int32)
    cuts = np.sort(rng.integers(0, min(len(genes), 60), 2))
    return scores, candidates, genes[: cuts[0]], genes[cuts[0] : cuts[1]]


@pytest.mark.parametrize("seed", range(40))
def test_every_metric_equals_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    scores, candidates, visible, hidden = random_case(rng)
    hidden_count = max(1, len(hidden) + int(rng.integers(0, 5)))
    drawn_count = int(rng.integers(0, 70))
    ranking = slow_ranking(scores, visible, candidates)
    keys = rank_keys(scores[None], [visible], candidates)[0]
    ordered = np.sort(keys)
    assert num_candidates(ordered) == len(ranking)
    assert best_ids(ordered, 25).tolist() == ranking[:25]
    assert best_ids(ordered, SIZE).tolist() == ranking
    ranks = ranks_of(ordered, keys[hidden])
    assert ranks.tolist() == sorted(ranking.index(id_) + 1 for id_ in hidden)
    values = set_metrics(ranks, hidden_count, drawn_count, len(ranking))
    expected = slow_metrics(ranking, set(hidden.tolist()), hidden_count, drawn_count)
    assert tuple(values) == METRICS and set(expected) == set(METRICS)
    for name in METRICS:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-12, err_msg=name)


def test_a_set_without_findable_genes():
    values = set_metrics(np.empty(0, np.int64), hidden_count=4, drawn_count=4, candidates=100)
    assert math.isnan(values["auroc"]) and all(value == 0 for name, value in values.items() if name != "auroc")


def test_everything_that_is_left_is_hidden():
    values = set_metrics(np.arange(1, 21), hidden_count=20, drawn_count=20, candidates=20)
    assert values["recall"] == values["average_precision"] == values["ndcg_at_100"] == 1
    assert math.isnan(values["auroc"])


def test_a_score_that_is_no_number_is_an_error():
    scores = np.zeros((1, SIZE), np.float32)
    scores[0, 20] = np.nan
    with pytest.raises(ValueError, match="not a number"):
        rank_keys(scores, [np.empty(0, np.int32)], genes_of(SIZE))
