"""A packed corpus comes back with the same sets, but for the order of their genes."""

import numpy as np
import pytest

from benchmarks.pack_corpus import MAGIC, pack, unpack
from tcc_jax.config import from_dict
from tcc_jax.corpus.loader import BatchSource
from tcc_jax.corpus.store import open_corpus
from tcc_jax.terminal import UserError
from tests.training.corpora import write_small_corpus


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    corpus = open_corpus(write_small_corpus(folder / "corpus"))
    size = pack(corpus, folder / "corpus.tcc")
    assert size == (folder / "corpus.tcc").stat().st_size
    return corpus, folder / "corpus.tcc"


def test_the_same_sets_come_back(packed, tmp_path):
    corpus, file = packed
    assert unpack(file, tmp_path / "again") == open_corpus(tmp_path / "again").hash != corpus.hash
    again = open_corpus(tmp_path / "again")
    assert again.meta["packed_from"] == corpus.hash
    for name in ("names", "libraries", "other_names"):
        assert getattr(again, name) == getattr(corpus, name)
    for name in ("splits", "clusters", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(corpus, name))
    assert again.vocabulary.hash == corpus.vocabulary.hash
    for index in range(corpus.num_sets):
        np.testing.assert_array_equal(again.genes(index), np.sort(corpus.genes(index)))
    config = from_dict({"training": {"row_length": 32, "batch_rows": 4, "segments_per_row": 4}})
    batch, expected = (BatchSource(config, one, "train")[0] for one in (again, corpus))
    np.testing.assert_array_equal(batch["segments"], expected["segments"])


def test_no_training_in_the_order_of_files_that_is_lost(packed, tmp_path):
    corpus, file = packed
    unpack(file, tmp_path / "again")
    config = from_dict({"data": {"gene_order": "file"}})
    assert BatchSource(config, corpus, "train").plan.num_rows
    again = open_corpus(tmp_path / "again")
    with pytest.raises(UserError, match=r"again was unpacked .* from the GMT files, or .* = 'shuffled'"):
        BatchSource(config, again, "train")


def test_a_file_that_is_there_is_kept(packed):
    with pytest.raises(UserError, match="exists"):
        pack(*packed)


@pytest.mark.parametrize("change", ["truncated", "flipped", "other"])
def test_a_damaged_file_is_named_and_leaves_nothing(packed, tmp_path, change):
    data = bytearray(packed[1].read_bytes())
    if change == "truncated":
        data = data[:-20]
    elif change == "flipped":
        data[-100] ^= 1
    else:
        data = bytearray(MAGIC.replace(b"1", b"2") + data[len(MAGIC) :])
    (tmp_path / "bad.tcc").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.tcc: not a packed corpus"):
        unpack(tmp_path / "bad.tcc", tmp_path / "out")
    assert not (tmp_path / "out").exists()
