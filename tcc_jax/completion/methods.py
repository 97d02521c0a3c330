"""What an evaluation compares: the model, and the baselines that can be had, with the reasons for those that can't."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tcc_jax.completion import baselines
from tcc_jax.completion.model import Model
from tcc_jax.completion.ranker import Scorer
from tcc_jax.corpus.store import Corpus
from tcc_jax.files import cache_folder
from tcc_jax.terminal import log


class Settings(Protocol):
    """The options of `eval` that decide about methods."""

    @property
    def seed(self) -> int: ...
    @property
    def baselines(self) -> str: ...
    @property
    def mixture(self) -> bool: ...
    @property
    def cache(self) -> str | None: ...
    @property
    def knn(self) -> tuple[int, float] | None: ...
    @property
    def ease_genes(self) -> int: ...
    @property
    def ease_penalty(self) -> float: ...
    @property
    def autoencoder_steps(self) -> int: ...


@dataclass
class Methods:
    """Scorers by name, the model first; the methods that are left out, and what to know of the others."""

    scorers: dict[str, Scorer]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a note, and show it at once."""
        self.notes.append(text)
        log(text)


def build_methods(model: Model, corpus: Corpus | None, missing: str, settings: Settings) -> Methods:
    """Fit, or read from the cache, every method that was asked for.

    Args:
        model: what is evaluated.
        corpus: the prepared corpus of its vocabulary; without it set-kNN, EASE, the auto-encoder and the mixture are
            left out.
        missing: why there is no corpus.
        settings: which methods, and how they are fitted.

    Raises:
        UserError: a method does not fit in memory.
    """
    found = Methods(
        {
            "model": model.score,
            "popularity": baselines.popularity(model.vocabulary),
            "random": baselines.random_genes(model.vocabulary, settings.seed),
        }
    )
    if corpus is None:
        names = ("set-kNN", "EASE", "auto-encoder", *(("mixture",) if settings.mixture else ()))
        found.left_out = dict.fromkeys(names, missing)
        return found
    folder = Path(settings.cache or cache_folder())
    if settings.knn is None:
        neighbours, how = baselines.tuned_neighbours(corpus, folder), "tuned on the validation split"
    else:
        neighbours, how = baselines.SetNeighbours(corpus, *settings.knn), "as given"
    found.scorers["set-kNN"] = neighbours
    found.note(
        f"set-kNN: nearest {neighbours.neighbours:,} training sets, idf cosine to the power {neighbours.power:g}, {how}"
    )
    if settings.baselines != "all":
        found.left_out = dict.fromkeys(("EASE", "auto-encoder"), "run with --baselines all")
        if not settings.mixture:
            return found
    ease = baselines.Ease(corpus, folder, settings.ease_genes, settings.ease_penalty)
    found.note(
        f"EASE: fitted on the {ease.num_genes:,} most frequent of {len(corpus.vocabulary.ids):,} genes, rows scaled by "
        f"1/sqrt(length), lambda {ease.penalty:g}; other genes score below these, by popularity"
    )
    if settings.baselines == "all":
        found.scorers["EASE"] = ease
        found.scorers["auto-encoder"] = _autoencoder(corpus, folder, settings, found)
    if settings.mixture:
        from tcc_jax.completion.mixture import tuned_mixture

        mixture = found.scorers["mixture"] = tuned_mixture(model, ease, neighbours, corpus, folder)
        found.note(mixture.describe())
    return found


def _autoencoder(corpus: Corpus, folder: Path, settings: Settings, found: Methods) -> Scorer:
    from tcc_jax.completion.autoencoder import BATCH, Autoencoder

    scorer = Autoencoder(corpus, folder, settings.autoencoder_steps, settings.seed)
    epochs = settings.autoencoder_steps * BATCH / max(1, len(corpus.indices("train")))
    found.note(
        f"auto-encoder: the configuration of GSFM (multi-hot, 512-256-256, BCE), {settings.autoencoder_steps:,} steps "
        f"({epochs:.2g} passes over the training sets; GSFM made 50)"
    )
    return scorer
