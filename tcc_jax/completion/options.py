"""The options of `eval` and `complete`. Imported before jax is: --help and mistakes answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tcc_jax.corpus.gmt import find_gmt_files
from tcc_jax.files import check_input_file, check_output_file
from tcc_jax.terminal import UserError

Format = Literal["table", "tsv", "json", "gmt"]
# Every folder that `eval` wrote holds it.
REPORT_FILE = "report.json"
# One program draws them all, and nothing stops it in between: minutes for so many.
MOST_SAMPLED = 4096
MOST_SEEDS = 1000


@dataclass(frozen=True)
class EvaluateOptions:
    """Hide most genes of each set, complete it from the rest, and test the overlap, beside baselines."""

    checkpoint: str
    """A run directory (its latest step), or one step inside it (RUN/checkpoints/STEP)."""
    out: str
    """Folder to write: report.json, report.html, per_set.tsv, completions.gmt and, with matplotlib, plots."""
    gmt: tuple[str, ...] = ()
    """GMT files, or folders of them; without any, a split of the corpus is evaluated."""
    corpus: str | None = None
    """The prepared corpus; the one the checkpoint was trained on unless set."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the corpus to evaluate when no GMT file is given."""
    limit: int | None = None
    """Evaluate at most that many sets, chosen by the seed."""
    hgnc: str | None = None
    """HGNC table that maps the symbols of GMT files; the embedded one unless set."""
    case_insensitive: bool = False
    """Also match symbols of GMT files and the background that differ by case, such as the mouse's Trp53, as prepare
    does with this option."""
    library_from: Literal["file", "description"] = "file"
    """A GMT set's library: the name of its file, or the set's description."""
    protocol: Literal["default", "tcc"] = "default"
    """default: a random share is visible, as many are drawn as hidden. tcc: the TCC experiment's masks and universe."""
    drawn_counts: str | None = None
    """With --protocol tcc: TSV of the recorded tables (name, hits, missed, extra, neither), sets in the GMT's order."""
    drawn: Literal["recorded", "hidden"] = "recorded"
    """With --protocol tcc: draw as many genes as the recorded hits + extra, or as many as are hidden."""
    visible: float = 0.2
    """Share of each set's genes that the model sees, at least one visible and one hidden (default protocol)."""
    background: str | None = None
    """File of gene symbols: only these can be visible, hidden or drawn, and they are the universe."""
    baselines: Literal["standard", "all"] = "standard"
    """standard: random, popularity, set-kNN and the relevance model. all: EASE and a denoising auto-encoder too, each
    fitted once and kept."""
    mixture: bool = False
    """Also evaluate the model together with the relevance model, weighed on the validation split as for sets of new
    libraries."""
    cache: str | None = None
    """Folder for what is fitted; $XDG_CACHE_HOME/tcc_jax or ~/.cache/tcc_jax unless set."""
    knn: tuple[int, float] | None = None
    """Nearest training sets that set-kNN counts, and the power of their similarity; tuned on the validation split
    unless set."""
    ease_genes: int = 13_000
    """Most frequent genes that EASE is fitted on; fitting takes about 12 bytes x genes^2 of memory."""
    ease_penalty: float = 20.0
    """EASE's lambda."""
    autoencoder_steps: int | None = None
    """Steps the auto-encoder is trained for, 512 sets each; 1,200, but at most 50 passes over the sets, unless set."""
    sweep: bool = False
    """Also show 5, 10, 20, 50 and 80 % of each set (default protocol, first seed)."""
    noise: bool = False
    """Also mix false genes into the prompt: 0, 20 and 50 % of it (default protocol, first seed)."""
    seeds: int = 3
    """Number of random masks of every set (default protocol)."""
    seed: int = 0
    """The first of the seeds: of the visible genes, the random baseline's genes and the bootstrap's resamples."""
    alpha: float = 0.05
    """Level of significance after Benjamini-Hochberg."""
    overwrite: bool = False
    """Replace the output folder if it is there."""

    def check(self) -> None:
        """Raise `UserError` naming the first value that can't be used, alone or beside the others."""
        for name in ("visible", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0 and under 1")
        _check_seed(self.seed)
        for name in ("seeds", "limit", "ease_genes", "autoencoder_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.seeds > MOST_SEEDS:
            raise UserError(f"--seeds {self.seeds}: at most {MOST_SEEDS:,}, since the masks of all are held at once")
        if self.knn is not None and not (self.knn[0] >= 1 and 0 < self.knn[1] < float("inf")):
            raise UserError(f"--knn {self.knn[0]} {self.knn[1]:g}: give at least 1 neighbour, and a power above 0")
        if not 0 < self.ease_penalty < 1e38:
            raise UserError(f"--ease-penalty {self.ease_penalty}: must be a number above 0 and under 1e38")
        if self.gmt:
            _refuse_ignored(self, "the sets of a corpus; leave out --gmt", "split")
        else:
            _refuse_ignored(self, "--gmt", "library_from")
        if not self.gmt and self.background is None:
            _refuse_ignored(self, "--gmt or --background", "case_insensitive")
        if self.baselines != "all":
            _refuse_ignored(self, "--baselines all", "ease_genes", "ease_penalty", "autoencoder_steps")
        if self.protocol == "default":
            _refuse_ignored(self, "--protocol tcc", "drawn_counts", "drawn")
        else:
            _refuse_ignored(self, "the default protocol", "sweep", "noise", "background", "limit", "visible", "seeds")
            if self.drawn_counts is None or not self.gmt:
                raise UserError(
                    "--protocol tcc needs --gmt with the sets and --drawn-counts with their recorded tables"
                )
        _check_inputs(self, "hgnc", "background", "drawn_counts")


@dataclass(frozen=True)
class CompleteOptions:
    """Propose the genes that belong with the given ones.

    Genes on the command line are one set; so are those on standard input (`-`), one a line, unless its first line holds
    a tab: then it is GMT. Notes on symbols and sets that could not be completed go to standard error.
    """

    genes: tyro.conf.Positional[tuple[str, ...]]
    """Gene symbols, such as TP53 MDM2 CDKN1A, or - for standard input; outdated ones are mapped to the approved."""
    checkpoint: str
    """A run directory (its latest step), or one step inside it (RUN/checkpoints/STEP)."""
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
        _refuse_ignored(self, f"--decode {other}", *ignored)
        if not self.why and not self.mixture:
            _refuse_ignored(self, "--why or --mixture", "corpus")
        if self.decode == "sample" and self.number > MOST_SAMPLED:
            raise UserError(
                f"--number {self.number}: at most {MOST_SAMPLED:,} genes are drawn one by one; --decode rank gives more"
            )
        _check_seed(self.seed)
        _check_inputs(self, "hgnc", "background")
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


def _refuse_ignored(options: EvaluateOptions | CompleteOptions, goes_with: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) != getattr(type(options), name):
            raise UserError(f"--{name.replace('_', '-')} goes with {goes_with}")


def _check_inputs(options: EvaluateOptions | CompleteOptions, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            check_input_file(getattr(options, name), f"--{name.replace('_', '-')}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must lie between 0 and {2**32 - 1:,}")
