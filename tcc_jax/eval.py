"""`python -m tcc_jax.eval`: complete unseen gene sets, and test how well that recovers what was hidden of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tcc_jax.files import atomic_folder, sha256
from tcc_jax.storage import as_path
from tcc_jax.terminal import UserError, log, parse_arguments, progress, run_command

if TYPE_CHECKING:
    import numpy as np

    from tcc_jax.completion.evaluation import Outcome
    from tcc_jax.completion.methods import Methods
    from tcc_jax.completion.model import Model
    from tcc_jax.completion.protocol import MaskedSet, Skipped
    from tcc_jax.completion.sets import KnownSet
    from tcc_jax.corpus.store import Corpus
    from tcc_jax.corpus.symbols import SymbolTable

_SKIPPED_SHOWN = 10
_SWEEP = (0.05, 0.1, 0.2, 0.5, 0.8)
_NOISE = (0.0, 0.2, 0.5)


@dataclass(frozen=True)
class Options:
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
    library_from: Literal["file", "description"] = "file"
    """A GMT set's library: the name of its file, or the set's description."""
    protocol: Literal["default", "tcc"] = "default"
    """default: a random share is visible, as many are drawn as hidden. tcc: the TCC experiment's masks and universe."""
    drawn_counts: str | None = None
    """With --protocol tcc: TSV of the recorded tables (name, hits, missed, extra, neither), sets in the GMT's order."""
    drawn: Literal["recorded", "hidden"] = "recorded"
    """With --protocol tcc: draw as many genes as the recorded hits + extra, or as many as are hidden."""
    visible: float = 0.2
    """Share of each set's genes that the model sees; at least one is visible and one hidden."""
    background: str | None = None
    """File of gene symbols: only these can be visible, hidden or drawn, and they are the universe."""
    baselines: Literal["standard", "all"] = "standard"
    """standard: random, popularity, set-kNN. all: EASE and a denoising auto-encoder too, each fitted once and kept."""
    mixture: bool = False
    """Also evaluate the model together with set-kNN and EASE, weighed on the validation split."""
    cache: str | None = None
    """Folder for what is fitted; $XDG_CACHE_HOME/tcc_jax or ~/.cache/tcc_jax unless set."""
    knn: tuple[int, float] | None = None
    """Nearest training sets that set-kNN counts, and the power of their similarity; tuned on the validation split
    unless set."""
    ease_genes: int = 13_000
    """Most frequent genes that EASE is fitted on; fitting takes about 12 bytes x genes^2 of memory."""
    ease_penalty: float = 20.0
    """EASE's lambda."""
    autoencoder_steps: int = 2000
    """Steps the auto-encoder is trained for, 128 sets each."""
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


def main() -> None:
    """Run the command."""
    run_command(_main)


def _main() -> None:
    options = parse_arguments(Options, prog="python -m tcc_jax.eval")
    _check(options)
    with atomic_folder(options.out, replace=options.overwrite) as folder:
        _evaluate(options, folder)
    log(f"report in {options.out}")


def _check(options: Options) -> None:
    for name in ("visible", "alpha"):
        if not 0 < getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must lie between 0 and 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must not be negative")
    for name in ("seeds", "limit", "ease_genes", "autoencoder_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if options.knn is not None and not (options.knn[0] >= 1 and options.knn[1] > 0):
        raise UserError(f"--knn {options.knn[0]} {options.knn[1]:g}: give at least 1 neighbour, and a power above 0")
    if options.ease_penalty <= 0:
        raise UserError(f"--ease-penalty {options.ease_penalty}: must be above 0")
    if options.protocol == "default":
        if options.drawn_counts is not None:
            raise UserError("--drawn-counts goes with --protocol tcc")
        return
    if options.drawn_counts is None or not options.gmt:
        raise UserError("--protocol tcc needs --gmt with the sets and --drawn-counts with their recorded tables")
    for flag in ("sweep", "noise", "background", "limit"):
        if getattr(options, flag):
            raise UserError(f"--{flag} goes with the default protocol")


def _evaluate(options: Options, folder: Path) -> None:
    from tcc_jax.completion.methods import build_methods
    from tcc_jax.completion.model import load
    from tcc_jax.completion.protocol import genes_of, rarest_third
    from tcc_jax.completion.report import Report, can_plot, write_report
    from tcc_jax.completion.sets import best_training_jaccard, read_background
    from tcc_jax.corpus.symbols import SymbolTable

    model = load(options.checkpoint)
    model.seed = options.seed
    vocabulary = model.vocabulary
    table = SymbolTable.read(options.hgnc)
    corpus, missing = _open_corpus(options, model)
    sets, source, problems = _read_sets(options, model, corpus, table)
    candidates_V = genes_of(vocabulary.size)
    if options.background is not None:
        candidates_V = read_background(options.background, table, vocabulary)
    trials, skipped = _mask(options, sets, candidates_V)
    if not trials[0]:
        where = ", ".join(options.gmt) or f"the {options.split} split of {corpus and corpus.path}"
        _list_skipped(skipped, problems)
        raise UserError(f"{where}: no set has two genes in the model's vocabulary")
    methods = build_methods(model, corpus, missing, options)
    rare_V = rarest_third(vocabulary.counts, [sets[one.place] for one in trials[0]])
    outcomes = _run(methods, trials, candidates_V, rare_V, "completing with")
    curves: dict[str, list[tuple[float, list[Outcome]]]] = {}
    for name, shares in (("sweep", _SWEEP), ("noise", _NOISE)):
        if getattr(options, name):
            curves[name] = []
            for share in shares:
                masks = _mask_once(options, sets, candidates_V, options.seed, **{name: share})[0]
                curves[name].append((share, _run(methods, [masks], candidates_V, None, f"{name} {share:g}:")))
    jaccard = None
    if corpus is not None:
        evaluated = [sets[one.place] for one in trials[0]]
        with progress("leak report", len(evaluated)) as advance:
            jaccard = best_training_jaccard(corpus, evaluated, advance)
    cut = sum(len(one.visible) > model.prompt_limit for one in trials[0])
    notes = [*methods.notes, *_notes(options, trials[0], int(candidates_V.sum()), cut, model.prompt_limit)]
    if corpus is None:
        notes.append(f"{', '.join(methods.left_out)} and the leak report are left out: {missing}")
    details = {
        "options": asdict(options),
        "checkpoint": {
            "path": options.checkpoint, "step": model.checkpoint.step, "vocabulary_hash": vocabulary.hash
        },
        "corpus": None if corpus is None else {"path": str(corpus.path), "hash": corpus.hash},
        "versions": _versions(),
        "config": model.checkpoint.config.to_dict(),
        "source": source,
        "sets_read": len(sets),
        "sets_evaluated": len(trials[0]),
        "genes_outside_vocabulary": sum(one.outside for one in trials[0]),
        "genes_that_can_be_drawn": int(candidates_V.sum()),
        "rare_genes": int(rare_V.sum()),
        "prompts_cut": cut,
        "skipped": [{"name": known.name, "library": known.library, "reason": reason} for known, reason in skipped],
    }  # fmt: skip
    report = Report(
        outcomes, trials, options.alpha, options.seed, jaccard, methods.left_out, curves, notes, details
    )  # fmt: skip
    write_report(folder, report, vocabulary, f"completed by tcc_jax step {model.checkpoint.step}")
    print(report.text())
    if not can_plot():
        log('no plots: matplotlib is not installed (pip install "tcc-jax[plots]")')
    _list_skipped(skipped, problems)


def _run(
    methods: Methods,
    trials: Sequence[Sequence[MaskedSet]],
    candidates_V: np.ndarray,
    rare_V: np.ndarray | None,
    doing: str,
) -> list[Outcome]:
    from tcc_jax.completion.evaluation import run_method

    outcomes = []
    for name, scorer in methods.scorers.items():
        with progress(f"{doing} {name}", len(trials) * len(trials[0])) as advance:
            outcomes.append(run_method(name, scorer, trials, candidates_V, rare_V, name == "model", advance))
    return outcomes


def _mask(
    options: Options, sets: list[KnownSet], candidates_V: np.ndarray
) -> tuple[list[list[MaskedSet]], list[Skipped]]:
    from tcc_jax.completion.protocol import mask_last_genes, read_drawn_counts

    if options.protocol == "tcc":
        assert options.drawn_counts is not None
        counts = read_drawn_counts(options.drawn_counts, sets)
        return [mask_last_genes(sets, counts, options.drawn == "hidden", int(candidates_V.sum()))], []
    masks = [_mask_once(options, sets, candidates_V, options.seed + place) for place in range(options.seeds)]
    return [masked for masked, _ in masks], masks[0][1]


def _mask_once(
    options: Options, sets: list[KnownSet], candidates_V: np.ndarray, seed: int, sweep: float = 0.0, noise: float = 0.0
) -> tuple[list[MaskedSet], list[Skipped]]:
    from tcc_jax.completion.protocol import mask_sets

    return mask_sets(sets, candidates_V, sweep or options.visible, seed, noise)


def _notes(options: Options, sets: list[MaskedSet], candidates: int, cut: int, limit: int) -> list[str]:
    notes = []
    outside = sum(one.outside for one in sets)
    if options.protocol == "tcc":
        nothing = sum(not one.drawn_count for one in sets)
        missed = sum(one.hidden_count - len(one.hidden) for one in sets)
        notes.append(
            f"protocol tcc: the recorded universe of {sets[0].universe:,} is padded, only {candidates:,} genes can be "
            "drawn: even random genes come out significant in some sets, so read the baselines beside the model"
        )
        notes.append(f"{missed:,} hidden genes are outside the vocabulary or written twice; they count as missed")
        if nothing:
            notes.append(f"{nothing:,} sets, for which the original drew nothing, have p = 1 and stay")
    elif outside:
        notes.append(f"{outside:,} genes outside the vocabulary are neither visible nor hidden")
    if options.background is not None:
        notes.append(f"the universe is the {candidates:,} genes of the background that the model knows")
    if cut:
        notes.append(f"{cut:,} sets show more than {limit:,} genes: the model sees a random subset of these")
    return notes


def _list_skipped(skipped: list[Skipped], problems: list[str]) -> None:
    for line in problems:
        log(line)
    for known, reason in skipped[:_SKIPPED_SHOWN]:
        log(f"skipped {known.library}/{known.name}: {reason}")
    if len(skipped) > _SKIPPED_SHOWN:
        log(f"skipped {len(skipped):,} sets in all; report.json lists them")


def _open_corpus(options: Options, model: Model) -> tuple[Corpus | None, str]:
    from tcc_jax.corpus.store import open_corpus

    path = options.corpus or model.checkpoint.config.data.corpus
    required = options.corpus is not None or not options.gmt
    if not required and not as_path(path).exists():
        return None, f"the corpus {path} is not there; name it with --corpus"
    corpus = open_corpus(path)
    ours, theirs = model.vocabulary.hash, corpus.vocabulary.hash
    if ours == theirs:
        return corpus, ""
    other = (
        f"the corpus {path} has another vocabulary ({theirs[:12]}) than checkpoint {options.checkpoint} ({ours[:12]})"
    )
    if required:
        raise UserError(f"{other}; evaluate with the corpus it was trained on, or with --gmt")
    return None, other


def _read_sets(
    options: Options, model: Model, corpus: Corpus | None, table: SymbolTable
) -> tuple[list[KnownSet], dict[str, Any], list[str]]:
    from tcc_jax.completion.sets import choose_sets, sets_from_corpus, sets_from_gmt
    from tcc_jax.corpus.gmt import find_gmt_files

    if not options.gmt:
        assert corpus is not None
        sets = choose_sets(sets_from_corpus(corpus, options.split), options.limit, options.seed)
        return sets, {"corpus": str(corpus.path), "split": options.split}, []
    sets, symbols, problems = sets_from_gmt(options.gmt, table, model.vocabulary, options.library_from)
    for line in symbols.lines():
        log(line)
    files = {str(path): sha256(path) for path in find_gmt_files(options.gmt)}
    source = {"gmt": files, "problems": dict(problems.counts), "symbols": symbols.to_dict()}
    return choose_sets(sets, options.limit, options.seed), source, problems.lines()


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    import jax

    import tcc_jax

    packages = {name: version(name) for name in ("jax", "flax", "numpy", "scipy")}
    device = jax.devices()[0].device_kind
    return {"tcc_jax": tcc_jax.__version__, "python": platform.python_version(), "device": device, **packages}


if __name__ == "__main__":
    main()
