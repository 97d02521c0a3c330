"""The model together with retrieval: its probabilities and the votes of training sets, as in a nearest-neighbour LM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import scipy.special

from tcc_jax.baselines import Scorer
from tcc_jax.baselines.cache import Arrays, cached
from tcc_jax.baselines.relevance import RelevanceModel
from tcc_jax.completion.model import Model
from tcc_jax.completion.ranker import batched
from tcc_jax.completion.tuning import recall_of_each, validation_masks
from tcc_jax.corpus.vocabulary import genes_of
from tcc_jax.terminal import progress

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TUNING_SETS = 400
_SETS_AT_ONCE = 32


class Mixture:
    """Scores log((1 - weight) p + weight s): the kNN-LM of Khandelwal et al. (ICLR 2020) over sets.

    p is the softmax of the model's logits and s the share of the votes, both over the genes that are not visible.
    Where nothing gets a vote the model's order stays.

    Args:
        model: scores of the model, logits.
        retrieval: scores of a relevance model, not negative.
        weight: share of retrieval, 0 to under 1.
        how: how the weight was chosen, for `describe`.
    """

    def __init__(self, model: Scorer, retrieval: Scorer, weight: float = 0.0, how: str = "as given") -> None:
        self._model, self._retrieval, self.weight, self._how = model, retrieval, weight, how

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `baselines.Scorer`; -inf for visible genes and special ids."""
        return _mix(*_parts(self._model(visible), self._retrieval(visible), visible), self.weight)

    def describe(self) -> str:
        """Return one line with the weight."""
        return (
            f"mixture: log({1 - self.weight:g} p + {self.weight:g} s), p the model's probabilities and s the share of "
            f"the relevance model's votes; {self._how}"
        )


def tuned_mixture(model: Model, retrieval: RelevanceModel, folder: str | Path) -> Mixture:
    """Return the mixture with the weight that does best on the corpus's validation split.

    Best is the highest mean recall at the hidden count, with a random 20 % of up to `TUNING_SETS` validation sets
    visible, among `WEIGHTS`; the smallest where it is equal. Sets of the library that a validation set comes from have
    no vote then, unless most training sets are of it: the sets that people complete come from no library of the corpus,
    and among relatives in their own library retrieval gets a weight that does not hold elsewhere. For sets of known
    libraries, such as those of a random test split, the weight is therefore too low. The choice is kept in `folder`, by
    the corpus hash, the model's recorded digest and the settings of retrieval. Without a validation set the model stays
    alone.
    """
    checkpoint = model.checkpoint
    # An export has the one of its arrays, a checkpoint that of all it holds.
    digest = checkpoint.meta.get("arrays_sha256") or checkpoint.meta["record_sha256"]
    settings = {
        "version": 5, "corpus": retrieval.index.corpus.hash, "model": [asdict(checkpoint.config.model), digest],
        "weights": WEIGHTS, "sets": TUNING_SETS, "relevance": retrieval.settings,
    }  # fmt: skip
    chosen = cached(folder, "mixture", settings, lambda: _tune(model.score, retrieval))
    weighed = validation_masks(retrieval.index.corpus, 1)
    how = "weighed on the validation split" if weighed else "the model alone: no validation set to weigh it on"
    return Mixture(model.score, retrieval, float(chosen["weight"]), how)


def _tune(model: Scorer, retrieval: RelevanceModel) -> Arrays:
    masked = validation_masks(retrieval.index.corpus, TUNING_SETS)
    sizes = np.bincount(retrieval.libraries)
    # Without most of its sets a corpus says little: a library that large keeps its votes.
    codes = {name: code for code, name in enumerate(retrieval.names) if 2 * sizes[code] <= sizes.sum()}
    totals = np.zeros(len(WEIGHTS))
    with progress("weighing the mixture on the validation sets", len(masked)) as advance:
        for batch in batched(masked, _SETS_AT_ONCE):
            visible, votes = [one.visible for one in batch], []
            for one in batch:
                likelihoods = retrieval.likelihoods(one.visible)
                likelihoods[retrieval.libraries == codes.get(one.library, -1)] = 0
                votes.append(retrieval.votes(likelihoods, one.visible))
            parts = _parts(model(visible), np.stack(votes), visible)
            totals += [recall_of_each(_mix(*parts, weight), batch).sum() for weight in WEIGHTS]
            advance(len(batch))
    return {"recall": totals / max(1, len(masked)), "weight": np.array(WEIGHTS[int(np.argmax(totals))])}


def _parts(
    logits_BV: jax.Array | np.ndarray, votes_BV: jax.Array | np.ndarray, visible: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p and s, [B, V] float32."""
    candidates_BV = np.tile(genes_of(logits_BV.shape[1]), (len(visible), 1))
    for candidates_V, ids in zip(candidates_BV, visible, strict=True):
        candidates_V[ids] = False
    shares_BV = np.where(candidates_BV, votes_BV, 0)
    total_B1 = shares_BV.sum(axis=1, keepdims=True)
    log_p_BV = scipy.special.log_softmax(np.where(candidates_BV, logits_BV, -np.inf), axis=1)
    return log_p_BV, shares_BV / np.where(total_B1 > 0, total_B1, 1)


def _mix(log_p_BV: np.ndarray, share_BV: np.ndarray, weight: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.logaddexp(math.log1p(-weight) + log_p_BV, np.log(weight * share_BV))
