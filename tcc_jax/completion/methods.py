"""What an evaluation compares: the model, and the baselines that can be had, with the reasons for those that can't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tcc_jax.completion import baselines
from tcc_jax.completion.cache import default_folder
from tcc_jax.completion.model import Model
from tcc_jax.completion.ranker import Scorer
from tcc_jax.corpus.store import Corpus
from tcc_jax.terminal import log


class Settings(Protocol):
    """The options of `eval` that decide about baselines."""

    @property
    def seed(self) -> int: ...
    @property
    def baselines(self) -> str: ...
    @property
    def cache(self) -> str | None: ...
    @property
    def ease_genes(self) -> int: ...
    @property
    def ease_penalty(self) -> float: ...
    @property
    def autoencoder_steps(self) -> int: ...


@dataclass
class Methods:
    """Scorers by name, the model first; the baselines that are left out, and what to know of the others."""

    scorers: dict[str, Scorer]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build_methods(model: Model, corpus: Corpus | None, missing: str, settings: Settings) -> Methods:
    """Fit, or read from the cache, every baseline that was asked for.

    Args:
        model: what is evaluated.
        corpus: the prepared corpus of its vocabulary; without it set-kNN, EASE and the auto-encoder are left out.
        missing: why there is no corpus.
        settings: which baselines, and how they are fitted.

    Raises:
        UserError: a baseline does not fit in memory.
    """
    found = Methods(
        {
            "model": model.score,
            "popularity": baselines.popularity(model.vocabulary),
            "random": baselines.random_genes(model.vocabulary, settings.seed),
        }
    )
    fitted: dict[str, Callable[[Corpus, Settings], tuple[Scorer, str]]] = {
        "set-kNN": _neighbours, "EASE": _ease, "auto-encoder": _autoencoder
    }  # fmt: skip
    for name, fit in fitted.items():
        if corpus is None:
            found.left_out[name] = missing
        elif settings.baselines != "all" and name != "set-kNN":
            found.left_out[name] = "run with --baselines all"
        else:
            found.scorers[name], note = fit(corpus, settings)
            found.notes.append(note)
            log(note)
    return found


def _neighbours(corpus: Corpus, settings: Settings) -> tuple[Scorer, str]:
    scorer = baselines.tuned_neighbours(corpus, settings.cache or default_folder())
    return scorer, (
        f"set-kNN: nearest {scorer.neighbours:,} training sets, idf cosine to the power {scorer.power:g}, "
        "tuned on the validation split"
    )


def _ease(corpus: Corpus, settings: Settings) -> tuple[Scorer, str]:
    from tcc_jax.completion.ease import Ease

    scorer = Ease(corpus, settings.cache or default_folder(), settings.ease_genes, settings.ease_penalty)
    num_genes = len(corpus.vocabulary.ids)
    return scorer, (
        f"EASE: fitted on the {scorer.num_genes:,} most frequent of {num_genes:,} genes, rows scaled by "
        f"1/sqrt(length), lambda {settings.ease_penalty:g}; other genes score below these, by popularity"
    )


def _autoencoder(corpus: Corpus, settings: Settings) -> tuple[Scorer, str]:
    from tcc_jax.completion.autoencoder import BATCH, Autoencoder

    scorer = Autoencoder(corpus, settings.cache or default_folder(), settings.autoencoder_steps, settings.seed)
    epochs = settings.autoencoder_steps * BATCH / max(1, len(corpus.indices("train")))
    return scorer, (
        f"auto-encoder: the configuration of GSFM (multi-hot, 512-256-256, BCE), {settings.autoencoder_steps:,} steps "
        f"({epochs:.2g} passes over the training sets; GSFM made 50)"
    )
