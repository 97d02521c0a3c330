"""Harmonisation to HGNC: order of lookups, ambiguity, case, dates, identifiers, both layouts of the table."""

import gzip
import lzma

import pytest

from tcc_jax.corpus.symbols import SymbolTable, looks_like_mouse
from tcc_jax.terminal import UserError

CUSTOM = (
    "HGNC ID\tApproved symbol\tStatus\tAlias symbols\tPrevious symbols\t"
    "NCBI Gene ID(supplied by NCBI)\tEnsembl gene ID\n"
    "HGNC:1\tTP53\tApproved\tp53, LFS1\t\t7157\tENSG00000141510\n"
    "HGNC:2\tMARCHF3\tApproved\t\tMARCH3\t115123\tENSG00000173926\n"
    "HGNC:3\tMARCHF1\tApproved\t\tMARCH1\t\t\n"
    "HGNC:4\tMTARC1\tApproved\t\tMARC1\t\t\n"
    "HGNC:5\tSEPTIN2\tApproved\t\tSEPT2, NEDD5\t\t\n"
    "HGNC:6\tXRN1\tApproved\tSEP2, SHARED\t\t\t\n"
    "HGNC:7\tC1orf1\tApproved\tSHARED\tTWICE\t\t\n"
    "HGNC:8\tGENEB\tApproved\tTWICE, LFS1b\tTP53, ONCE\t\t\n"
    "HGNC:9\tGENEC\tApproved\tONCE\tDOUBLE\t\t\n"
    "HGNC:10\tGENED\tApproved\tDOUBLE\tDOUBLE\t\t\n"
    "HGNC:11\tOLD1\tEntry Withdrawn\tGHOST\t\t\t\n"
    "HGNC:12\tOLD2~withdrawn\tSymbol Withdrawn\tGHOST2\t\t\t\n"
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "hgnc.tsv"
    path.write_text(CUSTOM)
    return SymbolTable.read(path)


@pytest.mark.parametrize(
    ("symbol", "approved", "how"),
    [
        ("TP53", "TP53", "approved"),  # also a previous symbol of GENEB: approved wins
        ("MARCH3", "MARCHF3", "previous"),
        ("ONCE", "GENEB", "previous"),  # also an alias of GENEC: previous wins
        ("TWICE", "C1orf1", "previous"),
        ("p53", "TP53", "alias"),
        ("SHARED", None, "ambiguous"),
        ("DOUBLE", None, "ambiguous"),  # an alias would decide, but the previous symbol names two genes
        ("C1ORF1", "C1orf1", "case"),
        ("P53", "TP53", "case"),
        ("Tp53", None, "unknown"),
        ("GHOST", None, "unknown"),
        ("OLD1", None, "unknown"),
        ("OLD2~withdrawn", None, "unknown"),
        ("ENSG00000141510", "TP53", "ensembl"),
        ("ENSG00000141510.17", "TP53", "ensembl"),
        ("ENSG00000000000", None, "unknown"),
        ("7157", "TP53", "entrez"),
        ("3-Mar", "MARCHF3", "date"),
        ("Mar-03", "MARCHF3", "date"),
        ("2-Sep", "SEPTIN2", "date"),
        ("1-Mar", None, "ambiguous"),
        ("9-Dec", None, "unknown"),
        ("", None, "unknown"),
    ],
)
def test_resolution(table, symbol, approved, how):
    found = table.resolve(symbol)
    assert (found.symbol, found.how) == (approved, how)


def test_case_insensitive_takes_mouse_symbols(tmp_path):
    path = tmp_path / "hgnc.tsv"
    path.write_text(CUSTOM)
    assert SymbolTable.read(path, case_insensitive=True).resolve("Tp53").symbol == "TP53"


@pytest.mark.parametrize(("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_complete_set_layout(tmp_path, ending, compress):
    path = tmp_path / f"hgnc_complete_set.txt{ending}"
    text = (
        "hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tentrez_id\tensembl_gene_id\n"
        'HGNC:1\tTP53\ttumor "protein"\tApproved\t"p53|LFS1"\tOLDP|OLDQ\t7157\tENSG00000141510\n'
    )
    path.write_bytes(compress(text.encode()))
    table = SymbolTable.read(path)
    assert [table.resolve(s).symbol for s in ("p53", "LFS1", "OLDQ", "7157")] == ["TP53"] * 4
    assert table.hgnc_ids == {"TP53": "HGNC:1"}


def test_odd_lines_and_withdrawn_symbols_without_a_status(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text(
        "symbol\tname\talias_symbol\tprev_symbol\tentrez_id\n"
        "TP53\tp\u2028rotein\tP1\t\t7157\r\nOLD~withdrawn\t\tX1\t\t\nSCAR\t\t7157\t\t\n"
    )
    table = SymbolTable.read(path)
    assert set(table.hgnc_ids) == {"TP53", "SCAR"}
    assert table.resolve("P1").symbol == "TP53"
    assert table.resolve("7157").how == "entrez"  # also an alias of SCAR: numbers are Entrez ids


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\tb\tc\n1\t2\t3\n", "not an HGNC table"),
        (b"", "not an HGNC table"),
        (b"\xff\xfe\x00", "not an HGNC table: no text in UTF-8"),
    ],
)
def test_other_tables_are_errors(tmp_path, content, words):
    path = tmp_path / "other.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        SymbolTable.read(path)


def test_what_cannot_be_read_is_said_without_pythons_words(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file"):
        SymbolTable.read(tmp_path)
    for name in ("table.gz", "table.xz"):
        (tmp_path / name).write_text("symbol\n")
        with pytest.raises(UserError, match=f"{name}: damaged or not really compressed; get"):
            SymbolTable.read(tmp_path / name)


def test_embedded_table_knows_real_genes():
    table = SymbolTable.read()
    names = {"MLL": "KMT2A", "SEPT2": "SEPTIN2", "2-Sep": "SEPTIN2", "C10ORF10": "DEPP1", "15-Sep": "SELENOF"}
    assert {old: table.resolve(old).symbol for old in names} == names
    assert table.resolve("1-Mar").how == "ambiguous"
    assert len(table.hgnc_ids) > 40_000


@pytest.mark.parametrize(
    ("symbol", "mouse"), [("Trp53", True), ("H2-Ab1", True), ("1700001A01Rik", True), ("TP53", False), ("HLA-A", False)]
)
def test_mouse_spelling(symbol, mouse):
    assert looks_like_mouse(symbol) is mouse
