"""The recall that a training follows: validation sets, completed with the parameters of the moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tcc_jax.completion.model import Model
from tcc_jax.completion.ranker import batched
from tcc_jax.completion.tuning import recall_of_each, validation_masks
from tcc_jax.config import Config
from tcc_jax.corpus.store import Corpus
from tcc_jax.model.decoder import Params
from tcc_jax.runs.checkpoint import LoadedCheckpoint

_SETS_AT_ONCE = 64


def make_recall(config: Config, corpus: Corpus) -> Callable[[Params, int, Callable[[], None]], float]:
    """Return what `training.loop.train` measures the recall with, on random validation sets, always the same ones.

    Up to `training.recall_sets` of them show a random 20 %, and as many genes are drawn as are hidden.

    Returns:
        A function of parameters on one device, their step and `poll`, which it calls before each batch of sets. Its
        value is the mean recall of the sets; 0 where none has two genes, or a score is not a number.
    """
    # By length, so that prompts in a batch need about the same padding.
    masked = sorted(validation_masks(corpus, config.training.recall_sets), key=lambda one: len(one.visible))

    def recall(params: Params, step: int, poll: Callable[[], None]) -> float:
        model = Model(LoadedCheckpoint({}, config, corpus.vocabulary, params, Path(config.run.directory), step))
        recalls: list[float] = []
        for batch in batched(masked, _SETS_AT_ONCE):
            poll()
            scores_BV = model.score([one.visible for one in batch])
            if np.isnan(scores_BV).any():
                # No reason to end here: the loop has its own words for a run that has come to this.
                return 0.0
            recalls.extend(recall_of_each(scores_BV, batch))
        return float(np.mean(recalls)) if recalls else 0.0

    return recall
