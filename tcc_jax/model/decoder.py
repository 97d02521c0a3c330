"""The decoder: a pre-norm transformer over packed rows of genes, with tied embeddings.

It knows shapes and no mesh. `split` and `merge` take it apart into a function and a tree of arrays and back, so that
training and completion run plain `jax.jit` over arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcc_jax.config import ModelConfig
from tcc_jax.model.attention import MASKED, attend, attend_visible, segment_offsets, visible_from
from tcc_jax.model.products import PRODUCT, contract, gelu, linear

# What the model has to know of the special ids; tests hold it to tcc_jax.corpus.vocabulary.
END = 2
NUM_SPECIAL = 16

_INIT_SCALE = 0.02
_NORM_EPSILON = 1e-6
_ROPE_BASE = 10_000.0
# Where a decoder starts from given directions, its logits are the cosines times this, beside the bias. Of 6 to 20 this
# was best (benchmarks/ABLATION.md).
_COSINE_FACTOR = 10.0

Params = dict

Cache = list[tuple[jax.Array, jax.Array]]
"""For each block the keys k_BNHS and values v_BNHS of S slots, in the type of the matrix products."""

# What a block does with its queries, keys and values [BTNH]: attention within segments, or to a cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Execution:
    """How a forward pass over packed rows is computed; what it computes stays the same.

    Attributes:
        attend: a function with the meaning of `tcc_jax.model.attention.attend`.
        remat: what the backward pass computes again instead of keeping it: nothing, all but the outputs of matrix
            products, or all inside a block.
        scan_layers: run the blocks in one loop, their parameters stacked as they are used.
        place: called on the residual stream BTD between blocks, to pin where it lies.
    """

    attend: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] = attend
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = False
    place: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD


_REMAT_POLICIES = {"dots": jax.checkpoint_policies.save_only_these_names(PRODUCT), "full": None}


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Pre-norm blocks as in GPT-2 (Radford et al. 2019) with its initialisation (0.02, residual projections over
    sqrt(2 L)), RMSNorm (Zhang & Sennrich 2019), no biases but the output's, and optionally learned positions or rotary
    ones (Su et al. 2021), counted from the start of each segment.

    Args:
        config: shape of the model.
        vocabulary_size: ids in the vocabulary, the special ones included; padded to a multiple of 128 inside.
        row_length: the longest row it will see; only learned positions depend on it.
        rngs: source of the initial parameters (its `params` stream).
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int, row_length: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vocabulary_size = vocabulary_size
        width, padded_size = config.width, padded_vocabulary_size(vocabulary_size)
        self.embedding = _normal(rngs, (padded_size, width))
        self.output_bias = nnx.Param(jnp.zeros(padded_size, jnp.float32))
        if config.position == "learned":
            self.position_embedding = _normal(rngs, (row_length, width))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(width)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        dropout_key: jax.Array | None = None,
        execution: Execution | None = None,
        positions_BC: jax.Array | None = None,
    ) -> jax.Array:
        """Run the decoder up to and including the final norm.

        Args:
            tokens_BT: int32 ids, 0 for padding.
            segments_BT: int32, 0 for padding, else the segment's number.
            dropout_key: a JAX key turns dropout on at the configured rate; None turns it off.
            execution: how; None computes in the plainest way.
            positions_BC: int32, the positions of each row whose hidden states are wanted; None wants all. For a few of
                them the last block costs little more than its keys and values; its attention is then plain XLA.

        Returns:
            h_BCD, or h_BTD of all positions, float32. Padding has hidden states too, for the loss to leave out.
        """
        execution = execution or Execution()
        offsets_BT = segment_offsets(segments_BT)
        embedding_key, *block_keys = _keys(dropout_key, self.config.num_layers + 1)
        x_BTD = execution.place(self._embed(tokens_BT, offsets_BT, embedding_key))
        # A block is taken apart into its structure, which all share, and its arrays, so that one function runs any.
        graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

        def run_block(x_BTD: jax.Array, inputs: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
            state, key = inputs
            block = nnx.merge(graphs[0], state)

            def attend_layer(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
                return execution.attend(q_BTNH, k_BTNH, v_BTNH, segments_BT)

            return execution.place(block(x_BTD, attend_layer, offsets_BT, key)), None

        if execution.remat != "none":
            run_block = jax.checkpoint(run_block, policy=_REMAT_POLICIES[execution.remat])
        layers = list(zip(states, block_keys, strict=True))
        whole = layers if positions_BC is None else layers[:-1]
        if execution.scan_layers and whole:
            x_BTD, _ = jax.lax.scan(run_block, x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *whole))
        else:
            for layer in whole:
                x_BTD, _ = run_block(x_BTD, layer)
        if positions_BC is None:
            return self.final_norm(x_BTD)
        visible_BCT = visible_from(segments_BT, positions_BC)

        def attend_positions(q_BCNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
            return attend_visible(q_BCNH, k_BTNH, v_BTNH, visible_BCT)

        return self.final_norm(self.blocks[-1](x_BTD, attend_positions, offsets_BT, block_keys[-1], positions_BC))

    def extend(
        self, tokens_BT: jax.Array, offsets_BT: jax.Array, visible_BTS: jax.Array, slot: jax.Array | int, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run the decoder over new tokens that see those of a cache and each other: a whole prompt, or one more gene.

        Args:
            tokens_BT: int32 ids of the new tokens.
            offsets_BT: int32, the place of each in its set, `<start>` being 0; only position codes need it.
            visible_BTS: bool, the slots each new token sees, its own among them.
            slot: the first of the T slots that take the new tokens' keys and values, the same in every row.
            cache: what the slots hold so far; what no token sees may be anything finite.

        Returns:
            h_BTD after the final norm, float32, and the new cache, of the same shapes.
        """
        new_cache: Cache = []
        x_BTD = self._embed(tokens_BT, offsets_BT, None)
        for block, old_BNHS in zip(self.blocks, cache, strict=True):

            def attend_to_cache(
                q_BTNH: jax.Array, *new_BTNH: jax.Array, old_BNHS: tuple[jax.Array, jax.Array] = old_BNHS
            ) -> jax.Array:
                # Slots last, as the products want them: otherwise XLA transposes the whole cache for every gene.
                k_BNHS, v_BNHS = (
                    jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, 3), slot, axis=3)
                    for old, new in zip(old_BNHS, new_BTNH, strict=True)
                )
                new_cache.append((k_BNHS, v_BNHS))
                return attend_visible(q_BTNH, jnp.moveaxis(k_BNHS, 3, 1), jnp.moveaxis(v_BNHS, 3, 1), visible_BTS)

            x_BTD = block(x_BTD, attend_to_cache, offsets_BT, None)
        return self.final_norm(x_BTD), new_cache

    def _embed(self, tokens_BT: jax.Array, offsets_BT: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        x_BTD = self.embedding[tokens_BT]
        if self.config.position == "learned":
            x_BTD = x_BTD + self.position_embedding[offsets_BT]
        return _dropout(x_BTD, self.config.dropout, dropout_key).astype(self.config.residual_dtype)

    def logits(self, h: jax.Array) -> jax.Array:
        """Score every id from the final hidden states: [.., D] -> [.., V_padded] float32.

        Padding ids and special ids other than <end> get a very low constant: no probability and no gradient.
        """
        dtype = jnp.dtype(self.config.matmul_dtype)
        return contract("...D,VD->...V", h.astype(dtype), self.embedding[...].astype(dtype)) + self.masked_bias()

    def masked_bias(self) -> jax.Array:
        """Return the output bias, [V_padded] float32, with a very low constant at ids that can never be proposed."""
        # Added to a logit the constant swallows it, so masking costs V additions and not one per logit.
        return jnp.where(proposable_ids(self.vocabulary_size), self.output_bias[...], MASKED)


class Block(nnx.Module):
    """Attention, then a GELU feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config, rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        attend_layer: Attend,
        offsets_BT: jax.Array,
        dropout_key: jax.Array | None,
        positions_BC: jax.Array | None = None,
    ) -> jax.Array:
        """Return the residual stream after the block, in its own type: BTD, or BCD of some positions."""
        dropout_keys = _keys(dropout_key, 2)
        branch_BCD = self.attention(self.attention_norm(x_BTD), attend_layer, offsets_BT, positions_BC)
        x_BCD = take_positions(x_BTD, positions_BC)
        # Summed in the types they have: with float32 in between, XLA was seen to keep that in memory.
        x_BCD = (x_BCD + _dropout(branch_BCD, self.dropout, dropout_keys[0])).astype(x_BTD.dtype)
        branch_BCD = self.feed_forward(self.feed_forward_norm(x_BCD))
        return (x_BCD + _dropout(branch_BCD, self.dropout, dropout_keys[1])).astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Multi-head attention: the projections around what `Attend` does."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, config.matmul_dtype
        self.num_heads = config.num_heads
        self.rotary = config.position == "rope"
        self.query = Linear(width, width, dtype, rngs)
        self.key = Linear(width, width, dtype, rngs)
        self.value = Linear(width, width, dtype, rngs)
        self.output = Linear(width, width, dtype, rngs, scale=_residual_scale(config))

    def __call__(
        self, x_BTD: jax.Array, attend_layer: Attend, offsets_BT: jax.Array, positions_BC: jax.Array | None = None
    ) -> jax.Array:
        """Return BTD in the type of the matrix products, or BCD where only some positions ask."""
        x_BCD = take_positions(x_BTD, positions_BC)
        q_BCNH, k_BTNH, v_BTNH = (
            layer(x).reshape(*x.shape[:2], self.num_heads, -1)
            for layer, x in ((self.query, x_BCD), (self.key, x_BTD), (self.value, x_BTD))
        )
        if self.rotary:
            q_BCNH = _rotate(q_BCNH, take_positions(offsets_BT, positions_BC))
            k_BTNH = _rotate(k_BTNH, offsets_BT)
        return self.output(attend_layer(q_BCNH, k_BTNH, v_BTNH).reshape(x_BCD.shape))


class FeedForward(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        hidden_width, dtype = config.hidden_width or 4 * config.width, config.matmul_dtype
        self.expand = Linear(config.width, hidden_width, dtype, rngs)
        self.contract = Linear(hidden_width, config.width, dtype, rngs, scale=_residual_scale(config))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return BTD in the type of the matrix products."""
        return self.contract(gelu(self.expand(x_BTD)))


class Linear(nnx.Module):
    """A linear layer without a bias: float32 kernel [in, out], product in `dtype`."""

    def __init__(self, in_width: int, out_width: int, dtype: str, rngs: nnx.Rngs, scale: float = _INIT_SCALE) -> None:
        self.dtype = jnp.dtype(dtype)
        self.kernel = _normal(rngs, (in_width, out_width), scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [.., out] in `dtype`."""
        # As a matrix: over two leading axes XLA's CPU backend takes twice as long, forward and back.
        matrix = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        return linear(matrix, self.kernel[...]).reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the width, then a learned scale, in float32."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normed array, same shape, float32."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + _NORM_EPSILON) * self.scale[...]


def take_positions(x: jax.Array, positions_BC: jax.Array | None) -> jax.Array:
    """Return the given positions of each row, BT.. to BC..; None keeps all."""
    if positions_BC is None:
        return x
    return jnp.take_along_axis(x, positions_BC.reshape(*positions_BC.shape, *[1] * (x.ndim - 2)), axis=1)


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
    """Return a cache of zeros for `rows` rows of `slots` positions."""
    shape = (rows, config.num_heads, config.width // config.num_heads, slots)
    dtype = jnp.dtype(config.matmul_dtype)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


def split(decoder: Decoder) -> Params:
    """Return a decoder's parameters as nested dicts of float32 arrays (`blocks` is keyed by layer number)."""
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


def merge(config: ModelConfig, vocabulary_size: int, row_length: int, params: Params) -> Decoder:
    """Return the decoder that holds `params`, concrete or traced, as given by `split` or read from a checkpoint.

    Cheap enough to call inside every traced function: the decoder is built from shapes alone.
    """
    return nnx.merge(nnx.graphdef(_abstract(config, vocabulary_size, row_length)), params)


def initial_params(config: ModelConfig, vocabulary_size: int, row_length: int, key: jax.Array) -> Params:
    """Return fresh parameters, a pure function of `key`."""
    return split(Decoder(config, vocabulary_size, row_length, nnx.Rngs(params=key)))


def start_from_vectors(params: Params, vectors_VD: jax.Array) -> Params:
    """Return initial parameters that complete a set by the mean direction of its genes.

    Embeddings take the directions given, at the length they have on average. Queries and keys are near zero at the
    start, so that attention is even; with values and output of the first block at the identity it adds the mean of the
    prompt's embeddings to the residual stream, and the tied output finds the genes that point the same way. The scale
    of the final norm makes their logits differ enough to tell a few genes from tens of thousands.

    Args:
        params: as made by `initial_params`.
        vectors_VD: [V, D] unit vectors; a zero vector leaves an id as it is.
    """
    embedding_VD = params["embedding"]
    size, width = vectors_VD.shape
    known_V1 = jnp.any(vectors_VD != 0, axis=1, keepdims=True)
    scaled_VD = _INIT_SCALE * width**0.5 * vectors_VD
    embedding_VD = embedding_VD.at[:size].set(jnp.where(known_V1, scaled_VD, embedding_VD[:size]))
    first = params["blocks"][0]
    identity_DD = jnp.eye(width, dtype=embedding_VD.dtype)
    attention = first["attention"] | {name: {"kernel": identity_DD} for name in ("value", "output")}
    blocks = params["blocks"] | {0: first | {"attention": attention}}
    # A logit is the cosine times the scale times the lengths of both sides, sqrt(D) and scale x sqrt(D).
    # Of a type of its own: a weak one would change in the first step, and the step be compiled again.
    scale = jnp.full(width, _COSINE_FACTOR / (_INIT_SCALE * width), embedding_VD.dtype)
    return params | {"embedding": embedding_VD, "blocks": blocks, "final_norm": {"scale": scale}}


def abstract_params(config: ModelConfig, vocabulary_size: int, row_length: int) -> Params:
    """Return the parameters' shapes and types (`jax.ShapeDtypeStruct`), without making any array."""
    return split(_abstract(config, vocabulary_size, row_length))


def count_parameters(params: Params) -> int:
    """Return the number of parameters, the padding of the vocabulary included."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def padded_vocabulary_size(vocabulary_size: int) -> int:
    """Return the vocabulary size rounded up to a multiple of 128, the lane width of accelerators."""
    return -(-vocabulary_size // 128) * 128


def proposable_ids(vocabulary_size: int) -> np.ndarray:
    """Return [V_padded] bool: true for genes and <end>, the ids that a prefix can be followed by."""
    ids_V = np.arange(padded_vocabulary_size(vocabulary_size))
    return (ids_V == END) | ((ids_V >= NUM_SPECIAL) & (ids_V < vocabulary_size))


def _abstract(config: ModelConfig, vocabulary_size: int, row_length: int) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, vocabulary_size, row_length, nnx.Rngs(0)))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = _INIT_SCALE) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def _residual_scale(config: ModelConfig) -> float:
    return _INIT_SCALE / (2 * config.num_layers) ** 0.5


def _keys(key: jax.Array | None, count: int) -> list[jax.Array] | list[None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _rotate(x_BTNH: jax.Array, offsets_BT: jax.Array) -> jax.Array:
    half = x_BTNH.shape[-1] // 2
    frequency_H = _ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTNH = offsets_BT[:, :, None, None] * frequency_H
    cos, sin = jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTNH.dtype)
