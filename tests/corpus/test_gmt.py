"""GMT files as they come: Enrichr's dialect, compression, damage."""

import gzip
import io
import lzma

import pytest

from tcc_jax.corpus.gmt import GeneSet, Problems, find_gmt_files, library_name, read_gmt, write_gmt
from tcc_jax.terminal import UserError


def read(path, problems=None):
    return list(read_gmt(path, problems))


def write(path, text="s\t\tA\n"):
    path.write_text(text)
    return path


def test_quotes_come_off_in_pairs_and_weights_first(tmp_path):
    path = write(tmp_path / "a.gmt", '"whole"\t\t"TP53",1.0\t"MDM2,2"\tATM,NaN\tATR,-inf\n"part" name\t\tA\n')
    assert read(path) == [GeneSet("whole", "", ("TP53", "MDM2", "ATM", "ATR")), GeneSet('"part" name', "", ("A",))]


def test_enrichr_dialect(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbffirst\t\tTP53,1.0\tMDM2,-2.5e-3\tTP53\t\t\r\n"
        b"\r\n"
        b"second\thttp://x, 1\t HLA-A \tB2M\n"
        b"third\t\tna\xefve\n"
    )
    problems = Problems()
    assert read(path, problems) == [
        GeneSet("first", "", ("TP53", "MDM2")),
        GeneSet("second", "http://x, 1", ("HLA-A", "B2M")),
        GeneSet("third", "", ("naïve",)),
    ]
    assert problems.counts == {"genes repeated within a set": 1, "lines read as Latin-1": 1}
    assert problems.examples["lines read as Latin-1"] == [f"{path}:4"]


def test_names_are_not_taken_for_weights(tmp_path):
    path = tmp_path / "a.gmt"
    path.write_text("s\td\tH2-K1,x\t1-Mar\tAC1.2\n")
    assert read(path)[0].genes == ("H2-K1,x", "1-Mar", "AC1.2")


@pytest.mark.parametrize(("ending", "opener"), [(".gmt", open), (".gmt.gz", gzip.open), (".gmt.xz", lzma.open)])
def test_compression(tmp_path, ending, opener):
    path = tmp_path / f"lib{ending}"
    with opener(path, "wb") as file:
        file.write(b"s\t\tA\tB\n")
    assert read(path) == [GeneSet("s", "", ("A", "B"))]
    assert library_name(path) == "lib"


def test_malformed_lines_are_counted_with_file_and_line(tmp_path):
    path = tmp_path / "a.gmt"
    path.write_text("one\nok\t\tA\ntwo\tdescription\n\t\tA\nempty\t\t\t\n")
    problems = Problems()
    assert [gene_set.name for gene_set in read(path, problems)] == ["ok"]
    assert problems.counts == {
        "lines with fewer than three columns": 2,
        "lines without a set name": 1,
        "sets without genes": 1,
    }
    assert problems.examples["lines with fewer than three columns"] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no usable gene set"),
        (b"one\ntwo\n", "fewer than three columns: 2"),
        (b"PK\x03\x04\x00\x00\xff\xfe\x00", "binary"),
    ],
)
def test_useless_files_are_errors(tmp_path, content, words):
    path = tmp_path / "a.gmt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("ending", [".gmt.gz", ".gmt.xz"])
def test_damaged_compression_is_an_error(tmp_path, ending):
    whole = (gzip if ending.endswith("gz") else lzma).compress(b"s\t\t" + b"\t".join(b"G%d" % i for i in range(5000)))
    for content in (whole[: len(whole) // 2], b"not compressed"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged|compressed"):
            read(path)


def test_finding_files(tmp_path):
    (tmp_path / "b.gmt").write_text("s\t\tA\n")
    (tmp_path / "a.txt").write_text("s\t\tA\n")
    (tmp_path / "notes.md").write_text("")
    assert [file.name for file in find_gmt_files([tmp_path])] == ["a.txt", "b.gmt"]
    (tmp_path / "._b.gmt").write_bytes(b"\0")  # macOS leaves such files beside those it copies
    assert [file.name for file in find_gmt_files([tmp_path])] == ["a.txt", "b.gmt"]
    with pytest.raises(UserError, match="an empty path"):
        find_gmt_files([""])
    with pytest.raises(UserError, match="no file given"):
        find_gmt_files([])
    with pytest.raises(UserError, match="cannot be printed"):
        find_gmt_files([write(tmp_path / "ta\tb.gmt")])
    with pytest.raises(UserError, match="no such file"):
        find_gmt_files([tmp_path / "missing.gmt"])
    with pytest.raises(UserError, match="ending must be one of"):
        find_gmt_files([tmp_path / "notes.md"])
    (tmp_path / "b.gmt.gz").write_bytes(gzip.compress(b"s\t\tA\n"))
    with pytest.raises(UserError, match="library 'b' is already read from"):
        find_gmt_files([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no GMT file"):
        find_gmt_files([tmp_path / "empty"])


def test_writing_and_reading_back(tmp_path):
    sets = [GeneSet("a/b ../c", "d", ("A", "B")), GeneSet("tab\there", "", ("C",))]
    text = io.StringIO()
    write_gmt(text, sets)
    path = tmp_path / "x.gmt"
    path.write_text(text.getvalue())
    assert read(path) == [sets[0], GeneSet("tab here", "", ("C",))]
