import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tcc_jax.completion import sampler as module
from tcc_jax.completion.sampler import Sampler, Sampling, highest
from tcc_jax.config import ModelConfig
from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL, START
from tcc_jax.model.decoder import empty_cache, initial_params, merge
from tcc_jax.terminal import UserError

SIZE, LENGTH = 300, 64
CONFIG = ModelConfig(num_layers=2, width=32, num_heads=2, matmul_dtype="float32")
GREEDY = Sampling(temperature=0)


def params_of(config, scale=8):
    params = initial_params(config, SIZE, LENGTH, jax.random.key(0))
    # Larger than at the start of training, so that what is visible matters.
    return jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, params)


def sampler_of(config=CONFIG, **changes):
    return Sampler(params_of(config), config, SIZE, LENGTH, **changes)


def prompts_of(count, low=1, high=15, seed=0):
    rng = np.random.default_rng(seed)
    return [
        NUM_SPECIAL + rng.choice(SIZE - NUM_SPECIAL, rng.integers(low, high + 1), replace=False) for _ in range(count)
    ]


@jax.jit
def full_logits(params, tokens_BT):
    decoder = merge(CONFIG, SIZE, LENGTH, params)
    return decoder.logits(decoder(tokens_BT, jnp.ones_like(tokens_BT)))


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
def test_cached_logits_equal_a_full_forward_pass(position):
    config = dataclasses.replace(CONFIG, position=position)
    params = params_of(config)
    rows, length, drawn = 3, 8, 12
    lengths_B = np.array([8, 5, 2])
    random = np.random.default_rng(0)
    tokens_BT = random.integers(NUM_SPECIAL, SIZE, (rows, length)).astype(np.int32)
    genes_BM = random.integers(NUM_SPECIAL, SIZE, (rows, drawn)).astype(np.int32)
    index_S = np.arange(length + drawn)

    @jax.jit
    def cached(params, tokens_BT, genes_BM):
        decoder = merge(config, SIZE, LENGTH, params)
        prompt_BS = index_S < lengths_B[:, None]
        # Stale contents: what a cache held before must not matter.
        cache = jax.tree.map(lambda leaf: leaf + 3.0, empty_cache(config, rows, length + drawn))
        offsets_BT = np.broadcast_to(np.arange(length), (rows, length))
        visible_BTS = prompt_BS[:, None] & (index_S <= np.arange(length)[:, None])
        h_BTD, cache = decoder.extend(tokens_BT, offsets_BT, visible_BTS, 0, cache)
        logits = [decoder.logits(h_BTD[np.arange(rows), lengths_B - 1])]
        for step in range(drawn):
            visible_BS = prompt_BS | ((index_S >= length) & (index_S <= length + step))
            offsets_B1 = (lengths_B + step)[:, None]
            h_B1D, cache = decoder.extend(
                genes_BM[:, step, None], offsets_B1, visible_BS[:, None], length + step, cache
            )
            logits.append(decoder.logits(h_B1D[:, 0]))
        return jnp.stack(logits, axis=1)

    @jax.jit
    def whole(params, tokens_BT, segments_BT):
        decoder = merge(config, SIZE, LENGTH, params)
        return decoder.logits(decoder(tokens_BT, segments_BT))

    logits_BMV = cached(params, tokens_BT, genes_BM)
    whole_BT = np.zeros((rows, length + drawn), np.int32)
    for row, size in enumerate(lengths_B):
        whole_BT[row, : size + drawn] = np.concatenate([tokens_BT[row, :size], genes_BM[row]])
    expected_BTV = whole(params, whole_BT, (whole_BT > 0).astype(np.int32))
    for row, size in enumerate(lengths_B):
        expected = expected_BTV[row, size - 1 : size + drawn, :SIZE]
        np.testing.assert_allclose(logits_BMV[row, :, :SIZE], expected, rtol=1e-5, atol=2e-5)


def test_greedy_equals_full_forward_passes_one_by_one():
    prompts = prompts_of(3)
    drawn, shares = sampler_of().draw(prompts, [6, 4, 5], [0, 0, 0], GREEDY)
    params = params_of(CONFIG)
    for row, prompt in enumerate(prompts):
        tokens, expected, logits = [START, *prompt], [], None
        for _ in range([6, 4, 5][row]):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = np.array(full_logits(params, padded)[0, len(tokens) - 1, :SIZE])
            logits[[*range(NUM_SPECIAL), *tokens]] = -np.inf
            if not expected:
                first = np.exp(logits - np.logaddexp.reduce(logits))
            expected.append(int(logits.argmax()))
            tokens.append(expected[-1])
        assert drawn[row].tolist() == expected
        np.testing.assert_allclose(shares[row], first[expected], rtol=1e-4)


def test_no_gene_twice_none_visible_no_special_one_and_each_budget():
    prompts = prompts_of(20, 0)
    budgets = list(range(1, 21))
    sampling = Sampling(temperature=3.0, top_k=200)
    drawn, shares = sampler_of().draw(prompts, budgets, range(20), sampling)
    for prompt, budget, ids, probabilities in zip(prompts, budgets, drawn, shares, strict=True):
        assert len(ids) == budget == len(set(ids.tolist())) == len(probabilities)
        assert not set(ids) & set(prompt) and ids.min() >= NUM_SPECIAL and ids.max() < SIZE
        assert (probabilities > 0).all() and probabilities.sum() <= 1 + 1e-6


def test_a_row_has_the_same_bits_wherever_it_stands_and_whatever_is_beside_it():
    sampler, sampling = sampler_of(), Sampling(top_k=30)
    prompts, others = prompts_of(16, 3), prompts_of(16, 3, seed=1)
    seeds = list(range(100, 116))
    drawn, shares = sampler.draw(prompts, [16] * 16, seeds, sampling)
    order = np.random.default_rng(2).permutation(16)
    again, again_shares = sampler.draw([prompts[i] for i in order], [16] * 16, [seeds[i] for i in order], sampling)
    for place, index in enumerate(order):
        np.testing.assert_array_equal(again[place], drawn[index])
        np.testing.assert_array_equal(again_shares[place], shares[index])
    mixed, mixed_shares = sampler.draw(
        [*others[:9], prompts[5], *others[10:]], [16] * 16, [*range(9), 105, *range(6)], sampling
    )
    np.testing.assert_array_equal(mixed[9], drawn[5])
    np.testing.assert_array_equal(mixed_shares[9], shares[5])
    # Other buckets, of rows and of budgets: other bits, the same genes.
    alone, alone_shares = sampler.draw([prompts[5]], [16], [105], sampling)
    np.testing.assert_array_equal(alone[0], drawn[5])
    np.testing.assert_allclose(alone_shares[0], shares[5], rtol=1e-4)
    longer, _ = sampler.draw([prompts[5]], [17], [105], sampling)
    np.testing.assert_array_equal(longer[0][:16], drawn[5])


def test_another_seed_draws_other_genes():
    prompt = prompts_of(1)[0]
    drawn, _ = sampler_of().draw([prompt] * 3, [10] * 3, [1, 2, 1], Sampling())
    assert drawn[0].tolist() == drawn[2].tolist() != drawn[1].tolist()


def test_first_gene_follows_the_softmax_among_the_top_k_within_top_p():
    rows, k, prompt = 4096, 5, prompts_of(1)[0]
    sampler = sampler_of()
    logits = np.array(full_logits(params_of(CONFIG), np.array([[START, *prompt]], np.int32))[0, -1, :SIZE], np.float64)
    logits[[*range(NUM_SPECIAL), *prompt]] = -np.inf
    best = np.argsort(-logits)[:k]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.7)):
        weights = np.exp((logits[best] - logits[best[0]]) / temperature)
        weights /= weights.sum()
        kept = np.cumsum(weights) - weights < top_p
        weights = np.where(kept, weights, 0) / weights[kept].sum()
        sampling = Sampling(temperature=temperature, top_k=k, top_p=top_p)
        drawn, _ = sampler.draw([prompt] * rows, [1] * rows, range(rows), sampling)
        found = np.concatenate(drawn)
        shares = (found[:, None] == best).mean(axis=0)
        assert np.isin(found, best[kept]).all()
        # Five standard deviations of a share.
        np.testing.assert_allclose(shares, weights, atol=5 * np.sqrt(0.25 / rows))


def test_end_stops_a_row_when_asked_for():
    params = params_of(CONFIG)
    params["output_bias"] = params["output_bias"].at[END].set(8.0)
    sampler = Sampler(params, CONFIG, SIZE, LENGTH)
    prompts = prompts_of(16)
    drawn, _ = sampler.draw(prompts, [16] * 16, range(16), Sampling())
    assert [len(ids) for ids in drawn] == [16] * 16
    stopped, _ = sampler.draw(prompts, [16] * 16, range(16), Sampling(stop_at_end=True))
    lengths = [len(ids) for ids in stopped]
    assert min(lengths) < 16 and all(END not in ids for ids in stopped)
    params["output_bias"] = params["output_bias"].at[END].set(1e4)
    ended = Sampler(params, CONFIG, SIZE, LENGTH).draw(prompts, [16] * 16, range(16), Sampling(stop_at_end=True))[0]
    assert [len(ids) for ids in ended] == [0] * 16


def test_candidates_run_out():
    candidates_V = np.zeros(SIZE, bool)
    candidates_V[[1, 20, 30, 40, 50]] = True
    prompt = np.array([30, 31])
    drawn, shares = sampler_of().draw([prompt], [10], [0], Sampling(), candidates_V)
    assert sorted(drawn[0].tolist()) == [20, 40, 50]
    np.testing.assert_allclose(shares[0].sum(), 1, rtol=1e-5)
    nothing = sampler_of().draw([np.arange(NUM_SPECIAL, SIZE)], [5], [0], Sampling())[0]
    assert nothing[0].tolist() == []


def test_each_set_is_counted_once_when_its_batch_is_done():
    sampler, counts = sampler_of(), []
    # 70 short prompts, in two batches of at most 64 rows, 5 longer ones, and 3 sets with nothing to draw.
    prompts, budgets = prompts_of(73, 1, 15) + prompts_of(5, 16, 31), [4] * 70 + [0] * 3 + [4] * 5
    drawn, _ = sampler.draw(prompts, budgets, range(78), Sampling(), advance=counts.append)
    assert counts == [3, 64, 6, 5] and [len(ids) for ids in drawn] == budgets
    counts.clear()
    assert sampler.draw([], [], [], Sampling(), advance=counts.append) == ([], []) and not counts


def test_mixed_lengths_compile_once_a_bucket():
    config = dataclasses.replace(CONFIG, num_layers=1)
    sampler = sampler_of(config)
    before = module._draw_rows._cache_size()
    # Prompts in 16 or 32 slots, 32 sets of each: two batches of 64 rows.
    prompts = prompts_of(32, 1, 15) + prompts_of(32, 16, 31)
    budgets = np.random.default_rng(0).integers(1, 17, 64).tolist()
    sampler.draw(prompts, budgets, range(64), Sampling())
    assert module._draw_rows._cache_size() - before == 2
    sampler.draw(prompts[::-1], budgets, range(64), Sampling(temperature=0.7, top_p=0.9))
    assert module._draw_rows._cache_size() - before == 2


def test_a_second_batch_compiles_nothing_new_for_parameters_with_a_place_of_their_own():
    config = dataclasses.replace(CONFIG, num_layers=1)
    sampler = Sampler(jax.device_put(params_of(config), jax.devices()[1]), config, SIZE, LENGTH)
    before = module._draw_rows._cache_size()
    for seed in (0, 1):
        sampler.draw(prompts_of(2, seed=seed), [4, 4], [0, 1], Sampling())
    assert module._draw_rows._cache_size() - before == 1


def test_the_cache_of_a_batch_becomes_that_of_the_next():
    sampler = sampler_of()
    sampler.draw(prompts_of(2), [4, 4], [0, 1], Sampling())
    first = jax.tree.leaves(sampler._cache)
    sampler.draw(prompts_of(2), [4, 4], [0, 1], Sampling())
    assert all(leaf.is_deleted() for leaf in first)


def test_rows_spread_over_devices():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    prompts, sampling = prompts_of(16), Sampling(top_k=20)
    sampler = sampler_of(mesh=mesh)
    spread, _ = sampler.draw(prompts, [8] * 16, range(16), sampling)
    assert len(sampler._cache[0][0].sharding.device_set) == 4
    assert sampler._cache[0][0].addressable_shards[0].data.shape[0] == 4
    together, _ = sampler_of().draw(prompts, [8] * 16, range(16), sampling)
    for one, other in zip(spread, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(3, 128), (2, 4096), (2, 4100), (1, 36_096)])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_highest_equals_top_k_with_ties_and_infinities(shape, count):
    random = np.random.default_rng(0)
    values = np.round(random.normal(size=shape), 1).astype(np.float32)
    values[random.random(shape) < 0.3] = -np.inf
    values[0, 5:] = -np.inf
    for one, expected in zip(highest(jnp.asarray(values), count), jax.lax.top_k(values, count), strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("size", [5_120, 11_008])
def test_no_row_is_sorted_whole_for_its_highest_values(size):
    def draw(values_BV):
        values_BK, places_BK = highest(values_BV, 50)
        return values_BK[:, 0], jnp.take_along_axis(places_BK, jnp.argmax(values_BK, axis=1)[:, None], axis=1)

    program = jax.jit(draw).lower(jax.ShapeDtypeStruct((4, size), jnp.float32)).compile().as_text()
    assert not [line for line in program.splitlines() if " sort(" in line and f"[4,{size}]" in line]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}, {"seed": 0.5},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
