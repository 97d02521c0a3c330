"""What `eval` does: mask the sets, complete them with the model and with each baseline, report how well that went."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tcc_jax.baselines import Scorer
from tcc_jax.baselines.autoencoder import Autoencoder
from tcc_jax.baselines.ease import Ease
from tcc_jax.baselines.index import TrainingIndex
from tcc_jax.baselines.neighbours import SetNeighbours
from tcc_jax.baselines.popularity import popularity, random_genes
from tcc_jax.baselines.relevance import RelevanceModel
from tcc_jax.completion.masks import MaskedSet, Skipped, mask_sets
from tcc_jax.completion.mixture import tuned_mixture
from tcc_jax.completion.model import Model, load
from tcc_jax.completion.overlap import benjamini_hochberg, log_fisher_greater
from tcc_jax.completion.sets import (
    GeneFinder,
    KnownSet,
    choose_sets,
    read_background,
    read_sets,
    sets_from_corpus,
    summarise_symbols,
)
from tcc_jax.completion.tuning import tuned_neighbours
from tcc_jax.corpus.gmt import Problems, find_gmt_files
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import genes_of
from tcc_jax.evaluation.metrics import Outcome, run_method
from tcc_jax.evaluation.options import EvaluateOptions
from tcc_jax.evaluation.plots import can_plot
from tcc_jax.evaluation.protocol import DrawnCounts, mask_last_genes, rarest_third, read_drawn_counts
from tcc_jax.evaluation.report import Report, write_report
from tcc_jax.files import cache_folder, sha256
from tcc_jax.runs.checkpoint import packages
from tcc_jax.terminal import UserError, log, log_lines, progress

_SKIPPED_SHOWN = 10
_SWEEP = (0.05, 0.1, 0.2, 0.5, 0.8)
_NOISE = (0.0, 0.2, 0.5)


@dataclass
class _Methods:
    """Scorers by name, the model first; the methods that are left out, and what to know of the others."""

    scorers: dict[str, Scorer]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        log(text)


def evaluate(options: EvaluateOptions, folder: Path) -> Report:
    """Evaluate a model and write the report into an existing folder.

    Raises:
        UserError: an input that can't be used, no set that can be evaluated, or a method that does not fit in memory.
    """
    # Said now, not after the hours of an evaluation.
    with_plots = can_plot()
    model = load(options.checkpoint)
    model.seed = options.seed
    vocabulary = model.vocabulary
    finder = GeneFinder(SymbolTable.read(options.hgnc, options.case_insensitive), vocabulary)
    corpus, missing = model.corpus(options.corpus, required=options.corpus is not None or not options.gmt)
    sets, empty, source, problems = _read(options, finder, corpus)
    candidates_V = genes_of(vocabulary.size)
    if options.background is not None:
        candidates_V = read_background(options.background, finder)
    trials, skipped, recorded = _mask(options, sets, candidates_V)
    skipped += [(known, "no gene") for known in empty]
    unread = [*problems.lines(), *_skipped_lines(skipped)]
    if not trials[0]:
        where = ", ".join(options.gmt) or f"the {options.split} split of {corpus and corpus.path}"
        log_lines(unread)
        raise UserError(f"{where}: no set has two genes in the model's vocabulary")
    index = None if corpus is None else TrainingIndex(corpus)
    methods = _methods(options, model, index, missing)
    rare_V = rarest_third(vocabulary.counts, [sets[one.place] for one in trials[0]])
    outcomes = _run(methods, trials, candidates_V, rare_V, "completing with")
    curves: dict[str, list[tuple[float, list[Outcome]]]] = {}
    for name, shares in (("sweep", _SWEEP), ("noise", _NOISE)):
        for share in shares if getattr(options, name) else ():
            visible, false = (share, 0.0) if name == "sweep" else (options.visible, share)
            if (visible, false) == (options.visible, 0.0):
                found = [one.first_seed() for one in outcomes]
            else:
                masks, _ = mask_sets(sets, candidates_V, visible, options.seed, false)
                found = _run(methods, [masks], candidates_V, None, f"{name} {share:g}:")
            curves.setdefault(name, []).append((share, found))
    jaccard = None
    if index is not None:
        with progress("leak report", len(trials[0])) as advance:
            jaccard = index.best_jaccard([sets[one.place].ids for one in trials[0]], advance)
    cut = sum(len(one.visible) > model.prompt_limit for one in trials[0])
    notes = [*_notes(options, trials[0], int(candidates_V.sum()), cut, model.prompt_limit), *recorded, *methods.notes]
    if rare_V.any():
        held, share = vocabulary.counts[rare_V].max(), int(rare_V.sum()) / len(vocabulary.ids)
        notes.append(f"rare are genes held by at most {held:,} training sets ({share:.0%} of the vocabulary)")
    if corpus is None:
        notes.append(f"{', '.join(methods.left_out)} and the leak report are left out: {missing}")
    checkpoint = model.checkpoint
    details = {
        "options": asdict(options),
        "checkpoint": {"path": options.checkpoint, "step": checkpoint.step, "vocabulary_hash": vocabulary.hash},
        "corpus": None if corpus is None else {"path": str(corpus.path), "hash": corpus.hash},
        "versions": _versions(),
        "config": checkpoint.config.to_dict(),
        "source": source,
        "sets_read": len(sets),
        "sets_evaluated": len(trials[0]),
        "genes_outside_vocabulary": sum(one.outside for one in trials[0]),
        "genes_outside_background": sum(one.outside_background for one in trials[0]),
        "genes_that_can_be_drawn": int(candidates_V.sum()),
        "rare_genes": int(rare_V.sum()),
        "prompts_cut": cut,
        "skipped": [{"name": known.name, "library": known.library, "reason": reason} for known, reason in skipped],
    }
    report = Report(
        outcomes, trials, options.alpha, options.seed, jaccard, methods.left_out, curves, notes, unread, details
    )
    write_report(folder, report, vocabulary, f"completed by tcc_jax step {checkpoint.step}", with_plots)
    return report


def _read(
    options: EvaluateOptions, finder: GeneFinder, corpus: Corpus | None
) -> tuple[list[KnownSet], list[KnownSet], dict[str, Any], Problems]:
    """Return the sets, those with a name and no gene, which have no place among them, and what to know of the input."""
    problems, empty = Problems(), []
    if options.gmt:
        found = list(read_sets(options.gmt, finder, problems, options.library_from, keep_empty=True))
        sets, empty = [one for one in found if one.symbols], [one for one in found if not one.symbols]
        symbols, lines = summarise_symbols(sets)
        log_lines(lines)
        files = {str(path): sha256(path) for path in find_gmt_files(options.gmt)}
        source: dict[str, Any] = {"gmt": files, "problems": dict(problems.counts), "symbols": symbols}
    else:
        assert corpus is not None
        sets = sets_from_corpus(corpus, options.split)
        if not sets:
            raise UserError(f"the {options.split} split of {corpus.path} is empty; choose another, or give --gmt")
        source = {"corpus": str(corpus.path), "split": options.split}
    return choose_sets(sets, options.limit, options.seed), empty, source, problems


def _mask(
    options: EvaluateOptions, sets: list[KnownSet], candidates_V: np.ndarray
) -> tuple[list[list[MaskedSet]], list[Skipped], list[str]]:
    if options.protocol == "tcc":
        assert options.drawn_counts is not None
        counts = read_drawn_counts(options.drawn_counts, sets)
        masks = mask_last_genes(sets, counts, options.drawn == "hidden", int(candidates_V.sum()))
        return [masks], [], [_recorded(counts, options.alpha)]
    found = [mask_sets(sets, candidates_V, options.visible, options.seed + trial) for trial in range(options.seeds)]
    return [masked for masked, _ in found], found[0][1], []


def _recorded(counts: list[DrawnCounts], alpha: float) -> str:
    hits, drawn, hidden, universe = (np.array(column, np.int32) for column in list(zip(*counts, strict=True))[:4])
    adjusted = benjamini_hochberg(log_fisher_greater(hits, drawn, hidden, universe))
    significant = int((np.asarray(adjusted) <= math.log(alpha)).sum())
    recall = float(np.mean(hits / hidden))
    return f"the recorded tables: {significant:,} of {len(counts):,} sets significant at {alpha:g}, recall {recall:.3f}"


def _methods(options: EvaluateOptions, model: Model, index: TrainingIndex | None, missing: str) -> _Methods:
    found = _Methods(
        {
            "model": model.score,
            "popularity": popularity(model.vocabulary),
            "random": random_genes(model.vocabulary, options.seed),
        }
    )
    if index is None:
        names = ("set-kNN", "relevance", "EASE", "auto-encoder", *(("mixture",) if options.mixture else ()))
        found.left_out = dict.fromkeys(names, missing)
        return found
    corpus, folder = index.corpus, Path(options.cache or cache_folder())
    neighbours = tuned_neighbours(index, folder) if options.knn is None else SetNeighbours(index, *options.knn)
    found.scorers["set-kNN"] = neighbours
    found.note(neighbours.describe())
    relevance = found.scorers["relevance"] = RelevanceModel(index)
    found.note(relevance.describe())
    if options.baselines == "all":
        ease = found.scorers["EASE"] = Ease(corpus, folder, options.ease_genes, options.ease_penalty)
        memory = ", as many as memory has room for" if ease.limited else ""
        found.note(
            f"EASE: fitted on the {ease.num_genes:,} most frequent of {len(corpus.vocabulary.ids):,} genes{memory}, "
            f"rows scaled by 1/sqrt(length), lambda {ease.penalty:g}; other genes score below these, by popularity"
        )
        scorer = found.scorers["auto-encoder"] = Autoencoder(corpus, folder, options.autoencoder_steps)
        found.note(
            f"auto-encoder: the configuration of GSFM (multi-hot, 512-256-256, BCE), started from principal "
            f"components, {scorer.steps:,} steps ({scorer.passes:.2g} passes over the training sets; GSFM made 50)"
        )
    else:
        found.left_out = dict.fromkeys(("EASE", "auto-encoder"), "run with --baselines all")
    if options.mixture:
        mixture = found.scorers["mixture"] = tuned_mixture(model, relevance, folder)
        found.note(mixture.describe())
    return found


def _run(
    methods: _Methods,
    trials: Sequence[Sequence[MaskedSet]],
    candidates_V: np.ndarray,
    rare_V: np.ndarray | None,
    doing: str,
) -> list[Outcome]:
    outcomes = []
    for name, scorer in methods.scorers.items():
        with progress(f"{doing} {name}", len(trials) * len(trials[0])) as advance:
            is_model = name in ("model", "mixture")
            outcomes.append(run_method(name, scorer, trials, candidates_V, rare_V, is_model, advance))
    return outcomes


def _notes(options: EvaluateOptions, sets: list[MaskedSet], candidates: int, cut: int, limit: int) -> list[str]:
    notes = []
    outside = sum(one.outside for one in sets)
    if options.protocol == "default":
        notes.append(
            f"a random {options.visible:.0%} of the genes of each set are visible, at least one, and as many are drawn "
            f"as are hidden; the universe is the {candidates:,} genes that can be drawn, less the visible ones"
        )
    else:
        nothing = sum(not one.drawn_count for one in sets)
        missed = sum(one.hidden_count - len(one.hidden) for one in sets)
        universe = max(one.universe for one in sets)
        note = f"protocol tcc: the recorded universe is {universe:,}, and {candidates:,} genes can be drawn"
        if universe > candidates:
            note += "; such padding lowers every p, so read the baselines beside the model"
        notes.append(note)
        notes.append(f"{missed:,} hidden genes are outside the vocabulary or written twice; they count as missed")
        if nothing:
            notes.append(f"{nothing:,} sets, for which the original drew nothing, have p = 1 and stay")
    if options.protocol == "default" and outside:
        notes.append(f"{outside:,} genes outside the vocabulary are neither visible nor hidden")
    if options.background is not None:
        others = sum(one.outside_background for one in sets)
        notes.append(
            f"the model knows {candidates:,} genes of the background; {others:,} genes of the vocabulary outside it are"
            " neither visible nor hidden"
        )
    if cut:
        notes.append(f"{cut:,} sets show more than {limit:,} genes: the model sees a random subset of these")
    return notes


def _skipped_lines(skipped: list[Skipped]) -> list[str]:
    lines = [f"skipped {known.library}/{known.name}: {reason}" for known, reason in skipped[:_SKIPPED_SHOWN]]
    if len(skipped) > _SKIPPED_SHOWN:
        lines.append(f"skipped {len(skipped):,} sets in all; report.json lists them")
    return lines


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "device": jax.devices()[0].device_kind, **packages()}
