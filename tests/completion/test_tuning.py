import numpy as np

from tcc_jax.completion.protocol import genes_of
from tcc_jax.completion.tuning import mean_recall, validation_masks
from tests.completion.tiny import make_corpus


def test_validation_sets_are_always_the_same_ones(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    few, all_ = validation_masks(corpus, 7), validation_masks(corpus, 1000)
    assert len(few) == 7 and len(all_) == len(corpus.indices("validation"))
    for one, other in zip(few, all_, strict=False):
        assert one.name == other.name and (one.visible == other.visible).all()
        assert one.name in [corpus.names[index] for index in corpus.indices("validation")]


def test_mean_recall_equals_a_full_sort_with_ties(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_sets=300)
    masked = validation_masks(corpus, 1000)
    scores_BV = np.random.default_rng(0).integers(0, 4, (len(masked), corpus.vocabulary.size)).astype(np.float32)
    genes = np.flatnonzero(genes_of(corpus.vocabulary.size))
    recalls = []
    for scores_V, one in zip(scores_BV, masked, strict=True):
        order = sorted(set(genes.tolist()) - set(one.visible.tolist()), key=lambda id_: (-scores_V[id_], id_))
        drawn = set(order[: len(one.hidden)])
        recalls.append(len(drawn & set(one.hidden.tolist())) / len(one.hidden))
    np.testing.assert_allclose(mean_recall(scores_BV, masked), np.mean(recalls))
