"""A checkpoint opened for use: genes in, scores or proposed genes out."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from tcc_jax.completion.ranker import power_of_two, rank
from tcc_jax.config import ModelConfig
from tcc_jax.corpus.vocabulary import PAD, START, Vocabulary
from tcc_jax.model.decoder import Params, merge
from tcc_jax.terminal import UserError
from tcc_jax.training.checkpoint import LoadedCheckpoint, read_checkpoint

Symbols = list[str] | tuple[str, ...] | np.ndarray

_SHORTEST_ROW = 16
# Attention takes memory with rows x length^2, the output layer with rows x V: both are bounded here.
_TOKENS_AT_ONCE = 8192
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Proposal:
    """A proposed gene: its rank from 1, approved symbol, and share of the probability over all candidates."""

    rank: int
    symbol: str
    probability: float


def load(path: str | Path) -> Model:
    """Open a checkpoint for completion: a run directory, or one step inside it.

    Raises:
        UserError: the path holds no readable checkpoint.
    """
    return Model(read_checkpoint(path))


class Model:
    """A trained decoder that completes gene sets.

    Attributes:
        checkpoint: what it was opened from: configuration, vocabulary, step.
        seed: chooses the genes that are shown of a set too long for a row.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, seed: int = 0) -> None:
        self.checkpoint = checkpoint
        self.seed = seed

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        return self.checkpoint.vocabulary

    @property
    def prompt_limit(self) -> int:
        """Most genes a prompt can hold; of a longer one a seeded random subset of that many is shown to the model."""
        return self.checkpoint.config.training.row_length - 1

    @overload
    def complete(self, genes: Symbols, number: int = 20, skip_unknown: bool = False) -> list[Proposal]: ...
    @overload
    def complete(
        self, genes: Sequence[Symbols], number: int = 20, skip_unknown: bool = False
    ) -> list[list[Proposal]]: ...
    def complete(
        self, genes: Symbols | Sequence[Symbols], number: int = 20, skip_unknown: bool = False
    ) -> list[Proposal] | list[list[Proposal]]:
        """Propose the genes that belong with the given ones.

        Args:
            genes: approved symbols (a list or a NumPy array), or a list of such lists. Duplicates count once.
            number: genes to propose for each set; fewer come back where the vocabulary holds no more.
            skip_unknown: leave out symbols that the vocabulary lacks, instead of raising.

        Returns:
            Proposals, most probable first, equal ones in the order of the vocabulary; for a list of lists one such
            list for each. Probabilities are shares under the softmax over all genes but the given ones.

        Raises:
            UserError: `number` under 1, no gene, none that is known, or an unknown symbol (the nearest ones are named).
        """
        if isinstance(genes, str):
            raise UserError(f"{genes!r}: pass a list of symbols, such as [{genes!r}]")
        if number < 1:
            raise UserError(f"number = {number}: must be at least 1")
        single = len(genes) == 0 or isinstance(genes[0], str)
        prompts = [self._ids(symbols, skip_unknown) for symbols in ([genes] if single else genes)]  # type: ignore[arg-type]
        drawn, probabilities = rank(self.score, prompts, [number] * len(prompts))
        completions = [
            [
                Proposal(place, self.vocabulary.symbols[id_], float(probability))
                for place, (id_, probability) in enumerate(zip(ids, shares, strict=True), start=1)
            ]
            for ids, shares in zip(drawn, probabilities, strict=True)
        ]
        return completions[0] if single else completions

    def score(self, prompts: Sequence[np.ndarray]) -> jax.Array:
        """Score every id as the next gene of each set, from one forward pass over `<start>` and its visible genes.

        Args:
            prompts: arrays of gene ids, one a set; at most `prompt_limit` of each are used.

        Returns:
            [n, V] float32 logits on the default device, special ids included.
        """
        prompts = [self._fit(prompt) for prompt in prompts]
        config, parts = self.checkpoint.config, []
        # A row's length depends on its own prompt alone, so that its neighbours do not change its result.
        for length, group in itertools.groupby(prompts, key=self._bucket):
            rows_at_once = max(1, min(_ROWS_AT_ONCE, _TOKENS_AT_ONCE // length))
            for batch in _batches(group, rows_at_once):
                tokens_BT = np.full((power_of_two(len(batch)), length), PAD, np.int32)
                tokens_BT[:, 0] = START
                for row, prompt in enumerate(batch):
                    tokens_BT[row, 1 : 1 + len(prompt)] = prompt
                logits_BV = _last_logits(
                    self.checkpoint.params, tokens_BT, config.model, self.vocabulary.size, config.training.row_length
                )
                parts.append(logits_BV[: len(batch)])
        return jnp.concatenate(parts) if parts else jnp.zeros((0, self.vocabulary.size), jnp.float32)

    def _ids(self, symbols: Symbols, skip_unknown: bool) -> np.ndarray:
        ids = self.vocabulary.ids
        known = dict.fromkeys(ids[symbol] for symbol in symbols if symbol in ids)
        unknown = [symbol for symbol in symbols if symbol not in ids]
        if unknown and not (skip_unknown and known):
            raise UserError(f"{unknown[0]}: {unknown_gene(unknown[0], self.vocabulary)}")
        if not known:
            raise UserError("no gene given; pass at least one symbol")
        return np.array(list(known), np.int32)

    def _fit(self, prompt: np.ndarray) -> np.ndarray:
        if len(prompt) <= self.prompt_limit:
            return prompt
        chosen = np.random.default_rng([self.seed, len(prompt)]).choice(len(prompt), self.prompt_limit, replace=False)
        return prompt[np.sort(chosen)]

    def _bucket(self, prompt: np.ndarray) -> int:
        return min(max(power_of_two(len(prompt) + 1), _SHORTEST_ROW), self.checkpoint.config.training.row_length)


def unknown_gene(symbol: str, vocabulary: Vocabulary) -> str:
    """Say that a symbol is not in the vocabulary, and name the nearest ones that are (case does not matter)."""
    by_upper = {known.upper(): known for known in vocabulary.ids}
    nearest = [by_upper[match] for match in difflib.get_close_matches(symbol.upper(), by_upper, n=3)]
    return "not in the vocabulary" + (f"; the nearest: {', '.join(nearest)}" if nearest else "")


def _batches(items: Iterable[np.ndarray], size: int) -> Iterable[list[np.ndarray]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _last_logits(
    params: Params, tokens_BT: jax.Array, config: ModelConfig, vocabulary_size: int, row_length: int
) -> jax.Array:
    decoder = merge(config, vocabulary_size, row_length, params)
    segments_BT = (tokens_BT != PAD).astype(jnp.int32)
    h_BTD = decoder(tokens_BT, segments_BT)
    last_B11 = (segments_BT.sum(axis=1) - 1)[:, None, None]
    h_BD = jnp.take_along_axis(h_BTD, last_B11, axis=1)[:, 0]
    return decoder.logits(h_BD)[:, :vocabulary_size]
