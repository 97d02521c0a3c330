"""`python -m tcc_jax.eval`: complete unseen gene sets, and test how well that recovers what was hidden of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tcc_jax.files import atomic_folder, sha256
from tcc_jax.terminal import UserError, log, parse_arguments, progress, run_command

if TYPE_CHECKING:
    from tcc_jax.completion.model import Model
    from tcc_jax.completion.sets import KnownSet
    from tcc_jax.corpus.store import Corpus

_SKIPPED_SHOWN = 5


@dataclass(frozen=True)
class Options:
    """Hide most genes of each set, complete it from the rest, and test the overlap, beside baselines."""

    checkpoint: str
    """A run directory (its latest step), or one step inside it (RUN/checkpoints/STEP)."""
    out: str
    """Folder to write: report.json, per_set.tsv, completions.gmt and, with matplotlib, significance.png and .svg."""
    gmt: tuple[str, ...] = ()
    """GMT files, or folders of them; without any, a split of the corpus is evaluated."""
    corpus: str | None = None
    """The prepared corpus; the one the checkpoint was trained on unless set."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the corpus to evaluate when no GMT file is given."""
    hgnc: str | None = None
    """HGNC table that maps the symbols of GMT files; the embedded one unless set."""
    visible: float = 0.2
    """Share of each set's genes that the model sees; at least one is visible and one hidden."""
    seed: int = 0
    """Chooses the visible genes, the random baseline's genes and the bootstrap's resamples."""
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
    if not 0 < options.visible < 1:
        raise UserError(f"--visible {options.visible}: must lie between 0 and 1")
    if not 0 < options.alpha < 1:
        raise UserError(f"--alpha {options.alpha}: must lie between 0 and 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must not be negative")


def _evaluate(options: Options, folder: Path) -> None:
    from tcc_jax.completion import baselines
    from tcc_jax.completion.model import load
    from tcc_jax.completion.protocol import mask_sets, run_method
    from tcc_jax.completion.report import Report, can_plot, write_report
    from tcc_jax.corpus.vocabulary import NUM_SPECIAL

    model = load(options.checkpoint)
    model.seed = options.seed
    vocabulary, step = model.vocabulary, model.checkpoint.step
    corpus, missing = _open_corpus(options, model)
    sets, source = _read_sets(options, model, corpus)
    masked, skipped = mask_sets(sets, options.visible, options.seed)
    for known, reason in skipped[:_SKIPPED_SHOWN]:
        log(f"skipped {known.library}/{known.name}: {reason}")
    if len(skipped) > _SKIPPED_SHOWN:
        log(f"skipped {len(skipped):,} sets in all; report.json lists them")
    if not masked:
        where = ", ".join(options.gmt) or f"the {options.split} split of {corpus and corpus.path}"
        raise UserError(f"{where}: no set has two genes in the model's vocabulary")
    cut = sum(len(one.visible) > model.prompt_limit for one in masked)
    if cut:
        log(f"{cut:,} sets show more than {model.prompt_limit:,} genes: the model sees a random subset of these")

    methods = {
        "model": model.score,
        "popularity": baselines.popularity(vocabulary),
        "random": baselines.random_genes(vocabulary, options.seed),
    }
    if corpus is not None:
        methods["set-kNN"] = baselines.SetNeighbours(corpus)
    else:
        log(f"set-kNN is left out: {missing}")
    outcomes = []
    for name, scorer in methods.items():
        with progress(f"completing with {name}", len(masked)) as advance:
            outcomes.append(run_method(name, scorer, masked, vocabulary.size - NUM_SPECIAL, advance))
    details = {
        "options": asdict(options),
        "checkpoint": {"path": options.checkpoint, "step": step, "vocabulary_hash": vocabulary.hash},
        "corpus": None if corpus is None else {"path": str(corpus.path), "hash": corpus.hash},
        "left_out": {} if corpus is not None else {"set-kNN": missing},
        "versions": _versions(),
        "config": model.checkpoint.config.to_dict(),
        "source": source,
        "sets_read": len(sets),
        "sets_evaluated": len(masked),
        "genes_outside_vocabulary": sum(one.outside for one in masked),
        "prompts_cut": cut,
        "skipped": [{"name": known.name, "library": known.library, "reason": reason} for known, reason in skipped],
    }
    report = Report(outcomes, masked, options.alpha, options.seed, details)
    write_report(folder, report, vocabulary, f"completed by tcc_jax step {step}")
    if not can_plot():
        log('no plots: matplotlib is not installed (pip install "tcc-jax[plots]")')
    print(report.table())


def _open_corpus(options: Options, model: Model) -> tuple[Corpus | None, str]:
    from tcc_jax.corpus.store import open_corpus

    path = options.corpus or model.checkpoint.config.data.corpus
    required = options.corpus is not None or not options.gmt
    if not required and not Path(path).exists():
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


def _read_sets(options: Options, model: Model, corpus: Corpus | None) -> tuple[list[KnownSet], dict[str, Any]]:
    from tcc_jax.completion.sets import sets_from_corpus, sets_from_gmt
    from tcc_jax.corpus.gmt import find_gmt_files
    from tcc_jax.corpus.symbols import SymbolTable

    if not options.gmt:
        assert corpus is not None
        return sets_from_corpus(corpus, options.split), {"corpus": str(corpus.path), "split": options.split}
    sets, symbols, problems = sets_from_gmt(options.gmt, SymbolTable.read(options.hgnc), model.vocabulary)
    for line in (*problems.lines(), *symbols.lines()):
        log(line)
    files = {str(path): sha256(path) for path in find_gmt_files(options.gmt)}
    return sets, {"gmt": files, "problems": dict(problems.counts), "symbols": symbols.to_dict()}


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
