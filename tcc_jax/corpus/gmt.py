"""Read and write GMT: one gene set a line, tab separated: name, description, genes.

Enrichr's dialect is read too: empty descriptions, weights (`TP53,1.0`), trailing tabs, CRLF, byte order mark, Latin-1.
"""

from __future__ import annotations

import collections
import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tcc_jax.files import open_binary
from tcc_jax.terminal import UserError

ENDINGS = (".gmt", ".gmt.gz", ".gmt.xz", ".txt", ".txt.gz", ".txt.xz")
_WEIGHT = re.compile(r",\s*[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan|inf)$", re.IGNORECASE)
_QUOTED = re.compile(r'^"([^"]*)"$')
_EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class GeneSet:
    """One line of a GMT file: the genes are symbols as written, each once, in file order."""

    name: str
    description: str
    genes: tuple[str, ...]


@dataclass
class Problems:
    """What was wrong in the lines read so far: counts by kind, and the first few with file and line."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Count a problem and keep where it was, for the first few of its kind."""
        self.counts[kind] += count
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES_SHOWN:
            examples.append(where)

    def lines(self) -> list[str]:
        """Return one line a kind: how many, and where the first few are."""
        return [f"{kind}: {count:,} (first: {'; '.join(self.examples[kind])})" for kind, count in self.counts.items()]


def find_gmt_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the GMT files named, and those in the folders named (not in their subfolders), sorted by name.

    Raises:
        UserError: no path, one that does not exist, a folder without a GMT file, a file with another ending, or two
            files that would give libraries of the same name.
    """
    if not all(map(str, paths)):
        raise UserError("--gmt: an empty path; name GMT files or folders of them")
    if not paths:
        raise UserError("--gmt: no file given; name GMT files or folders of them")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if _library(file) is not None and file.is_file())
            found = [file for file in found if not file.name.startswith(".")]
            if not found:
                raise UserError(f"{path}: no GMT file in this folder (looked for {', '.join(ENDINGS)})")
            files.extend(found)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        else:
            files.append(path)
    seen: dict[str, Path] = {}
    for file in files:
        name = library_name(file)
        if name in seen:
            raise UserError(f"{file}: library {name!r} is already read from {seen[name]}; rename or leave out one")
        seen[name] = file
    return files


def library_name(path: str | Path) -> str:
    """Return the library a GMT file holds: its name without the ending.

    Raises:
        UserError: the ending is not one of `ENDINGS`, or the name holds a tab or another character that cannot be
            printed.
    """
    name = _library(Path(path))
    if not Path(path).name.isprintable():
        raise UserError(f"{str(path)!r}: a file name with characters that cannot be printed; rename it")
    if name is None:
        raise UserError(f"{path}: not a GMT file name; the ending must be one of {', '.join(ENDINGS)}")
    return name


def _library(path: Path) -> str | None:
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.name[: -len(ending)]
    return None


def read_gmt(path: str | Path, problems: Problems | None = None, keep_empty: bool = False) -> Iterator[GeneSet]:
    """Read a GMT file, plain, .gz or .xz, as `read_lines` does.

    Raises:
        UserError: no such file, a binary or damaged file, or no usable set in it.
    """
    library_name(path)
    try:
        with open_binary(path) as file:
            yield from read_lines(file, str(path), problems or Problems(), keep_empty)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not really compressed ({error}); get the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from None


def read_lines(lines: Iterable[bytes], source: str, problems: Problems, keep_empty: bool = False) -> Iterator[GeneSet]:
    """Read the lines of a GMT file one by one.

    Args:
        lines: the lines, from the first on.
        source: where they come from, for messages.
        problems: where malformed lines, repeated genes and Latin-1 lines are counted; nothing of them is silent.
        keep_empty: also yield what has a name and no gene, so that it can be listed.

    Yields:
        One `GeneSet` a usable line, in file order. Weights are taken off, repeated genes kept once.

    Raises:
        UserError: a binary file, or no usable set in it.
    """
    usable = 0
    for number, line in _decoded(lines, source, problems):
        gene_set = _parse(line, f"{source}:{number}", problems)
        usable += bool(gene_set.genes)
        if gene_set.genes or (keep_empty and gene_set.name):
            yield gene_set
    if not usable:
        first = f" ({problems.lines()[0]})" if problems.counts else ""
        raise UserError(f"{source}: no usable gene set{first}; expected tab-separated name, description, genes")


def write_gmt(file: IO[str], sets: Iterable[GeneSet]) -> None:
    """Write gene sets as GMT; a tab or newline in a name or description becomes a space."""
    for gene_set in sets:
        fields = (gene_set.name, gene_set.description, *gene_set.genes)
        file.write("\t".join(" ".join(value.split()) if "\t" in value or "\n" in value else value for value in fields))
        file.write("\n")


def _decoded(lines: Iterable[bytes], source: str, problems: Problems) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(lines, start=1):
        if b"\0" in raw:
            raise UserError(f"{source}: a binary file, not GMT (line {number} holds a zero byte)")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line = raw.decode("latin-1")
            problems.add("lines read as Latin-1", f"{source}:{number}")
        yield number, line.rstrip("\r\n")


class _Cleaner(dict[str, str]):
    # Symbols repeat millions of times: each spelling is cleaned once.
    def __missing__(self, raw: str) -> str:
        if len(self) > 2_000_000:
            self.clear()
        self[raw] = symbol = _unquoted(_WEIGHT.sub("", _unquoted(raw)))
        return symbol


_clean = _Cleaner()


def _unquoted(text: str) -> str:
    return _QUOTED.sub(r"\1", text.strip()).strip()


def _parse(line: str, where: str, problems: Problems) -> GeneSet:
    if not line.strip():
        return GeneSet("", "", ())
    fields = line.split("\t")
    name = _unquoted(fields[0])
    if len(fields) < 3:
        problems.add("lines with fewer than three columns", where)
        return GeneSet(name, "", ())
    if not name:
        problems.add("lines without a set name", where)
        return GeneSet("", "", ())
    genes = [_clean[field] for field in fields[2:]]
    unique = dict.fromkeys(genes)
    unique.pop("", None)
    if not unique:
        problems.add("sets without genes", where)
    repeated = len(genes) - genes.count("") - len(unique)
    if repeated:
        problems.add("genes repeated within a set", where, repeated)
    return GeneSet(name, fields[1].strip(), tuple(unique))
