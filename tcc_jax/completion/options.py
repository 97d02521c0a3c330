"""The options of `complete`, and checks that `eval` shares. Imported before jax: --help and mistakes answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tcc_jax.corpus.gmt import find_gmt_files
from tcc_jax.files import check_input_file, check_output_file
from tcc_jax.terminal import UserError

Format = Literal["table", "tsv", "json", "gmt"]
# One program draws them all, and nothing stops it in between: minutes for so many.
MOST_SAMPLED = 4096


@dataclass(frozen=True)
class CompleteOptions:
    """Propose the genes that belong with the given ones.

    Genes on the command line are one set; so are those on standard input (`-`), one a line, unless its first line holds
    a tab: then it is GMT. Notes on symbols and sets that could not be completed go to standard error.
    """

    genes: tyro.conf.Positional[tuple[str, ...]]
    """Gene symbols, such as TP53 MDM2 CDKN1A, or - for standard input; outdated ones are mapped to the approved."""
    checkpoint: str
    """A run directory (its latest step), one step inside it (RUN/checkpoints/STEP), or an export."""
    gmt: tuple[str, ...] = ()
    """GMT files, or folders of them, whose sets to complete."""
    number: int = 20
    """Genes to propose for each set."""
    background: str | None = None
    """File of the only symbols that may be proposed, such as those on an array or expressed in a tissue."""
    decode: Literal["rank", "sample"] = "rank"
    """Rank all genes at once, or draw them one after the other, each given those before (a joint draw)."""
    permutations: int = 1
    """Ranking: average over this many random orders of the visible genes; 1 takes them as given."""
    temperature: float = 1.0
    """Sampling: divides the logits; 0 always draws the most likely gene."""
    top_k: int = 50
    """Sampling: draw among this many most likely genes."""
    top_p: float = 1.0
    """Sampling: and among the fewest of these that hold this share of their probability."""
    stop_at_end: bool = False
    """Sampling: let the model end a set before --number genes are drawn."""
    seed: int = 0
    """Sampling: chooses the genes, together with those visible. Ranking: chooses the permutations."""
    why: bool = False
    """Name the training sets most like the visible genes that hold each proposed one; needs the corpus."""
    mixture: bool = False
    """Ranking: by the model together with the relevance model, weighed on the validation split; needs the corpus. The
    weight is kept in $XDG_CACHE_HOME/tcc_jax or ~/.cache/tcc_jax; the first time takes longer."""
    corpus: str | None = None
    """The prepared corpus for --why and --mixture; the one the checkpoint was trained on unless set."""
    format: Format | None = None
    """Output; unless set, by the ending of --out, else a table on a terminal and TSV otherwise."""
    out: str | None = None
    """File to write, whole or not at all; standard output unless set."""
    hgnc: str | None = None
    """HGNC table that maps the symbols; the embedded one unless set."""
    case_insensitive: bool = False
    """Also match symbols that differ by case, such as the mouse's Trp53, as prepare does with this option."""

    def check(self) -> None:
        """Raise `UserError` naming the first value that can't be used, alone or beside the others."""
        if not self.genes and not self.gmt:
            raise UserError(
                "no gene given; name at least one, such as TP53, or a file with --gmt, or - for standard input"
            )
        if self.genes and self.gmt:
            raise UserError("genes and --gmt are both given; choose one")
        if "-" in self.genes and len(self.genes) > 1:
            raise UserError("- (standard input) and other genes are both given; choose one")
        for name in ("number", "permutations"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.mixture and (self.decode == "sample" or self.permutations > 1):
            raise UserError("--mixture ranks by one pass; leave out --decode sample and --permutations")
        sampling = ("temperature", "top_k", "top_p", "stop_at_end")
        other, ignored = ("rank", ("permutations",)) if self.decode == "sample" else ("sample", sampling)
        refuse_ignored(self, f"--decode {other}", *ignored)
        if not self.why and not self.mixture:
            refuse_ignored(self, "--why or --mixture", "corpus")
        if self.decode == "sample" and self.number > MOST_SAMPLED:
            raise UserError(
                f"--number {self.number}: at most {MOST_SAMPLED:,} genes are drawn one by one; --decode rank gives more"
            )
        check_seed(self.seed)
        check_inputs(self, "hgnc", "background")
        if self.why and (self.format or Path(self.out or "").suffix) in ("gmt", ".gmt"):
            raise UserError("--why: GMT has no place for it; choose --format json, tsv or table")
        if self.out is not None:
            self._check_out(self.out)

    def _check_out(self, out: str) -> None:
        check_output_file(out)
        if Path(out).suffix.lower() in (".gz", ".xz"):
            raise UserError(f"--out {out}: nothing is compressed; leave out {Path(out).suffix}")
        inputs = find_gmt_files(self.gmt) if self.gmt else []
        inputs += [Path(path) for path in (self.background, self.hgnc) if path is not None]
        if self.genes == ("-",):
            inputs.append(Path("/dev/stdin"))
        # A terminal is both, and may be.
        if Path(out).is_file() and any(path.exists() and path.samefile(out) for path in inputs):
            raise UserError(f"--out {out}: is an input of this command; name another file")


def refuse_ignored(options: Any, goes_with: str, *names: str) -> None:
    """Raise `UserError` for the first of some options that is given, though it goes with what is not."""
    for name in names:
        if getattr(options, name) != getattr(type(options), name):
            raise UserError(f"--{name.replace('_', '-')} goes with {goes_with}")


def check_inputs(options: Any, *names: str) -> None:
    """Raise `UserError` for the first of some options that names no file that can be read."""
    for name in names:
        if getattr(options, name) is not None:
            check_input_file(getattr(options, name), f"--{name.replace('_', '-')}")


def check_seed(seed: int) -> None:
    """Raise `UserError` if a seed is not one that NumPy and JAX both take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must lie between 0 and {2**32 - 1:,}")
