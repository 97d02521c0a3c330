import math

import numpy as np
import pytest
import scipy.stats

from tcc_jax.completion.masks import mask_sets
from tcc_jax.completion.ranker import best_ids, num_candidates, rank_keys, ranks_of
from tcc_jax.completion.sets import KnownSet
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, genes_of
from tcc_jax.evaluation.metrics import METRICS, bootstrap, compare, run_method, set_metrics
from tcc_jax.evaluation.protocol import rarest_third

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


NUM_GENES = 200
GENES = genes_of(NUM_SPECIAL + NUM_GENES)
SETS = [
    KnownSet(f"set {start}", "lib", np.arange(start, start + length, dtype=np.int32))
    for start, length in ((NUM_SPECIAL, 20), (60, 10), (100, 40), (30, 100))
]


def oracle(visible):
    # Knows the first set whole, and nothing else.
    scores = np.zeros((len(visible), len(GENES)), np.float32)
    scores[:, NUM_SPECIAL : NUM_SPECIAL + 20] = 1
    return scores


def logits(visible):
    rows = [np.random.default_rng(ids).normal(size=len(GENES)) for ids in visible]
    return 3 * np.array(rows, np.float32)


def trials(seeds=1):
    return [mask_sets(SETS, GENES, seed=seed)[0] for seed in range(seeds)]


def test_overlap_of_a_method():
    sets = trials()[0][:3]
    outcome = run_method("oracle", oracle, [sets], GENES)
    hits = outcome.metrics["hits"][0]
    assert hits[0] == 16 and outcome.metrics["recall"][0, 0] == 1 and hits[1] == 0
    assert [len(drawn) for drawn in outcome.drawn] == [16, 8, 32]
    p = []
    for masked, found in zip(sets, hits, strict=True):
        rest = NUM_GENES - len(masked.visible)
        drawn = hidden = len(masked.hidden)
        table = [[found, hidden - found], [drawn - found, rest - hidden - drawn + found]]
        p.append(scipy.stats.fisher_exact(table, alternative="greater").pvalue)
    np.testing.assert_allclose(np.exp(outcome.log_p[0]), p, rtol=1e-5)
    np.testing.assert_allclose(np.exp(outcome.log_adjusted_p[0]), scipy.stats.false_discovery_control(p), rtol=1e-5)
    assert outcome.significant(0.05).tolist() == [[True, False, False]]
    assert not outcome.significant(math.exp(outcome.log_adjusted_p[0, 0]) / 2).any()


def test_seeds_are_averaged_within_a_set_and_tested_apart():
    masks = trials(3)
    together = run_method("model", logits, masks, GENES)
    apart = [run_method("model", logits, [sets], GENES) for sets in masks]
    for name, values in together.metrics.items():
        np.testing.assert_array_equal(values, np.concatenate([one.metrics[name] for one in apart]), err_msg=name)
    np.testing.assert_array_equal(together.log_adjusted_p, np.concatenate([one.log_adjusted_p for one in apart]))
    recall = np.mean([one.metrics["recall"][0] for one in apart], axis=0)
    np.testing.assert_allclose(together.per_set("recall"), recall)
    assert [ids.tolist() for ids in together.drawn] == [ids.tolist() for ids in apart[0].drawn]


def test_drawn_genes_never_visible():
    for masked, drawn in zip(trials()[0], run_method("model", logits, trials(), GENES).drawn, strict=True):
        assert not np.isin(drawn, masked.visible).any() and (drawn >= NUM_SPECIAL).all()
        assert len(np.unique(drawn)) == masked.drawn_count


def softmax(masked):
    scores = logits([masked.visible])[0].astype(np.float64)
    scores[~GENES] = -np.inf
    scores[masked.visible] = -np.inf
    return np.exp(scores) / np.exp(scores).sum()


def test_nats_per_hidden_gene_and_calibration():
    sets = trials()[0]
    outcome = run_method("model", logits, [sets], GENES, is_model=True)
    expected, hidden = [], []
    for index, masked in enumerate(sets):
        shares = softmax(masked)
        nats = -np.log(shares[masked.hidden]).mean()
        np.testing.assert_allclose(outcome.metrics["nats_per_hidden_gene"][0, index], nats, rtol=1e-5)
        left = np.setdiff1d(np.flatnonzero(GENES), masked.visible)
        expected += (shares[left] * len(masked.hidden)).tolist()
        hidden += np.isin(left, masked.hidden).tolist()
    edges = 10.0 ** (np.arange(-16, 13) / 4)
    bins = np.digitize(expected, edges)
    calibration = outcome.calibration
    for place, number in enumerate(np.unique(bins)):
        chosen = bins == number
        assert calibration.genes[place] == chosen.sum()
        np.testing.assert_allclose(calibration.expected[place], np.mean(np.array(expected)[chosen]), rtol=1e-5)
        np.testing.assert_allclose(calibration.frequency[place], np.mean(np.array(hidden)[chosen]), rtol=1e-9)
    assert calibration.genes.sum() == sum(NUM_GENES - len(masked.visible) for masked in sets)
    assert run_method("other", logits, [sets], GENES).calibration is None


def test_rare_genes_are_ranked_among_themselves():
    counts = np.zeros(len(GENES), np.int64)
    counts[NUM_SPECIAL:] = np.random.default_rng(0).permutation(NUM_GENES)
    rare = rarest_third(counts, SETS)
    sets = trials()[0]
    outcome = run_method("model", logits, [sets], GENES, rare)
    for index, masked in enumerate(sets):
        wanted = set(masked.hidden[rare[masked.hidden]].tolist())
        scores = logits([masked.visible])[0]
        left = [id_ for id_ in np.flatnonzero(rare) if id_ not in masked.visible]
        best = sorted(left, key=lambda id_: -scores[id_])[: len(wanted)]
        recall = len(wanted & set(best)) / len(wanted) if wanted else math.nan
        np.testing.assert_allclose(outcome.metrics["rare_recall"][0, index], recall)


def test_a_background_limits_what_is_drawn():
    background = GENES & (np.arange(len(GENES)) < 120)
    sets, _ = mask_sets(SETS, background)
    outcome = run_method("model", logits, [sets], background)
    assert all((drawn < 120).all() for drawn in outcome.drawn)


def test_bootstrap_interval():
    values = np.random.default_rng(0).random(400)
    (low,), (high,) = bootstrap(values[:, None], seed=5)
    assert (low, high) == tuple(map(float, np.ravel(bootstrap(values[:, None], seed=5))))
    half_width = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half_width, values.mean() + half_width], atol=0.004)
    np.testing.assert_allclose(bootstrap(np.ones((1, 1))), 1.0)
    assert np.isnan(bootstrap(np.empty((0, 1)))).all()


def test_bootstrap_leaves_out_what_is_not_defined():
    values = np.random.default_rng(0).random((300, 2))
    values[::2, 1] = np.nan
    low, high = bootstrap(np.column_stack([values, np.full(300, np.nan)]))
    half_width = 1.96 * np.nanstd(values[:, 1]) / math.sqrt(150)
    np.testing.assert_allclose(high[1] - low[1], 2 * half_width, rtol=0.15)
    assert np.isnan(low[2]) and np.isnan(high[2])


def test_paired_comparison():
    model, other = (run_method(name, scorer, trials(2), GENES) for name, scorer in (("m", oracle), ("o", logits)))
    compared = compare(model, other)
    difference = model.per_set("recall") - other.per_set("recall")
    assert compared["won"] == (difference > 0).sum() and compared["lost"] == (difference < 0).sum()
    np.testing.assert_allclose(compared["difference"], difference.mean())
    assert compared["difference_low"] <= compared["difference"] <= compared["difference_high"]
    np.testing.assert_allclose(compared["wilcoxon_p"], scipy.stats.wilcoxon(difference[difference != 0]).pvalue)
    same = compare(model, model)
    assert same["tied"] == len(SETS) and same["wilcoxon_p"] == 1
    few = compare(model, other, metric="auroc", chosen_N=np.array([True, False, True, False]))
    apart = (model.per_set("auroc") - other.per_set("auroc"))[[0, 2]]
    assert few["metric"] == "auroc" and few["won"] + few["lost"] + few["tied"] == 2
    np.testing.assert_allclose(few["difference"], apart.mean())


def test_a_score_that_is_no_number_stops():
    with pytest.raises(ValueError, match="not a number"):
        run_method("broken", lambda visible: np.full((len(visible), len(GENES)), np.nan), trials(), GENES)
