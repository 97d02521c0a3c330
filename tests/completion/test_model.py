import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tcc_jax
from tcc_jax.completion import model as module
from tcc_jax.completion.model import Model
from tcc_jax.completion.sampler import Sampling
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, START
from tcc_jax.model.decoder import initial_params, merge
from tcc_jax.runs.checkpoint import read_checkpoint
from tcc_jax.terminal import UserError
from tests.completion.tiny import STEP, make_corpus, make_run

ROW_LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_run(folder / "run", make_corpus(folder / "corpus"), ROW_LENGTH)
    return tcc_jax.load(folder / "run")


def scores_alone(model, prompt):
    checkpoint = model.checkpoint

    @jax.jit
    def last(params, tokens_BT):
        decoder = merge(checkpoint.config.model, model.vocabulary.size, ROW_LENGTH, params)
        return decoder.logits(decoder(tokens_BT, jnp.ones_like(tokens_BT))[0, -1])

    logits_V = last(checkpoint.params, jnp.array([[START, *prompt]], jnp.int32))
    return np.array(logits_V[: model.vocabulary.size])


def test_scores_equal_an_unpadded_forward_pass_in_any_batch(model):
    rng = np.random.default_rng(0)
    lengths = [1, 31, 0, 15, 16, 16, *rng.integers(1, 32, 90)]
    prompts = [NUM_SPECIAL + rng.choice(60, length, replace=False).astype(np.int32) for length in lengths]
    scores = np.asarray(model.score(prompts))
    assert scores.shape == (len(prompts), model.vocabulary.size) and model.checkpoint.step == STEP
    for row in (1, 2, 3, 5):
        np.testing.assert_allclose(scores[row], scores_alone(model, prompts[row]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores[-5:], model.score(prompts[-5:]), rtol=1e-5, atol=1e-5)


def test_rows_spread_over_all_devices_give_what_one_device_gives(model, monkeypatch):
    one = Model(read_checkpoint(model.checkpoint.run_directory))
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32, 75)
    prompts = [NUM_SPECIAL + rng.choice(60, length, replace=False).astype(np.int32) for length in lengths]
    devices, last_logits = [], module._last_logits
    monkeypatch.setattr(
        module, "_last_logits", lambda params, tokens, *rest: (
            devices.append((len(tokens.sharding.device_set), tokens.addressable_shards[0].data.shape[0]))
            or last_logits(params, tokens, *rest)
        ),
    )  # fmt: skip
    scores = model.score([prompts[0]] * 8)
    np.testing.assert_allclose(scores, one.score([prompts[0]] * 8), rtol=1e-5, atol=1e-5)
    assert devices == [(8, 1), (1, 16)]
    for sampling in (None, Sampling()):
        spread = list(model.propose(((prompt, 9) for prompt in prompts), sampling=sampling))
        alone = list(one.propose(((prompt, 9) for prompt in prompts), sampling=sampling))
        for (ids, shares), (expected, expected_shares) in zip(spread, alone, strict=True):
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_allclose(shares, expected_shares, rtol=1e-4)


@pytest.mark.parametrize("sampling", [None, Sampling()])
def test_a_stream_of_other_sets_compiles_nothing_new(model, caplog, sampling):
    rng = np.random.default_rng(0)

    def complete(count):
        # As many in both buckets of lengths, and always in the same bucket of rows.
        lengths = [rng.integers(1, 15) + 15 * (place % 2) for place in range(count)]
        prompts = [NUM_SPECIAL + rng.choice(60, length, replace=False).astype(np.int32) for length in lengths]
        assert len(list(model.propose(((prompt, 9) for prompt in prompts), sampling=sampling))) == count

    complete(64)
    with jax.log_compiles():
        for count in (63, 50, 57):
            complete(count)
    assert "Finished XLA compilation" not in caplog.text


def with_position(model, position):
    config = model.checkpoint.config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, position=position))
    params = initial_params(config.model, model.vocabulary.size, ROW_LENGTH, jax.random.key(3))
    return Model(dataclasses.replace(model.checkpoint, config=config, params=params))


def test_without_positions_a_prompt_can_be_longer_than_a_row_of_the_training(model):
    prompt = np.arange(NUM_SPECIAL, NUM_SPECIAL + 50, dtype=np.int32)
    assert model.prompt_limit == 4095
    np.testing.assert_allclose(model.score([prompt])[0], scores_alone(model, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_with_positions_a_prompt_longer_than_a_row_shows_a_seeded_subset(model, position):
    model = with_position(model, position)
    prompt = np.arange(NUM_SPECIAL, NUM_SPECIAL + 50, dtype=np.int32)
    assert model.prompt_limit == ROW_LENGTH - 1
    first, again = (np.asarray(model.score([prompt])) for _ in range(2))
    assert (first == again).all()
    genes = [model.vocabulary.symbols[id_] for id_ in prompt]
    for sampling in (None, Sampling()):
        proposals = model.complete(genes, 20, sampling=sampling)
        assert len(proposals) == 10
        assert not {one.symbol for one in proposals} & set(genes)
    assert [model.room_to_draw(*sizes) for sizes in ((50, 20), (30, 12), (30, 20), (8, 20), (8, 25), (58, 9))] == [
        (21, 10, 0), (19, 12, 0), (15, 16, 4), (8, 20, 0), (8, 23, 2), (29, 2, 0),
    ]  # fmt: skip
    # 31 places: the 20 drawn leave 11 for the prompt, but at least 15 of it are shown.
    assert len(model.complete(genes[:30], 20, sampling=Sampling())) == 16
    assert len(model.complete(genes[:8], 20, sampling=Sampling())) == 20


def test_complete_returns_records(model):
    proposals = model.complete(["G3", "G1", "G3"], number=5)
    logits = scores_alone(model, [NUM_SPECIAL + 3, NUM_SPECIAL + 1])[NUM_SPECIAL:]
    logits[[1, 3]] = -np.inf
    shares = np.exp(logits - np.logaddexp.reduce(logits))
    best = np.argsort(-shares, kind="stable")[:5]
    assert [one.rank for one in proposals] == [1, 2, 3, 4, 5]
    assert [one.symbol for one in proposals] == [f"G{gene}" for gene in best]
    np.testing.assert_allclose([one.probability for one in proposals], shares[best], rtol=1e-3)


def test_lists_of_lists_and_arrays_batch(model):
    both = model.complete([["G1"], ["G2", "G5"]], number=4)
    assert [one.symbol for one in both[1]] == [one.symbol for one in model.complete(["G2", "G5"], number=4)]
    for alone, together in zip(model.complete(np.array(["G1"]), number=4), both[0], strict=True):
        assert (alone.rank, alone.symbol) == (together.rank, together.symbol)
        # Another number of rows may change the last bits of a product, and no more.
        np.testing.assert_allclose(alone.probability, together.probability, rtol=1e-5)


def test_all_genes_known_leaves_nothing_to_propose(model):
    assert model.complete([f"G{index}" for index in range(60)]) == []
    assert len(model.complete(["G0"], number=1000)) == 59


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(top_k=np.int64(50), seed=np.int64(0))])
def test_numbers_may_be_those_of_numpy(model, sampling):
    found = model.complete(["G1"], np.int64(2), permutations=np.int64(1), sampling=sampling)
    assert found == model.complete(["G1"], 2, sampling=sampling and Sampling()) and len(found) == 2


@pytest.mark.parametrize(
    ("genes", "number", "message"),
    [
        (["G1", "g2"], 5, "g2: not in the vocabulary; the nearest: G2"),
        (["XXXXXXX"], 5, "XXXXXXX: not in the vocabulary"),
        ([], 5, "no gene"),
        ([["G1"], []], 5, r"^genes\[1\]: no gene"),
        ("G1", 5, "'G1': pass symbols as a list"),
        (None, 5, "None: pass symbols as a list"),
        ({"G1"}, 5, "pass symbols as a list"),
        ([1, 2], 5, "1: pass symbols as a list"),
        ([["G1"], "G2"], 5, r"^genes\[1\]: 'G2': pass symbols as a list"),
        (["G1", ["G2"]], 5, r"^genes\[0\]: 'G1': pass symbols as a list"),
        ([["G1"], ["G2"], ["G3", "g2"]], 5, r"^genes\[2\]: g2: not in the vocabulary; the nearest: G2"),
        (["G1", "BAR"], 5, "^BAR: ambiguous: several genes share that name; pass an approved symbol$"),
        ([["BAR"]], 5, r"^genes\[0\]: BAR: ambiguous"),
        (["G1"], 2.5, "number = 2.5"),
        (["BRCC1"], 5, "^BRCC1: ambiguous"),
        (["G1"], 0, "number = 0"),
        (["G1/G2"], 5, "G1/G2: not in the vocabulary"),
        (["G1\tG2"], 5, "not in the vocabulary"),
    ],
)
def test_bad_input(model, genes, number, message):
    with pytest.raises(UserError, match=message):
        model.complete(genes, number)


def test_unknown_genes_can_be_skipped(model):
    assert model.complete(["G1", "XX"], skip_unknown=True) == model.complete(["G1"])
    with pytest.raises(UserError, match="XX"):
        model.complete(["XX"], skip_unknown=True)


def test_the_background_limits_the_candidates(model):
    background = ["G1", "G5", "G7", "G50", "XX"]
    proposals = model.complete(["G1"], background=background)
    assert {one.symbol for one in proposals} == {"G5", "G7", "G50"}
    assert sum(one.probability for one in proposals) == pytest.approx(1, rel=1e-5)
    drawn = model.complete(["G1"], background=background, sampling=Sampling())
    shares = {one.symbol: one.probability for one in proposals}
    assert {one.symbol: one.probability for one in drawn} == pytest.approx(shares, rel=1e-4)
    assert model.complete(["G1"], background=set(background)) == proposals
    with pytest.raises(UserError, match="background"):
        model.complete(["G1"], background=["XX"])
    with pytest.raises(UserError, match="'G5': pass symbols"):
        model.complete(["G1"], background="G5")


def test_an_outdated_symbol_is_told_the_approved_one(model):
    vocabulary = dataclasses.replace(model.vocabulary, symbols=(*model.vocabulary.symbols[:-1], "KMT2A"))
    renamed = Model(dataclasses.replace(model.checkpoint, vocabulary=vocabulary))
    with pytest.raises(UserError, match="MLL: not an approved symbol; the approved one is KMT2A"):
        renamed.complete(["MLL"])
    with pytest.raises(UserError, match="the approved one is KMT2A, which is not in the model's vocabulary"):
        model.complete(["MLL"])
    with pytest.raises(UserError, match="KMT2A: approved but not in the model's vocabulary"):
        model.complete(["KMT2A"])


def test_permutations_average_log_probabilities(model):
    prompt = np.array([17, 30], np.int32)
    averaged = np.asarray(model.scorer(6)([prompt, prompt[:1]]))
    assert (averaged == np.asarray(model.scorer(6)([prompt, prompt[:1]]))).all()
    real = np.flatnonzero(averaged[0] > -1e29)
    logits = np.stack([scores_alone(model, order)[real] for order in ([17, 30], [30, 17], [17])])
    one, other, alone = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    # Each of the six permutations is one order or the other.
    mixtures = [(count * one + (6 - count) * other) / 6 for count in range(7)]
    assert sum(np.allclose(averaged[0, real], mixture, rtol=1e-4, atol=1e-4) for mixture in mixtures) == 1
    np.testing.assert_allclose(averaged[1, real], alone, rtol=1e-4, atol=1e-4)
    assert len(model.complete(["G1", "G2"], 5, permutations=4)) == 5
    with pytest.raises(UserError, match="permutations"):
        model.complete(["G1"], permutations=0)


def test_what_is_sampled_depends_on_the_seed_and_the_set_alone(model):
    sets = [["G1", "G2"], ["G30"], ["G5", "G44", "G9"], ["G1", "G2"]]
    drawn = model.complete(sets, 12, sampling=Sampling(seed=4))
    names = [[one.symbol for one in proposals] for proposals in drawn]
    assert names[0] == names[3]
    turned = model.complete(sets[::-1], 12, sampling=Sampling(seed=4))
    assert [[one.symbol for one in proposals] for proposals in turned] == names[::-1]
    assert [one.symbol for one in model.complete(sets[1], 12, sampling=Sampling(seed=4))] == names[1]
    assert [one.symbol for one in model.complete(sets[1], 12, sampling=Sampling(seed=5))] != names[1]


def test_a_corpus_that_cannot_be_had_is_missed_only_where_it_is_required(model, tmp_path, monkeypatch):
    class Unreachable:
        def call(self, *arguments, **more):
            raise ConnectionError("no network")

    def without_gcsfs():
        raise UserError("gs:// paths need another package")

    damaged = make_corpus(tmp_path / "damaged").path
    with open(damaged / "genes.tsv", "a") as file:
        file.write("more")
    corpus = "gs://bucket/corpus"
    for store, path, words in (
        (lambda: Unreachable(), corpus, "gs://bucket/corpus: the bucket cannot be listed: no network"),
        (without_gcsfs, corpus, "gs:// paths need another package"),
        (None, damaged, f"{damaged / 'genes.tsv'}: damaged or edited"),
        (None, make_corpus(tmp_path / "other", prefix="H").path, "has another vocabulary"),
        (None, tmp_path / "nowhere", f"the corpus {tmp_path / 'nowhere'} is not there"),
    ):
        if store:
            monkeypatch.setattr("tcc_jax.storage._store", store)
        found, why = model.corpus(path, required=False)
        assert found is None and words in why
        with pytest.raises(UserError) as error:
            model.corpus(path, required=True)
        assert str(error.value) == why and "\n" not in why


def test_a_stream_is_read_a_window_at_a_time(model, monkeypatch):
    monkeypatch.setattr("tcc_jax.completion.model.WINDOW", 8)
    read = []

    def queries():
        for index in range(30):
            read.append(index)
            yield np.array([NUM_SPECIAL + index], np.int32), 1 + index % 3

    results = model.propose(queries())
    assert len(next(results)[0]) == 1 and len(read) == 8
    sizes = [len(ids) for ids, _ in results]
    assert sizes == [1 + index % 3 for index in range(1, 30)]
    for sampling in (None, Sampling()):
        counts, done_by = [], []
        for ids, _ in model.propose(queries(), sampling=sampling, advance=counts.append):
            assert len(ids) == 1 + len(done_by) % 3
            done_by.append(sum(counts))
        # All of a window are done before the first of them is yielded.
        assert done_by == [8] * 8 + [16] * 8 + [24] * 8 + [30] * 6
