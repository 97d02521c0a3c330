import numpy as np

from tcc_jax.baselines.popularity import popularity, random_genes
from tcc_jax.completion.ranker import rank
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tests.completion.tiny import make_corpus


def test_popularity_draws_the_most_frequent_hidden_genes(tmp_path):
    vocabulary = make_corpus(tmp_path / "corpus").vocabulary
    genes = range(NUM_SPECIAL, vocabulary.size)
    order = sorted(genes, key=lambda id_: (-vocabulary.counts[id_], id_))
    visible = np.array([order[0], order[3]], np.int32)
    ids, _ = rank(popularity(vocabulary), [visible, visible[:1]], [10, 5])
    assert ids[0].tolist() == [id_ for id_ in order if id_ not in visible][:10]
    assert ids[1].tolist() == order[1:6]


def test_random_genes_depend_on_the_seed_and_the_set_alone(tmp_path):
    vocabulary = make_corpus(tmp_path / "corpus").vocabulary
    one, two = np.array([16, 20], np.int32), np.array([30], np.int32)
    scores = random_genes(vocabulary, seed=4)
    together, apart = scores([one, two]), scores([two])
    assert together.shape == (2, vocabulary.size)
    assert (together[1] == apart[0]).all() and (together[0] != together[1]).any()
    assert (random_genes(vocabulary, seed=5)([two]) != apart).any()
