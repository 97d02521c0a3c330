"""The embedded data files are what data/README.md says they are."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from tcc_jax.files import embedded, open_binary

FOLDER = Path(__file__).parent.parent / "data"
FILES = {"Reactome_MSigDB_7.5.1.gmt.xz": 1615, "WikiPathways_MSigDB_7.5.1.gmt.xz": 664, "hgnc.tsv.xz": 49014}


def read(name: str) -> bytes:
    with open_binary(embedded(name)) as file:
        return file.read()


@pytest.mark.parametrize(
    ("library", "prefix", "mentions"), [("Reactome", "REACTOME_", 89476), ("WikiPathways", "WP_", 30202)]
)
def test_every_set_is_readable_and_counted(library, prefix, mentions):
    name = f"{library}_MSigDB_7.5.1.gmt.xz"
    sets = [line.split("\t") for line in read(name).decode("ascii").splitlines()]
    assert len(sets) == FILES[name] == len({fields[0] for fields in sets})
    assert sum(len(fields) - 2 for fields in sets) == mentions
    for set_name, description, *genes in sets:
        assert set_name.startswith(prefix)
        assert description.startswith("http")
        assert len(genes) >= 5
        assert all(re.fullmatch(r"[A-Za-z0-9@._-]+", gene) for gene in genes), set_name


def test_the_hgnc_table_has_its_columns_and_statuses():
    header, *rows = (line.split("\t") for line in read("hgnc.tsv.xz").decode("utf-8").splitlines())
    assert header == [
        "HGNC ID",
        "Approved symbol",
        "Status",
        "Alias symbols",
        "Previous symbols",
        "NCBI Gene ID(supplied by NCBI)",
        "Ensembl gene ID",
    ]
    assert all(len(row) == len(header) for row in rows)
    status = [row[2] for row in rows]
    counts = {name: status.count(name) for name in set(status)}
    assert counts == {"Approved": 43837, "Symbol Withdrawn": 3381, "Entry Withdrawn": 1795}
    approved = {row[1]: row for row in rows if row[2] == "Approved"}
    assert approved["TP53"][0] == "HGNC:11998"
    assert approved["TP53"][5:] == ["7157", "ENSG00000141510"]
    assert "SEPT2" in approved["SEPTIN2"][4].split(", ")


def test_the_readme_records_the_checksum_and_size_of_every_file():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, lines in FILES.items():
        content = read(name)
        assert content.count(b"\n") == lines
        assert f"`{hashlib.sha256(content).hexdigest()}`" in readme, name
    script = (FOLDER / "make_embedded.py").read_text(encoding="utf-8")
    for checksum in re.findall(r'"([0-9a-f]{64})"', script):
        assert f"`{checksum}`" in readme
