"""A checkpoint opened for use: genes in, scores or proposed genes out."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tcc_jax.baselines import Scorer
from tcc_jax.completion.ranker import batched, power_of_two, rank, row_bucket
from tcc_jax.completion.sampler import Sampler, Sampling
from tcc_jax.config import ModelConfig
from tcc_jax.corpus.store import Corpus, open_corpus
from tcc_jax.corpus.symbols import SymbolTable
from tcc_jax.corpus.vocabulary import NUM_SPECIAL, PAD, START, Vocabulary
from tcc_jax.model.decoder import Params, merge
from tcc_jax.runs.checkpoint import LoadedCheckpoint, read_checkpoint
from tcc_jax.storage import as_path, check_bucket
from tcc_jax.terminal import UserError

Symbols = list[str] | tuple[str, ...] | np.ndarray

_SHORTEST_ROW = 16
# Attention takes memory with rows x length^2, the output layer with rows x V: both are bounded here.
_TOKENS_AT_ONCE, _PAIRS_AT_ONCE, _ROWS_AT_ONCE = 8192, 2**24, 64
# Without a position code nothing but memory limits a prompt.
_LONGEST_ROW = 4096
AMBIGUOUS = "ambiguous: several genes share that name"
# Sets read from a stream before the first of them is completed.
WINDOW = 1024


@dataclass(frozen=True)
class Proposal:
    """A proposed gene: its rank from 1, approved symbol, and share of the probability over all candidates."""

    rank: int
    symbol: str
    probability: float


class Room(NamedTuple):
    """How sampling fits a set into a row: its genes that are shown, those that can be drawn, and those that can't."""

    shown: int
    drawn: int
    missing: int


def load(path: str | Path, mesh: Mesh | None = None) -> Model:
    """Open a checkpoint for completion: a run directory, one step inside it, or an export.

    Args:
        path: the checkpoint.
        mesh: the rows of a batch are spread over its axis `data`; over all devices of this process unless given.

    Raises:
        UserError: the path holds no readable checkpoint.
    """
    if mesh is None:
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    return Model(read_checkpoint(path), mesh=mesh)


class Model:
    """A trained decoder that completes gene sets.

    Args:
        checkpoint: its parameters lie on every device of the mesh.
        mesh: the rows of a batch are spread over its axis `data`; the default device unless given.

    Attributes:
        checkpoint: what it was opened from: configuration, vocabulary, step.
        seed: chooses the genes that are shown of a set too long for a row, and the permutations of a prompt.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, seed: int = 0, mesh: Mesh | None = None) -> None:
        if mesh is not None and mesh.size == 1:
            mesh = None
        self._rows_sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        if mesh is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            checkpoint = dataclasses.replace(checkpoint, params=jax.device_put(checkpoint.params, whole))
        self.checkpoint = checkpoint
        self.seed = seed
        self._config = checkpoint.config.model
        if jax.default_backend() == "cpu":
            # Nearer the parameters, and on most CPUs faster: few multiply bfloat16.
            self._config = dataclasses.replace(self._config, matmul_dtype="float32", residual_dtype="float32")
        self._row_length = checkpoint.config.training.row_length
        self._mesh = mesh

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        return self.checkpoint.vocabulary

    @property
    def prompt_limit(self) -> int:
        """Most genes a prompt can hold; of a longer one a seeded random subset of that many is shown to the model.

        With a position code it is what a row of the training held. Without one it does not depend on the training.
        """
        return self._longest_row - 1

    def complete(
        self,
        genes: Symbols | Sequence[Symbols],
        number: int = 20,
        skip_unknown: bool = False,
        *,
        permutations: int = 1,
        background: Symbols | set[str] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Any]:
        """Propose the genes that belong with the given ones: ranked from one forward pass, or drawn one by one.

        Args:
            genes: approved symbols (a list or a NumPy array), or a list of such lists. Duplicates count once.
            number: genes to propose for each set; fewer come back where there are no more.
            skip_unknown: leave out symbols that the vocabulary lacks, instead of raising.
            permutations: average the log-probabilities over this many random orders of the given genes; 1 takes them
                as they are given. For ranking only.
            background: the only symbols that may be proposed; those the vocabulary lacks are left out.
            sampling: draw each gene given those before (a joint draw) in this way, instead of ranking. What is drawn
                for a set depends on the seed and its genes in their order, not on the other sets.

        Returns:
            `Proposal`s, most probable first and equal ones in the order of the vocabulary, or in the order drawn; for a
            list of lists one such list for each. Probabilities, of drawn genes too, are shares under the softmax given
            the given genes, over all candidates: the genes of the background (by default of the vocabulary) but those.

        Raises:
            UserError: `number` or `permutations` under 1, symbols given otherwise, no gene, none that is known, or an
                unknown symbol (the approved one, or the nearest ones, are named). In a list of lists it begins with
                the place of the set, such as `genes[3]`.
        """
        for name, value in (("number", number), ("permutations", permutations)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise UserError(f"{name} = {value}: must be a whole number of at least 1")
        if isinstance(background, set | frozenset):
            background = list(background)
        candidates_V = None if background is None else self.background(_checked(background))
        single = not _is_list(genes) or all(isinstance(one, str) for one in genes)
        if single:
            prompts = [self._ids(_checked(genes), skip_unknown)]
        else:
            prompts = [self._ids_of_one(place, symbols, skip_unknown) for place, symbols in enumerate(genes)]
        queries = ((prompt, int(number)) for prompt in prompts)
        found = self.propose(queries, self.scorer(int(permutations)), sampling, candidates_V)
        completions = [self.records(ids, shares) for ids, shares in found]
        return completions[0] if single else completions

    def propose(
        self,
        queries: Iterable[tuple[np.ndarray, int]],
        scorer: Scorer | None = None,
        sampling: Sampling | None = None,
        candidates_V: np.ndarray | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Complete a stream of sets of any number, in bounded memory.

        With learned or rotary positions the prompt and what is sampled share a row of the training: a prompt that
        leaves too little room is shown in part, at least half a row of it, and fewer genes may come back.

        Args:
            queries: for each set the ids of its visible genes, each once and at least one, and how many to propose.
            scorer: rank by its scores, such as those of `scorer(permutations)` or a mixture, instead of the model's.
            sampling: draw jointly in this way instead of ranking.
            candidates_V: [V] bool, the genes that may be proposed; all unless given.
            advance: called with the number of sets just done, before they are yielded.

        Yields:
            For each set, in order: ids, int32, and probabilities, float32, as `rank` or `Sampler.draw` give them.
        """
        for window in batched(queries, WINDOW):
            prompts, counts = [prompt for prompt, _ in window], [count for _, count in window]
            if sampling is None:
                ids, shares = rank(scorer or self.score, prompts, counts, advance, candidates_V)
            else:
                shown, budgets = zip(*(self._fit_to_draw(prompt, count) for prompt, count in window), strict=True)
                seeds = [_seed_of(prompt, sampling.seed) for prompt in prompts]
                ids, shares = self._sampler.draw(shown, budgets, seeds, sampling, candidates_V, prompts, advance)
            yield from zip(ids, shares, strict=True)

    def room_to_draw(self, given: int, count: int) -> Room:
        """Return how many of so many visible genes sampling shows to the model, and how many it can draw.

        Args:
            given: visible genes.
            count: genes asked for.
        """
        # More than the genes that are left can't be drawn; a larger budget would only take memory.
        count = min(count, self.vocabulary.size - NUM_SPECIAL - given)
        if self._config.position == "none":
            return Room(min(given, self.prompt_limit), count, 0)
        row = self._row_length - 1
        shown = min(given, max(row - count, row // 2))
        drawn = min(count, row - shown)
        return Room(shown, drawn, count - drawn)

    def scorer(self, permutations: int = 1) -> Scorer:
        """Return a scorer that averages log-probabilities over random permutations of the visible genes.

        Args:
            permutations: how many; 1 scores the genes in the order given. Which ones depends on the model's seed and
                the set's own genes.
        """
        if permutations == 1:
            return self.score

        def average(visible: Sequence[np.ndarray]) -> np.ndarray:
            total_BV = np.zeros((len(visible), self.vocabulary.size), np.float32)
            for number in range(permutations):
                shuffled = [
                    np.random.default_rng([_seed_of(prompt, self.seed), number]).permutation(prompt)
                    for prompt in visible
                ]
                total_BV += scipy.special.log_softmax(self.score(shuffled), axis=1)
            return total_BV / permutations

        return average

    def score(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Score every id as the next gene of each set, from one forward pass over `<start>` and its visible genes.

        Args:
            prompts: arrays of gene ids, one a set; at most `prompt_limit` of each are used.

        Returns:
            [n, V] float32 logits, special ids included.
        """
        shards = 1 if self._mesh is None else self._mesh.shape["data"]
        prompts = [self._fit(prompt, self.prompt_limit) for prompt in prompts]
        # Put together here and not on the device, where every other number of rows would be compiled anew.
        scores_BV = np.empty((len(prompts), self.vocabulary.size), np.float32)
        done = 0
        # A row's length depends on its own prompt alone, so that its neighbours do not change its result.
        for length, group in itertools.groupby(prompts, key=self._bucket):
            rows_at_once = max(1, min(_ROWS_AT_ONCE, _TOKENS_AT_ONCE // length, _PAIRS_AT_ONCE // length**2))
            for batch in batched(group, shards * rows_at_once):
                tokens_BT = np.full((row_bucket(len(batch), shards), length), PAD, np.int32)
                tokens_BT[:, 0] = START
                for row, prompt in enumerate(batch):
                    tokens_BT[row, 1 : 1 + len(prompt)] = prompt
                logits_BV = _last_logits(
                    self.checkpoint.params, jax.device_put(tokens_BT, self._rows_sharding), self._config,
                    self.vocabulary.size, self._row_length,
                )  # fmt: skip
                scores_BV[done : done + len(batch)] = np.asarray(logits_BV)[: len(batch)]
                done += len(batch)
        return scores_BV

    def corpus(self, path: str | Path | None = None, *, required: bool) -> tuple[Corpus | None, str]:
        """Open the prepared corpus that the model was trained on.

        Args:
            path: where it is; where it was at the training unless given.
            required: raise where it can't be had, instead of saying so.

        Returns:
            The corpus, or None and why there is none.

        Raises:
            UserError: it is required, and not there, not readable or of another vocabulary.
        """
        try:
            return self._open_corpus(as_path(path or self.checkpoint.config.data.corpus), named=bool(path)), ""
        except (UserError, OSError) as error:
            if required:
                raise
            return None, str(error)

    def background(self, symbols: Iterable[str]) -> np.ndarray:
        """Return [V] bool: which genes a list of approved symbols allows.

        Raises:
            UserError: none of them is in the vocabulary.
        """
        candidates_V = np.zeros(self.vocabulary.size, bool)
        candidates_V[[self.vocabulary.ids[symbol] for symbol in symbols if symbol in self.vocabulary.ids]] = True
        if not candidates_V.any():
            raise UserError("no gene of the background is in the model's vocabulary")
        return candidates_V

    def records(self, ids: np.ndarray, probabilities: np.ndarray) -> list[Proposal]:
        """Return proposed ids as records, ranked in their order."""
        return [
            Proposal(place, self.vocabulary.symbols[id_], float(share))
            for place, (id_, share) in enumerate(zip(ids, probabilities, strict=True), start=1)
        ]

    def _open_corpus(self, path: Path, *, named: bool) -> Corpus:
        check_bucket(path)
        if not path.exists():
            raise UserError(f"the corpus {path} is not there" + ("" if named else "; name it with --corpus"))
        corpus = open_corpus(path)
        theirs, ours = corpus.vocabulary.hash, self.vocabulary.hash
        if theirs != ours:
            raise UserError(
                f"the corpus {path} has another vocabulary ({theirs[:12]}) than checkpoint "
                f"{self.checkpoint.run_directory} ({ours[:12]}); name the corpus it was trained on with --corpus"
            )
        return corpus

    @functools.cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.checkpoint.params, self._config, self.vocabulary.size, self._row_length, self._mesh)

    @property
    def _longest_row(self) -> int:
        return max(self._row_length, _LONGEST_ROW) if self._config.position == "none" else self._row_length

    def _ids_of_one(self, place: int, symbols: Any, skip_unknown: bool) -> np.ndarray:
        try:
            return self._ids(_checked(symbols), skip_unknown)
        except UserError as error:
            raise UserError(f"genes[{place}]: {error}") from None

    def _ids(self, symbols: Symbols, skip_unknown: bool) -> np.ndarray:
        ids = self.vocabulary.ids
        known = dict.fromkeys(ids[symbol] for symbol in symbols if symbol in ids)
        unknown = [symbol for symbol in symbols if symbol not in ids]
        if unknown and not (skip_unknown and known):
            symbol = unknown[0]
            resolution = SymbolTable.read().resolve(symbol)
            approved = resolution.symbol
            if resolution.how == "ambiguous":
                raise UserError(f"{symbol}: {AMBIGUOUS}; pass an approved symbol")
            if approved is None:
                raise UserError(f"{symbol}: {unknown_gene(symbol, self.vocabulary)}")
            if approved in ids:
                raise UserError(f"{symbol}: not an approved symbol; the approved one is {approved}")
            which = "" if approved == symbol else f"not an approved symbol; the approved one is {approved}, which is "
            raise UserError(f"{symbol}: {which or 'approved but '}not in the model's vocabulary")
        if not known:
            raise UserError("no gene given; pass at least one symbol")
        return np.array(list(known), np.int32)

    def _fit(self, prompt: np.ndarray, limit: int) -> np.ndarray:
        if len(prompt) <= limit:
            return prompt
        chosen = np.random.default_rng([self.seed, len(prompt)]).choice(len(prompt), limit, replace=False)
        return prompt[np.sort(chosen)]

    def _fit_to_draw(self, prompt: np.ndarray, count: int) -> tuple[np.ndarray, int]:
        room = self.room_to_draw(len(prompt), count)
        return self._fit(prompt, room.shown), room.drawn

    def _bucket(self, prompt: np.ndarray) -> int:
        return min(max(power_of_two(len(prompt) + 1), _SHORTEST_ROW), self._longest_row)


def unknown_gene(symbol: str, vocabulary: Vocabulary) -> str:
    """Say that a symbol is not in the vocabulary, and name the nearest ones that are (case does not matter)."""
    by_upper = {known.upper(): known for known in vocabulary.ids}
    nearest = [by_upper[match] for match in difflib.get_close_matches(symbol.upper(), by_upper, n=3)]
    return "not in the vocabulary" + (f"; the nearest: {', '.join(nearest)}" if nearest else "")


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _checked(symbols: Any) -> Symbols:
    # A set has no order, and what is shown has one; a text is a sequence of letters.
    if not _is_list(symbols) or not all(isinstance(symbol, str) for symbol in symbols):
        raise UserError(f"{symbols!r}: pass symbols as a list, a tuple or a NumPy array, such as ['TP53', 'MDM2']")
    return symbols


def _seed_of(prompt: np.ndarray, seed: int) -> int:
    return zlib.crc32(np.asarray(prompt, np.int64).tobytes(), seed)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _last_logits(
    params: Params, tokens_BT: jax.Array, config: ModelConfig, vocabulary_size: int, row_length: int
) -> jax.Array:
    decoder = merge(config, vocabulary_size, row_length, params)
    segments_BT = (tokens_BT != PAD).astype(jnp.int32)
    last_B1 = segments_BT.sum(axis=1, keepdims=True) - 1
    h_B1D = decoder(tokens_BT, segments_BT, positions_BC=last_B1)
    return decoder.logits(h_B1D[:, 0])[:, :vocabulary_size]
