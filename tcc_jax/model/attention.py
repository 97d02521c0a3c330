"""Attention over packed rows: a token sees the tokens of its own segment up to itself, and nothing of its neighbours.

`attend` says what is meant, in plain XLA; the kernels in kernels.py that compute the same are tested against it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row without any visible key gives a plain number and not NaN, and so low that exp() of it is 0.
MASKED = -1e30


def attend(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Causal attention within segments, softmax in float32.

    Args:
        q_BTNH: queries, any float type; products take this type and accumulate in float32.
        k_BSNH: keys of the same positions (S = T).
        v_BSNH: values of the same positions.
        segments_BT: int32, 0 for padding, else the number of the segment a position belongs to.

    Returns:
        BTNH in the type of the queries. Padding gives zeros, and takes and sends no gradient; what it holds has no
        effect as long as it is finite (a weight of zero times NaN is NaN).
    """
    length = q_BTNH.shape[1]
    real_BT = segments_BT > 0
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & real_BT[:, :, None]
    mixed_BTNH = attend_visible(q_BTNH, k_BSNH, v_BSNH, same_BTS & jnp.tri(length, dtype=bool))
    return jnp.where(real_BT[:, :, None, None], mixed_BTNH, 0)


def attend_visible(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Attention over the keys that a mask allows, softmax in float32: BTNH in the type of the queries.

    Args:
        q_BTNH: queries, any float type; products take this type and accumulate in float32.
        k_BSNH: keys, such as those of a cache.
        v_BSNH: values of the same positions.
        visible_BTS: bool, which keys a query sees. One that sees none gives the mean of all values.
    """
    precision = product_precision(q_BTNH.dtype)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32, precision=precision)
    scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS * q_BTNH.shape[3] ** -0.5, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision=precision)


def segment_offsets(segments_BT: jax.Array) -> jax.Array:
    """Return each position's place in its own segment, BT int32: 0 at its first token."""
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    is_first_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, index_T, 0), axis=1)
    return index_T - first_BT


def product_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Return the precision of a product: accelerators would round float32 operands to fewer bits unless told not to."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
