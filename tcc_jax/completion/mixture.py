"""The model together with retrieval: its probabilities, EASE's scores and the votes of set-kNN."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tcc_jax.completion.baselines import Ease, SetNeighbours
from tcc_jax.completion.fitting import Arrays, cached, recall_of_each, validation_masks
from tcc_jax.completion.model import Model
from tcc_jax.completion.protocol import genes_of
from tcc_jax.completion.ranker import Scorer, batched
from tcc_jax.corpus.store import Corpus
from tcc_jax.terminal import progress

EASE_WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8)
VOTE_WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TUNING_SETS = 400
_SETS_AT_ONCE = 100


class Mixture:
    """Scores log(p + vote_weight x votes), where p is the softmax of the model's logits + ease_weight x EASE's scores.

    The softmax is over the genes that are not visible, EASE's scores are in standard deviations over them, and votes
    are the scores of set-kNN. Adding probabilities of neighbours to a model's is the kNN-LM of Khandelwal et al. (ICLR
    2020); here the votes are not scaled to a sum of 1, so that near neighbours count for more than far ones.

    Args:
        model: scores of the model, logits.
        ease: its scores.
        neighbours: scores of set-kNN.
        ease_weight: nats for each standard deviation.
        vote_weight: probability for each vote.
    """

    def __init__(
        self, model: Scorer, ease: Scorer, neighbours: Scorer, ease_weight: float = 0.0, vote_weight: float = 0.0
    ) -> None:
        self._scorers = (model, ease, neighbours)
        self.ease_weight, self.vote_weight = ease_weight, vote_weight

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`; -inf for visible genes and special ids."""
        return np.asarray(_mix(*self.parts(visible), self.ease_weight, self.vote_weight))

    def describe(self) -> str:
        """Return one line with the weights."""
        return (
            f"mixture: log(p + {self.vote_weight:g} x votes of set-kNN), p the softmax of the model's logits + "
            f"{self.ease_weight:g} x EASE's scores in standard deviations; weights tuned on the validation split"
        )

    def parts(self, visible: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return what is mixed: the three methods' scores, [n, V] float32, and [n, V] bool, the genes not visible."""
        scores = [np.asarray(scorer(visible), np.float32) for scorer in self._scorers]
        candidates_BV = np.tile(genes_of(scores[0].shape[1]), (len(visible), 1))
        for candidates_V, ids in zip(candidates_BV, visible, strict=True):
            candidates_V[ids] = False
        return [*scores, candidates_BV]


def tuned_mixture(model: Model, ease: Ease, neighbours: SetNeighbours, corpus: Corpus, folder: str | Path) -> Mixture:
    """Return the mixture with the weights that do best on the corpus's validation split.

    Best is the highest mean recall at the hidden count, with a random 20 % of up to `TUNING_SETS` validation sets
    visible, over all pairs of `EASE_WEIGHTS` and `VOTE_WEIGHTS`; the smaller weights where it is equal. The choice is
    kept in `folder`, by the corpus hash, the model's parameters and the settings of EASE and set-kNN. Without a
    validation set the model stays alone.
    """
    mixture = Mixture(model.score, ease, neighbours)
    settings = {
        "version": 1, "corpus": corpus.hash, "model": _identity(model), "ease": [ease.num_genes, ease.penalty],
        "knn": [neighbours.neighbours, neighbours.power], "ease_weights": EASE_WEIGHTS, "vote_weights": VOTE_WEIGHTS,
        "sets": TUNING_SETS,
    }  # fmt: skip
    chosen = cached(folder, "mixture", settings, lambda: _tune(mixture, corpus))
    mixture.ease_weight, mixture.vote_weight = map(float, chosen["weights"])
    return mixture


def _tune(mixture: Mixture, corpus: Corpus) -> Arrays:
    masked = validation_masks(corpus, TUNING_SETS)
    pairs = list(itertools.product(EASE_WEIGHTS, VOTE_WEIGHTS))
    totals = np.zeros(len(pairs))
    with progress("weighing the mixture on the validation sets", len(masked)) as advance:
        for batch in batched(masked, _SETS_AT_ONCE):
            parts = mixture.parts([one.visible for one in batch])
            totals += [recall_of_each(np.asarray(_mix(*parts, *pair)), batch).sum() for pair in pairs]
            advance(len(batch))
    ease_weight, vote_weight = pairs[int(totals.argmax())]
    return {"recall": totals / max(1, len(masked)), "weights": np.array([ease_weight, vote_weight])}


@jax.jit
def _mix(
    logits_BV: jax.Array,
    ease_BV: jax.Array,
    votes_BV: jax.Array,
    candidates_BV: jax.Array,
    ease_weight: float,
    vote_weight: float,
) -> jax.Array:
    mean_B1 = ease_BV.mean(axis=1, keepdims=True, where=candidates_BV)
    deviation_B1 = ease_BV.std(axis=1, keepdims=True, where=candidates_BV)
    # Where EASE knows no visible gene its scores are equal, but for rounding.
    standard_BV = (ease_BV - mean_B1) / jnp.maximum(deviation_B1, 1e-6)
    log_p_BV = jax.nn.log_softmax(jnp.where(candidates_BV, logits_BV + ease_weight * standard_BV, -jnp.inf))
    return jnp.where(candidates_BV, jnp.logaddexp(log_p_BV, jnp.log(vote_weight * votes_BV)), -jnp.inf)


def _identity(model: Model) -> str:
    digest = hashlib.sha256(json.dumps(asdict(model.checkpoint.config.model), sort_keys=True).encode())
    for leaf in jax.tree.leaves(model.checkpoint.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
