"""Draw genes one after the other, each given the visible genes and those drawn before: a joint draw of a whole set.

One jitted program a bucket of shapes: the prompts at once, then a loop over genes with a cache of keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcc_jax.completion.ranker import power_of_two, row_bucket
from tcc_jax.config import ModelConfig
from tcc_jax.corpus.vocabulary import END, NUM_SPECIAL, PAD, START
from tcc_jax.model.decoder import Cache, Params, empty_cache, merge, padded_vocabulary_size
from tcc_jax.terminal import UserError

_SHORTEST_PROMPT, _FEWEST_DRAWN = 16, 16
_BLOCK = 32
# A batch's cache, and its scores of a whole prompt, stay under this.
_BATCH_BYTES = {"cpu": 2**30}
_BATCH_BYTES_ELSEWHERE = 2**34


@dataclass(frozen=True)
class Sampling:
    """How genes are drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy, always the most likely gene.
        top_k: each gene is drawn among this many most likely ones.
        top_p: and among the fewest of these that hold this share of their probability, at least one.
        stop_at_end: let the model end a set early by drawing `<end>`.
        seed: with the visible genes it decides what is drawn.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    stop_at_end: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `UserError` naming the first value that can't be used."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: must be 0 (greedy) or a positive number")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: must be a whole number of at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must lie above 0 and not above 1")
        if not isinstance(self.seed, int | np.integer) or not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}: must be a whole number between 0 and {2**32 - 1}")


class Sampler:
    """Draws genes for many sets at once, in batches of fixed shapes.

    A row's genes depend on its prompt, budget and seed alone. Among rows of one shape - prompt and budget rounded up to
    powers of two, and 1, 4, 16 or 64 rows (or 256) a device - they come from identical bits; another shape changes the
    last bits of the products, and so a gene only where two scores are nearly equal: within about 1e-4 in float32, which
    is used on CPUs. In bfloat16 more are: the genes of 2 prompts of 64 differed, at scores up to 9e-4 apart.

    Args:
        params: of the decoder.
        config: its shape.
        vocabulary_size: ids in the vocabulary.
        row_length: the row length it was built with; with learned positions no slot lies beyond.
        mesh: devices to spread the rows over, along its axis `data`; the default device unless given.
    """

    def __init__(
        self, params: Params, config: ModelConfig, vocabulary_size: int, row_length: int, mesh: Mesh | None = None
    ) -> None:
        self._shape = (config, vocabulary_size, row_length)
        self._rows_sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        self._num_shards = 1 if mesh is None else mesh.shape["data"]
        self._params = params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._batch_bytes = _BATCH_BYTES.get(platform, _BATCH_BYTES_ELSEWHERE)
        self._most_rows = 64 if platform == "cpu" else 256
        # The last batch's cache, donated to the next one of its shape.
        self._cache: Cache | None = None

    def draw(
        self,
        prompts: Sequence[np.ndarray],
        budgets: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        candidates_V: np.ndarray | None = None,
        visible: Sequence[np.ndarray] | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Draw genes for each set: none twice, none of its visible ones, no special id.

        Args:
            prompts: for each set the ids the model is shown.
            budgets: for each set how many genes to draw; fewer come back where the candidates or the set end.
            seeds: for each set a number from 0 to 2**32 - 1.
            sampling: how; its own seed is not used here.
            candidates_V: [V] bool, the genes that may be drawn; all unless given.
            visible: for each set the ids of its visible genes, where the prompt shows only a part of them.
            advance: called with the number of sets just done.

        Returns:
            For each set, in the order given: the drawn ids, int32, in the order drawn; and the probability of each,
            float32: its share, before anything was drawn, under the softmax of the scores over all candidates.
        """
        ids: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
        shares: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        allowed_V = self._allowed(candidates_V)
        if nothing_to_draw := sum(budget < 1 for budget in budgets):
            advance(nothing_to_draw)
        for members, length, most in self._batches(prompts, budgets):
            rows = row_bucket(len(members), self._num_shards)
            tokens_BT = np.full((rows, length), PAD, np.int32)
            tokens_BT[:, 0] = START
            # Rows of padding hold <start> alone and have nothing to draw.
            lengths_B, budgets_B = np.ones(rows, np.int32), np.zeros(rows, np.int32)
            seeds_B = np.zeros(rows, np.uint32)
            for row, index in enumerate(members):
                lengths_B[row] += len(prompts[index])
                tokens_BT[row, 1 : lengths_B[row]] = prompts[index]
                budgets_B[row], seeds_B[row] = budgets[index], seeds[index]
            visible_BP = tokens_BT
            if visible is not None:
                widest = max(length, power_of_two(max(len(visible[index]) for index in members)))
                visible_BP = np.full((rows, widest), PAD, np.int32)
                for row, index in enumerate(members):
                    visible_BP[row, : len(visible[index])] = visible[index]
            batch = (tokens_BT, visible_BP, lengths_B, budgets_B, seeds_B)
            drawn_BM, shares_BM, counts_B = self._run(batch, allowed_V, most, sampling)
            for row, index in enumerate(members):
                ids[index], shares[index] = drawn_BM[row, : counts_B[row]], shares_BM[row, : counts_B[row]]
            advance(len(members))
        return ids, shares

    def _batches(self, prompts: Sequence[np.ndarray], budgets: Sequence[int]) -> Iterator[tuple[list[int], int, int]]:
        buckets: dict[tuple[int, int], list[int]] = {}
        # By budget, so that the rows of a batch end together.
        for index in sorted(range(len(prompts)), key=lambda index: (budgets[index], index)):
            if budgets[index] < 1:
                continue
            length, most = power_of_two(len(prompts[index]) + 1), power_of_two(budgets[index])
            buckets.setdefault((max(length, _SHORTEST_PROMPT), max(most, _FEWEST_DRAWN)), []).append(index)
        for (length, most), members in sorted(buckets.items()):
            rows_at_once = self._rows_at_once(length, length + most)
            for start in range(0, len(members), rows_at_once):
                yield members[start : start + rows_at_once], length, most

    def _allowed(self, candidates_V: np.ndarray | None) -> np.ndarray:
        vocabulary_size = self._shape[1]
        allowed_V = np.zeros(padded_vocabulary_size(vocabulary_size), bool)
        allowed_V[NUM_SPECIAL:vocabulary_size] = True if candidates_V is None else candidates_V[NUM_SPECIAL:]
        return allowed_V

    def _rows_at_once(self, length: int, slots: int) -> int:
        config = self._shape[0]
        cached = 2 * config.num_layers * config.width * jnp.dtype(config.matmul_dtype).itemsize
        scored = 2 * 4 * config.num_heads * length
        rows = self._most_rows
        while rows > 1 and rows * slots * (cached + scored) > self._batch_bytes:
            rows //= 4
        return rows * self._num_shards

    def _run(
        self, batch: tuple[np.ndarray, ...], allowed_V: np.ndarray, most: int, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self._shape[0]
        rows, length = batch[0].shape
        cache, self._cache = self._cache, None
        if cache is None or (cache[0][0].shape[0], cache[0][0].shape[3]) != (rows, length + most):
            # Drop the old one first, so that never two are held.
            cache = None
            # Placed as the parameters are, so that the next call, with what this one gives back, compiles nothing new.
            place = self._rows_sharding or jax.tree.leaves(self._params)[0].sharding
            make = jax.jit(empty_cache, static_argnums=(0, 1, 2), out_shardings=place)
            cache = make(config, rows, length + most)
        greedy = sampling.temperature == 0
        options = _Options(most, 1 if greedy else min(int(sampling.top_k), len(allowed_V)), sampling.stop_at_end)
        warmth = np.array([1.0 if greedy else sampling.temperature, sampling.top_p], np.float32)
        if self._rows_sharding is not None:
            batch = jax.device_put(batch, self._rows_sharding)
        drawn_BM, shares_BM, counts_B, self._cache = _draw_rows(
            self._params, cache, *batch, allowed_V, warmth, self._shape, options
        )
        return np.asarray(drawn_BM), np.asarray(shares_BM), np.asarray(counts_B)


class _Options(NamedTuple):
    most: int
    top_k: int
    stop_at_end: bool


class _State(NamedTuple):
    position: jax.Array
    h_BD: jax.Array
    cache: Cache
    blocked_BV: jax.Array
    drawn_BM: jax.Array
    counts_B: jax.Array
    active_B: jax.Array


@functools.partial(jax.jit, static_argnames=("shape", "options"), donate_argnames="cache")
def _draw_rows(
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    visible_BP: jax.Array,
    lengths_B: jax.Array,
    budgets_B: jax.Array,
    seeds_B: jax.Array,
    allowed_V: jax.Array,
    warmth: jax.Array,
    shape: tuple[ModelConfig, int, int],
    options: _Options,
) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    decoder = merge(*shape, params)
    rows, length = tokens_BT.shape
    index_B, index_T, index_S = (jnp.arange(size) for size in (rows, length, length + options.most))
    prompt_BS = index_S < lengths_B[:, None]
    keys_B = jax.vmap(jax.random.key)(seeds_B)

    visible_BTS = prompt_BS[:, None] & (index_S <= index_T[:, None])
    h_BTD, cache = decoder.extend(tokens_BT, jnp.broadcast_to(index_T, tokens_BT.shape), visible_BTS, 0, cache)
    h_BD = h_BTD[index_B, lengths_B - 1]
    blocked_BV = jnp.broadcast_to(~allowed_V, (rows, len(allowed_V))).at[index_B[:, None], visible_BP].set(True)
    first_BV = jnp.where(blocked_BV, -jnp.inf, decoder.logits(h_BD))
    if options.stop_at_end:
        blocked_BV = blocked_BV.at[:, END].set(False)

    def draw_one(state: _State) -> _State:
        scores_BV = jnp.where(state.blocked_BV, -jnp.inf, decoder.logits(state.h_BD))
        top_BK, ids_BK = highest(scores_BV, options.top_k)
        keys_now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.position)
        genes_B = jnp.take_along_axis(ids_BK, _choose(top_BK, keys_now_B, warmth)[:, None], axis=1)[:, 0]
        taken_B = state.active_B & jnp.isfinite(top_BK[:, 0]) & (genes_B != END)
        counts_B = state.counts_B + taken_B
        # Drawn genes take the slots after the longest prompt, in all rows the same ones.
        slot = length + state.position
        visible_BS = prompt_BS | ((index_S >= length) & (index_S <= slot))
        offsets_B = lengths_B + state.position
        h_B1D, cache = decoder.extend(genes_B[:, None], offsets_B[:, None], visible_BS[:, None], slot, state.cache)
        return _State(
            state.position + 1,
            h_B1D[:, 0],
            cache,
            state.blocked_BV.at[index_B, genes_B].set(True),
            state.drawn_BM.at[:, state.position].set(jnp.where(taken_B, genes_B, PAD)),
            counts_B,
            taken_B & (counts_B < budgets_B),
        )

    nothing_BM, none_B = jnp.zeros((rows, options.most), jnp.int32), jnp.zeros(rows, jnp.int32)
    start = _State(jnp.int32(0), h_BD, cache, blocked_BV, nothing_BM, none_B, budgets_B > 0)
    end = jax.lax.while_loop(lambda state: state.active_B.any(), draw_one, start)
    log_total_B1 = jax.nn.logsumexp(first_BV, axis=1, keepdims=True)
    shares_BM = jnp.exp(jnp.take_along_axis(first_BV, end.drawn_BM, axis=1) - log_total_B1)
    return end.drawn_BM, shares_BM, end.counts_B, end.cache


def highest(values_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Find the `count` highest values of each row and their places, as `jax.lax.top_k` does, equal ones included.

    Of the blocks that a row falls into only the `count` with the highest maxima can hold them: any other value has
    `count` values before it. So the whole row is only reduced, and sorted are the maxima and those blocks.

    Args:
        values_BV: float32; -inf is a value as any other.
        count: K, from 1 to V.

    Returns:
        values_BK, falling, the lower place first where they are equal, and places_BK, int32.
    """
    rows, size = values_BV.shape
    if size % _BLOCK or 4 * count * _BLOCK > size:
        return _top(values_BV, count)
    blocks = values_BV.reshape(rows, size // _BLOCK, _BLOCK)
    # In the order of their places again, so that equal values stay in it.
    chosen_BK = jnp.sort(jax.lax.top_k(blocks.max(axis=2), count)[1], axis=1)
    within = jnp.take_along_axis(blocks, chosen_BK[:, :, None], axis=1).reshape(rows, count * _BLOCK)
    top_BK, places_BK = _top(within, count)
    return top_BK, jnp.take_along_axis(chosen_BK, places_BK // _BLOCK, axis=1) * _BLOCK + places_BK % _BLOCK


def _top(values_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # The barrier keeps XLA's CPU backend from taking what is cut out of the result for a reason to sort the whole row.
    return jax.lax.optimization_barrier(jax.lax.top_k(values_BV, count))


def _choose(top_BK: jax.Array, keys_B: jax.Array, warmth: jax.Array) -> jax.Array:
    rows, count = top_BK.shape
    if count == 1:
        return jnp.zeros(rows, jnp.int32)
    temperature, top_p = warmth
    scaled_BK = top_BK / temperature
    shares_BK = jax.nn.softmax(scaled_BK, axis=1)
    # The gene that crosses the share still counts, so the first one always does.
    nucleus_BK = jnp.cumsum(shares_BK, axis=1) - shares_BK < top_p
    gumbel_BK = jax.vmap(lambda key: jax.random.gumbel(key, (count,)))(keys_B)
    return jnp.argmax(jnp.where(nucleus_BK, scaled_BK + gumbel_BK, -jnp.inf), axis=1)
