"""A corpus and a finished run, made once for a file of tests: they copy it before they change anything but its log."""

import pytest

from tcc_jax.training.loop import train
from tests.training.corpora import write_small_corpus
from tests.training.runs import config_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_small_corpus(tmp_path_factory.mktemp("corpora") / "small")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Return a run of ten steps that nothing has disturbed."""
    config = config_of(corpus, tmp_path_factory.mktemp("runs") / "straight")
    train(config)
    return config
