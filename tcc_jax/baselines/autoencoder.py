"""A denoising auto-encoder in the configuration of GSFM: a trained peer of the decoder, on the same corpus."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from tcc_jax.baselines.cache import Arrays, cached
from tcc_jax.corpus.similarity import Sets, training_sets
from tcc_jax.corpus.store import Corpus
from tcc_jax.corpus.vocabulary import PAD
from tcc_jax.model.products import contract, sum_of_outer
from tcc_jax.terminal import progress

_BATCH, _STEPS, _PASSES = 512, 1200, 50
_WIDTHS = (512, 256, 256)
_DROPOUT = 0.2
_VISIBLE_SHARE = 0.2
_LEARNING_RATE, _WARMUP = 2e-3, 0.05
# Principal components at the start, half of the narrowest layer with a ReLU; and the logit for each unit of projection.
_COMPONENTS, _GAIN, _ITERATIONS = 128, 16.0, 3
# Sizes are rounded up to these, so that few are compiled.
_MENTIONS_AT_ONCE, _ROWS_AT_ONCE = 8192, 64

Params = dict[str, jax.Array]


class _Mentions(NamedTuple):
    """The genes of several sets in two flat arrays, P of them: ids, `PAD` behind the last; and the row of each."""

    ids_P: np.ndarray
    rows_P: np.ndarray


class Autoencoder:
    """The denoising auto-encoder of GSFM, "A gene set foundation model pre-trained on a massive collection of diverse
    gene sets" (doi 10.1101/2025.05.30.657124, Patterns 2026); its code is github.com/MaayanLab/gsfm, models/DAE.py.

    As there: multi-hot input, layers of 512, 256 and 256, one logit a gene; ReLU and dropout 0.2 after the first and
    the last of them, the bottleneck between is linear; a random 20 % of a set go in, binary cross-entropy to the other
    80 % over the whole vocabulary, unweighted; Adam. Otherwise than there, so that few passes over the sets are enough:
    512 sets a step instead of 128, a learning rate that rises to 2e-3 and falls to 0 instead of plateaus from 1e-3, the
    loss summed over genes and not averaged (gradients of rare genes would drown in Adam's epsilon), and a start that
    knows something: the output bias is each gene's log odds, and through half of the last layer's units the network
    projects its input onto the first principal components of the training sets, as PureSVD (Cremonesi, Koren & Turrin,
    RecSys 2010) does. From random weights it takes many passes to get as far.

    Attributes:
        steps: optimizer steps it was trained for.
        passes: over the training sets.

    Args:
        corpus: the prepared corpus; its training sets are fitted.
        folder: where the parameters are kept, by corpus hash and settings.
        steps: optimizer steps; 1,200, but at most the 50 passes over the sets that GSFM made, unless given.
        seed: of the initial parameters, the batches, the masks and dropout.
    """

    def __init__(self, corpus: Corpus, folder: str | Path, steps: int | None = None, seed: int = 0) -> None:
        sets = max(1, len(corpus.indices("train")))
        self.steps = steps or min(_STEPS, math.ceil(_PASSES * sets / _BATCH))
        self.passes = self.steps * _BATCH / sets
        settings = {
            "version": 2, "corpus": corpus.hash, "steps": self.steps, "seed": seed, "widths": _WIDTHS,
            "dropout": _DROPOUT, "visible": _VISIBLE_SHARE, "batch": _BATCH, "learning_rate": _LEARNING_RATE,
            "warmup": _WARMUP, "components": _COMPONENTS, "gain": _GAIN,
        }  # fmt: skip
        arrays = cached(folder, "autoencoder", settings, lambda: _fit(corpus, self.steps, seed))
        self._params = {name: jnp.asarray(array) for name, array in arrays.items()}

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `baselines.Scorer`."""
        rows = -(-len(visible) // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
        return np.asarray(_logits(self._params, _flat(visible), rows))[: len(visible)]


def _initial(corpus: Corpus, seed: int) -> Params:
    size, rng = corpus.vocabulary.size, np.random.default_rng(seed)
    params = {}
    for layer, (rows, columns) in enumerate(itertools.pairwise((size, *_WIDTHS, size))):
        # A tenth of PyTorch's default, which GSFM leaves as it is: noise beside the components.
        weights = rng.uniform(-1, 1, (rows, columns)) * 0.1 * rows**-0.5
        params[f"weight{layer}"], params[f"bias{layer}"] = weights.astype(np.float32), np.zeros(columns, np.float32)
    components_VC = _components(training_sets(corpus), size, rng)
    count = components_VC.shape[1]
    # ReLU passes a number on as its positive and its negative part; the bottleneck puts them together again.
    for signs, part in ((1, slice(count)), (-1, slice(count, 2 * count))):
        params["weight0"][:, part] += signs * components_VC
        params["weight1"][part, :count] += signs * np.eye(count)
        params["weight2"][:count, part] += signs * np.eye(count)
        params["weight3"][part] += signs * _GAIN * components_VC.T
    share_V = np.clip(corpus.vocabulary.counts / max(1, len(corpus.indices("train"))), 1e-6, 1 - 1e-6)
    params["bias3"] = np.log(share_V / (1 - share_V)).astype(np.float32)
    return {name: jnp.asarray(array) for name, array in params.items()}


def _components(train: Sets, size: int, rng: np.random.Generator) -> np.ndarray:
    # First right singular vectors of the training sets as rows scaled by 1 / sqrt(length), by subspace iteration from
    # random vectors (Halko, Martinsson & Tropp, SIAM Review 2011).
    rows = train.matrix(size, np.repeat(1 / np.sqrt(train.lengths), train.lengths).astype(np.float32))
    basis_VC = rng.standard_normal((size, min(_COMPONENTS + 16, size)), np.float32)
    with progress("training the auto-encoder: principal components of the training sets", _ITERATIONS) as advance:
        for _ in range(_ITERATIONS):
            basis_VC, _ = scipy.linalg.qr(rows.T @ (rows @ basis_VC), mode="economic")
            advance(1)
    projected = rows @ basis_VC
    _, vectors = np.linalg.eigh(projected.T @ projected)
    return (basis_VC @ vectors[:, ::-1][:, :_COMPONENTS]).astype(np.float32)


def _encode(params: Params, visible: _Mentions, rows: int, dropout_key: jax.Array | None = None) -> jax.Array:
    # A multi-hot input times a matrix is a sum of its rows.
    genes_PF = jnp.where((visible.ids_P != PAD)[:, None], params["weight0"][visible.ids_P], 0)
    x = jax.ops.segment_sum(genes_PF, visible.rows_P, rows, indices_are_sorted=True) + params["bias0"]
    x = _activate(x, dropout_key, 0) @ params["weight1"] + params["bias1"]
    x = x @ params["weight2"] + params["bias2"]
    return _activate(x, dropout_key, 1)


def _activate(x: jax.Array, dropout_key: jax.Array | None, place: int) -> jax.Array:
    x = jax.nn.relu(x)
    if dropout_key is None:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, place), 1 - _DROPOUT, x.shape)
    return jnp.where(kept, x / (1 - _DROPOUT), 0)


@functools.partial(jax.jit, static_argnames="rows")
def _logits(params: Params, visible: _Mentions, rows: int) -> jax.Array:
    return _encode(params, visible, rows) @ params["weight3"] + params["bias3"]


def _gradients(
    params: Params, visible: _Mentions, hidden: _Mentions, rows: int, dropout_key: jax.Array | None
) -> Params:
    # By hand for the output layer, which is nearly all of the work: the gradient of the logits is sigmoid - target, and
    # the target is one only at the hidden genes. The loss itself is not needed.
    h_BF, pull = jax.vjp(lambda params: _encode(params, visible, rows, dropout_key), params)
    logits_BV = contract("BF,FV->BV", h_BF, params["weight3"]) + params["bias3"]
    is_gene_P = (hidden.ids_P != PAD).astype(jnp.float32)
    slope_BV = jax.nn.sigmoid(logits_BV).at[hidden.rows_P, hidden.ids_P].add(-is_gene_P) / rows
    (gradients,) = pull(contract("BV,FV->BF", slope_BV, params["weight3"]))
    return {**gradients, "weight3": sum_of_outer(h_BF, slope_BV), "bias3": slope_BV.sum(axis=0)}


def _fit(corpus: Corpus, steps: int, seed: int) -> Arrays:
    def rate(count: jax.Array) -> jax.Array:
        return _LEARNING_RATE * jnp.minimum(1, (count + 1) / (_WARMUP * steps)) * (1 - count / steps)

    optimizer = optax.adam(rate)
    params = _initial(corpus, seed)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, state: optax.OptState, visible: _Mentions, hidden: _Mentions, key: jax.Array
    ) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(_gradients(params, visible, hidden, _BATCH, key), state)
        return optax.apply_updates(params, updates), state

    batches = _batches(corpus, np.random.default_rng(seed))
    with progress("training the auto-encoder: step", steps) as advance:
        for number, (visible, hidden) in enumerate(itertools.islice(batches, steps)):
            key = jax.random.fold_in(jax.random.key(seed + 1), number)
            params, state = step(params, state, visible, hidden, key)
            jax.block_until_ready(params)
            advance(1)
    return {name: np.asarray(array) for name, array in params.items()}


def _batches(corpus: Corpus, rng: np.random.Generator) -> Iterator[tuple[_Mentions, _Mentions]]:
    train = corpus.indices("train")
    order = itertools.chain.from_iterable(rng.permutation(train) for _ in itertools.count())
    while True:
        visible, hidden = [], []
        for index in itertools.islice(order, _BATCH):
            genes = rng.permutation(corpus.genes(int(index)))
            cut = max(1, round(_VISIBLE_SHARE * len(genes)))
            visible.append(genes[:cut])
            hidden.append(genes[cut:])
        yield _flat(visible), _flat(hidden)


def _flat(sets: Sequence[np.ndarray]) -> _Mentions:
    count = sum(map(len, sets))
    padding = -count % _MENTIONS_AT_ONCE
    ids = np.concatenate([*sets, np.full(padding, PAD)]).astype(np.int32)
    rows = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    return _Mentions(ids, np.concatenate([rows, np.full(padding, len(sets) - 1)]).astype(np.int32))
