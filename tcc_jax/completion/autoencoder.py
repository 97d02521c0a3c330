"""A denoising auto-encoder in the configuration of GSFM: a trained peer of the decoder, on the same corpus."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tcc_jax.completion.fitting import Arrays, cached
from tcc_jax.completion.ranker import power_of_two
from tcc_jax.corpus.store import Corpus
from tcc_jax.terminal import progress

_WIDTHS = (512, 256, 256)
_DROPOUT = 0.2
_VISIBLE_SHARE = 0.2
BATCH = 128
_LEARNING_RATE = 1e-3

Params = dict[str, jax.Array]


class Autoencoder:
    """The denoising auto-encoder of GSFM, "A gene set foundation model pre-trained on a massive collection of diverse
    gene sets" (doi 10.1101/2025.05.30.657124, Patterns 2026); its code is github.com/MaayanLab/gsfm, models/DAE.py.

    As there: multi-hot input, layers of 512, 256 and 256 with ReLU and dropout 0.2, one logit a gene; a random 20 % of
    a set go in, binary cross-entropy to the other 80 % over the whole vocabulary; Adam at 1e-3, 128 sets a step.
    Otherwise than there: a budget of steps instead of 50 epochs, no learning-rate plateaus, and the output bias starts
    at each gene's log odds, which with few steps only helps it.

    Args:
        corpus: the prepared corpus; its training sets are fitted.
        folder: where the parameters are kept, by corpus hash and settings.
        steps: optimizer steps.
        seed: of the initial parameters, the batches, the masks and dropout.
    """

    def __init__(self, corpus: Corpus, folder: str | Path, steps: int = 2000, seed: int = 0) -> None:
        self._size = corpus.vocabulary.size
        settings = {
            "version": 1, "corpus": corpus.hash, "steps": steps, "seed": seed, "widths": _WIDTHS, "dropout": _DROPOUT,
            "visible": _VISIBLE_SHARE, "batch": BATCH, "learning_rate": _LEARNING_RATE,
        }  # fmt: skip
        arrays = cached(folder, "autoencoder", settings, lambda: _fit(corpus, steps, seed))
        self._params = {name: jnp.asarray(array) for name, array in arrays.items()}

    def __call__(self, visible: Sequence[np.ndarray]) -> np.ndarray:
        """Score [n, V] float32, as a `ranker.Scorer`."""
        rows = power_of_two(len(visible))
        padded = [*visible, *[np.empty(0, np.int32)] * (rows - len(visible))]
        return np.asarray(_logits(self._params, _multi_hot(padded, self._size)))[: len(visible)]


def _initial(corpus: Corpus, key: jax.Array) -> Params:
    size = corpus.vocabulary.size
    sizes = (size, *_WIDTHS, size)
    params = {}
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        key, own = jax.random.split(key)
        # PyTorch's default for a linear layer, which GSFM leaves as it is.
        bound = rows**-0.5
        params[f"weight{layer}"] = jax.random.uniform(own, (rows, columns), jnp.float32, -bound, bound)
        params[f"bias{layer}"] = jnp.zeros(columns, jnp.float32)
    share_V = np.clip(corpus.vocabulary.counts / max(1, len(corpus.indices("train"))), 1e-6, 1 - 1e-6)
    params[f"bias{len(_WIDTHS)}"] = jnp.asarray(np.log(share_V / (1 - share_V)), jnp.float32)
    return params


@jax.jit
def _logits(params: Params, input_BV: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    x = input_BV.astype(jnp.float32)
    for layer in range(len(_WIDTHS)):
        x = jax.nn.relu(x @ params[f"weight{layer}"] + params[f"bias{layer}"])
        if dropout_key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, layer), 1 - _DROPOUT, x.shape)
            x = jnp.where(kept, x / (1 - _DROPOUT), 0)
    return x @ params[f"weight{len(_WIDTHS)}"] + params[f"bias{len(_WIDTHS)}"]


def _fit(corpus: Corpus, steps: int, seed: int) -> Arrays:
    optimizer = optax.adam(_LEARNING_RATE)
    params = _initial(corpus, jax.random.key(seed))
    state = optimizer.init(params)

    def loss(params: Params, input_BV: jax.Array, target_BV: jax.Array, key: jax.Array) -> jax.Array:
        logits_BV = _logits(params, input_BV, key)
        return optax.sigmoid_binary_cross_entropy(logits_BV, target_BV.astype(jnp.float32)).mean()

    @jax.jit(donate_argnums=(0, 1))
    def step(
        params: Params, state: optax.OptState, input_BV: jax.Array, target_BV: jax.Array, key: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, input_BV, target_BV, key)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    train, size = corpus.indices("train"), corpus.vocabulary.size
    rng = np.random.default_rng(seed)
    with progress("training the auto-encoder: step", steps) as advance:
        for number in range(steps):
            visible, hidden = [], []
            for index in rng.choice(train, BATCH):
                genes = rng.permutation(corpus.genes(int(index)))
                cut = max(1, round(_VISIBLE_SHARE * len(genes)))
                visible.append(genes[:cut])
                hidden.append(genes[cut:])
            key = jax.random.fold_in(jax.random.key(seed + 1), number)
            params, state, value = step(params, state, _multi_hot(visible, size), _multi_hot(hidden, size), key)
            advance(1, f"loss {float(value):.6f}")
    return {name: np.asarray(array) for name, array in params.items()}


def _multi_hot(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    hot = np.zeros((len(rows), size), np.uint8)
    for row, ids in zip(hot, rows, strict=True):
        row[ids] = 1
    return hot
