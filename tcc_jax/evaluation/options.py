"""The options of `eval`. Imported before jax is: --help and mistakes answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tcc_jax.completion.options import check_inputs, check_seed, refuse_ignored
from tcc_jax.terminal import UserError

# Every folder that `eval` wrote holds it.
REPORT_FILE = "report.json"
MOST_SEEDS = 1000


@dataclass(frozen=True)
class EvaluateOptions:
    """Hide most genes of each set, complete it from the rest, and test the overlap, beside baselines."""

    checkpoint: str
    """A run directory (its latest step), one step inside it (RUN/checkpoints/STEP), or an export."""
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
    """Most frequent genes that EASE is fitted on, if memory has room for 12 bytes x genes^2; else as many as it has."""
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
        check_seed(self.seed)
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
            refuse_ignored(self, "the sets of a corpus; leave out --gmt", "split")
        else:
            refuse_ignored(self, "--gmt", "library_from")
        if not self.gmt and self.background is None:
            refuse_ignored(self, "--gmt or --background", "case_insensitive")
        if self.baselines != "all":
            refuse_ignored(self, "--baselines all", "ease_genes", "ease_penalty", "autoencoder_steps")
        if self.protocol == "default":
            refuse_ignored(self, "--protocol tcc", "drawn_counts", "drawn")
        else:
            refuse_ignored(self, "the default protocol", "sweep", "noise", "background", "limit", "visible", "seeds")
            if self.drawn_counts is None or not self.gmt:
                raise UserError(
                    "--protocol tcc needs --gmt with the sets and --drawn-counts with their recorded tables"
                )
        check_inputs(self, "hgnc", "background", "drawn_counts")
