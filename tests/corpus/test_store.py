"""The corpus on disk: the same bytes each time, and damage that is noticed."""

import json

import numpy as np
import pytest

from tcc_jax.corpus.store import open_corpus
from tcc_jax.corpus.vocabulary import Vocabulary
from tcc_jax.terminal import UserError
from tests.corpus.corpora import make_corpus
from tests.fake_gcs import empty_bucket


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_written_and_read_back(tmp_path):
    corpus = make_corpus(tmp_path / "a")
    assert set(files_of(corpus.path)) == {"corpus.json", "genes.tsv", "sets.tsv", "tokens.npy", "offsets.npy"}
    assert corpus.tokens.dtype == np.uint16
    assert not corpus.tokens.flags.writeable
    assert corpus.offsets.dtype == np.int64
    assert len(corpus.names) == corpus.num_sets == len(corpus.libraries) == len(corpus.splits)
    assert corpus.meta["vocabulary_hash"] == corpus.vocabulary.hash
    assert corpus.lengths.sum() == len(corpus.tokens)


def test_same_input_and_seed_give_the_same_bytes(tmp_path):
    one, two, other = (make_corpus(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert files_of(one.path) == files_of(two.path)
    assert one.hash != other.hash


@pytest.mark.parametrize("name", ["genes.tsv", "sets.tsv", "tokens.npy", "offsets.npy", "corpus.json"])
def test_truncated_edited_or_missing_files_are_named(tmp_path, name):
    corpus = make_corpus(tmp_path / "a")
    path = corpus.path / name
    content = path.read_bytes()
    flipped = bytes([content[len(content) // 2] ^ 1])
    for damaged in (content[:-2], content[: len(content) // 2] + flipped + content[len(content) // 2 + 1 :], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            open_corpus(corpus.path)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}.* missing"):
        open_corpus(corpus.path)


def test_another_format_version_says_what_to_do(tmp_path):
    corpus = make_corpus(tmp_path / "a")
    meta = json.loads((corpus.path / "corpus.json").read_text())
    meta["format_version"] = 99
    (corpus.path / "corpus.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"format version 99.*prepare it again"):
        open_corpus(corpus.path)


def test_no_corpus_here(tmp_path):
    with pytest.raises(UserError, match="no prepared corpus here"):
        open_corpus(tmp_path)


def test_vocabulary_table(tmp_path):
    vocabulary = make_corpus(tmp_path / "a").vocabulary
    vocabulary.write(tmp_path / "genes.tsv")
    again = Vocabulary.read(tmp_path / "genes.tsv")
    assert again.hash == vocabulary.hash
    np.testing.assert_array_equal(again.counts, vocabulary.counts)
    lines = (tmp_path / "genes.tsv").read_text().splitlines()
    for number, bad in ((0, "x"), (1, "0\t<gap>\t\t0"), (20, "7\tTP53\t\t1"), (21, "20\tTP53\t1")):
        (tmp_path / "bad.tsv").write_text("\n".join([*lines[:number], bad, *lines[number + 1 :]]))
        with pytest.raises(UserError, match=r"bad.tsv"):
            Vocabulary.read(tmp_path / "bad.tsv")


def test_a_corpus_in_a_bucket_is_copied_once_and_checked(tmp_path, monkeypatch):
    fake = empty_bucket()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = make_corpus(tmp_path / "a")
    fake.put_folder(corpus.path, "corpora/a")
    opened = open_corpus("gs://bucket/corpora/a")
    assert (str(opened.path), opened.hash) == ("gs://bucket/corpora/a", corpus.hash)
    np.testing.assert_array_equal(opened.tokens, corpus.tokens)
    assert isinstance(opened.tokens, np.memmap)
    folder = tmp_path / "cache" / "tcc_jax" / "corpora" / corpus.hash
    assert files_of(folder) == files_of(corpus.path)
    del fake.buckets["bucket"]["corpora/a/tokens.npy"]
    assert open_corpus("gs://bucket/corpora/a").hash == corpus.hash
    (folder / "sets.tsv").write_text("cut")
    with pytest.raises(UserError, match=r"gs://bucket/corpora/a/tokens\.npy: the file is missing"):
        open_corpus("gs://bucket/corpora/a")
    fake.write("corpora/a/tokens.npy", b"edited")
    with pytest.raises(UserError, match=r"gs://bucket/corpora/a/tokens\.npy: damaged or edited"):
        open_corpus("gs://bucket/corpora/a")
    fake.put_folder(corpus.path, "corpora/a")
    assert open_corpus("gs://bucket/corpora/a").hash == corpus.hash
    assert files_of(folder) == files_of(corpus.path)
    with pytest.raises(UserError, match="gs://bucket/corpora/none: no prepared corpus here"):
        open_corpus("gs://bucket/corpora/none")
    with pytest.raises(UserError, match="gs://missing/a: there is no bucket missing"):
        open_corpus("gs://missing/a")
