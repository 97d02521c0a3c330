"""Attention over packed rows: a token sees the tokens of its own segment up to itself, and nothing of its neighbours.

`attend` says what is meant, in plain XLA; the kernels in kernels.py that compute the same are tested against it.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from tcc_jax.model.products import contract, in_row_order

# Finite, so that a row without any visible key gives a plain number and not NaN, and so low that exp() of it is 0.
MASKED = -1e30

_SMALLEST_BLOCK, _MOST_BLOCKS = 64, 8


@jax.custom_vjp
def attend(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Causal attention within segments, softmax in float32.

    Args:
        q_BTNH: queries, any float type; products take this type and accumulate in float32.
        k_BSNH: keys of the same positions (S = T).
        v_BSNH: values of the same positions.
        segments_BT: int32, the number of the segment a position belongs to. Padding, 0, is a segment like any other:
            to blank out what it gives, which nobody reads, would be one more pass over every row.

    Returns:
        BTNH in the type of the queries. What other segments hold must be finite: 0 times it is added up.
    """
    return _attend_forward(q_BTNH, k_BSNH, v_BSNH, segments_BT)[0]


def _attend_forward(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    blocks = []
    for queries, keys in _blocks(q_BTNH.shape[1]):
        visible_BTS = segments_BT[:, queries, None] == segments_BT[:, None, keys]
        visible_BTS &= jnp.tri(queries.stop - queries.start, keys.stop, queries.start, dtype=bool)
        blocks.append(_attend_visible(q_BTNH[:, queries], k_BSNH[:, keys], v_BSNH[:, keys], visible_BTS))
    mixed_BTNH = jnp.concatenate([mixed_BTNH for _, mixed_BTNH in blocks], axis=1).astype(q_BTNH.dtype)
    return mixed_BTNH, (q_BTNH, k_BSNH, v_BSNH, blocks)


def _attend_backward(saved: tuple[Any, ...], d_BTNH: jax.Array) -> tuple:
    q_BTNH, k_BSNH, v_BSNH, blocks = saved
    length, dtype = d_BTNH.shape[1], d_BTNH.dtype

    def in_one(d_blocks: tuple[jax.Array, ...]) -> jax.Array:
        padded = (jnp.pad(d_BNHS, [(0, 0)] * 3 + [(0, length - d_BNHS.shape[3])]) for d_BNHS in d_blocks)
        # Summed up before they are turned: XLA's CPU backend would look up each number of each block on its own.
        return jnp.moveaxis(in_row_order(functools.reduce(jnp.add, padded)), 3, 1).astype(dtype)

    gradients = [
        _gradients(d_BTNH[:, queries], q_BTNH[:, queries], k_BSNH[:, keys], v_BSNH[:, keys], *block)
        for (queries, keys), block in zip(_blocks(length), blocks, strict=True)
    ]
    d_queries, d_keys, d_values = zip(*gradients, strict=True)
    return jnp.concatenate(d_queries, axis=1).astype(dtype), in_one(d_keys), in_one(d_values), None


attend.defvjp(_attend_forward, _attend_backward)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Return queries in blocks, each with the keys up to its end: with eight, little over half of the scores."""
    size = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    bounds = [*range(0, length, size), length]
    return [(slice(start, end), slice(0, end)) for start, end in itertools.pairwise(bounds)]


@jax.custom_vjp
def attend_visible(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Attention over the keys that a mask allows, softmax in float32: BTNH in the type of the queries.

    Its gradient is that of FlashAttention (Dao et al. 2022), with the weights kept: fewer passes over the scores than
    autodiff makes.

    Args:
        q_BTNH: queries, any float type; products take this type and accumulate in float32.
        k_BSNH: keys, such as those of a cache.
        v_BSNH: values of the same positions.
        visible_BTS: bool, which keys a query sees. One that sees none gives the mean of all values.
    """
    return _attend_visible_forward(q_BTNH, k_BSNH, v_BSNH, visible_BTS)[0]


def _attend_visible(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_BTS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the weights BNTS, in the type of the queries, and the values they mix, BTNH float32."""
    scores_BNTS = contract("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * q_BTNH.shape[3] ** -0.5
    scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    return weights_BNTS, contract("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


def _attend_visible_forward(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_BTS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    weights_BNTS, mixed_BTNH = _attend_visible(q_BTNH, k_BSNH, v_BSNH, visible_BTS)
    return mixed_BTNH.astype(q_BTNH.dtype), (q_BTNH, k_BSNH, v_BSNH, weights_BNTS, mixed_BTNH)


def _attend_visible_backward(saved: tuple[jax.Array, ...], d_BTNH: jax.Array) -> tuple:
    dtype = d_BTNH.dtype
    d_q_BTNH, d_k_BNHS, d_v_BNHS = _gradients(d_BTNH, *saved)
    d_k_BSNH, d_v_BSNH = (jnp.moveaxis(d_BNHS, 3, 1).astype(dtype) for d_BNHS in (d_k_BNHS, d_v_BNHS))
    return d_q_BTNH.astype(dtype), d_k_BSNH, d_v_BSNH, None


def _gradients(
    d_BTNH: jax.Array,
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    weights_BNTS: jax.Array,
    mixed_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries BTNH, keys BNHS and values BNHS, float32."""
    # The mean of the weights' gradients, weighted by the weights, without going over them.
    mean_BNT1 = jnp.swapaxes(jnp.sum(d_BTNH * mixed_BTNH, axis=-1, keepdims=True), 1, 2)
    d_weights_BNTS = contract("BTNH,BSNH->BNTS", d_BTNH, v_BSNH)
    scale = q_BTNH.shape[3] ** -0.5
    d_scores_BNTS = (weights_BNTS * (d_weights_BNTS - mean_BNT1) * scale).astype(q_BTNH.dtype)
    return (
        contract("BNTS,BSNH->BTNH", d_scores_BNTS, k_BSNH),
        contract("BTNH,BNTS->BNHS", q_BTNH, d_scores_BNTS),
        contract("BTNH,BNTS->BNHS", d_BTNH, weights_BNTS),
    )


attend_visible.defvjp(_attend_visible_forward, _attend_visible_backward)


def visible_from(segments_BT: jax.Array, positions_BC: jax.Array) -> jax.Array:
    """Return what each of the given positions sees, BCT bool: its segment up to itself."""
    own_BC1 = jnp.take_along_axis(segments_BT, positions_BC, axis=1)[:, :, None]
    before_BCT = jnp.arange(segments_BT.shape[1]) <= positions_BC[:, :, None]
    return (own_BC1 == segments_BT[:, None, :]) & before_BCT


def segment_offsets(segments_BT: jax.Array) -> jax.Array:
    """Return each position's place in its own segment, BT int32: 0 at its first token."""
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    is_first_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, index_T, 0), axis=1)
    return index_T - first_BT
