"""Matrix products: operands in the type of the run, sums in float32, gradients of parameters in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

# What `jax.checkpoint` can be told to keep of a block.
PRODUCT = "product"


def contract(subscripts: str, a: jax.Array, b: jax.Array, out: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Return `jnp.einsum(subscripts, a, b)` of two arrays of one type, summed in float32 and returned as `out`.

    Float32 operands keep all their bits: accelerators would round them unless told not to.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, subscripts, precision=precision)
    if out == jnp.float32 or a.dtype == jnp.float32:
        return product(a, b, preferred_element_type=jnp.float32).astype(out)
    # On a CPU, XLA multiplies bfloat16 into float32 twice to four times as fast as into bfloat16.
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: product(a, b, preferred_element_type=jnp.float32).astype(out),
        default=lambda a, b: product(a, b, preferred_element_type=out),
    )


def rounded(x: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """Return a float32 array in another type, rounded to nearest even; only for functions that define their gradient.

    A CPU would find it zero, without an error. It takes a quarter to a half of the time of XLA's own rounding, but more
    where XLA fuses it into a transposition.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    return jax.lax.platform_dependent(x, cpu=_upper_half, default=lambda x: x.astype(dtype))


def _upper_half(x: jax.Array) -> jax.Array:
    # A NaN of arithmetic stays one: it has no low bits that could carry over into the sign.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    nearest = bits + (0x7FFF + ((bits >> 16) & 1))
    return jax.lax.bitcast_convert_type((nearest >> 16).astype(jnp.uint16), jnp.bfloat16)


def sum_of_outer(a_PK: jax.Array, b_PN: jax.Array) -> jax.Array:
    """Return the sum over P of the outer products of a and b, KN float32: the gradient of a kernel."""
    return jax.lax.platform_dependent(
        a_PK, b_PN, cpu=_turned_sum_of_outer, default=functools.partial(contract, "PK,PN->KN")
    )


def _turned_sum_of_outer(a_PK: jax.Array, b_PN: jax.Array) -> jax.Array:
    if a_PK.shape[1] > b_PN.shape[1]:
        return _turned_sum_of_outer(b_PN, a_PK).T
    return in_row_order(contract("KP,PN->KN", in_row_order(a_PK.T), in_row_order(b_PN)))


def in_row_order(x: jax.Array) -> jax.Array:
    """Return x as it is, on a CPU held in memory with its last axis contiguous.

    XLA's fast products on a CPU sum over the last axis of the left operand. Left free, XLA takes a transposition before
    a product back, falls to a slow one, and multiplies bfloat16 as float32. Among several devices a barrier stands
    instead, which keeps the transposition alone: a given layout was seen to make XLA gather an array on all of them.
    """
    if jax.device_count() > 1:
        return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    order = Layout(major_to_minor=tuple(range(x.ndim)))
    return jax.lax.platform_dependent(x, cpu=lambda x: with_layout_constraint(x, order), default=lambda x: x)


@jax.custom_vjp
def linear(x_PK: jax.Array, kernel_KN: jax.Array) -> jax.Array:
    """Return x @ kernel, PN in the type of x; the kernel is float32 and so is its gradient."""
    return _linear_forward(x_PK, kernel_KN)[0]


def _linear_forward(x_PK: jax.Array, kernel_KN: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    operand_KN = kernel_KN.astype(x_PK.dtype)
    product_PN = checkpoint_name(contract("PK,KN->PN", x_PK, operand_KN, x_PK.dtype), PRODUCT)
    return product_PN, (x_PK, operand_KN)


def _linear_backward(saved: tuple[jax.Array, jax.Array], d_PN: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_PK, operand_KN = saved
    return contract("PN,KN->PK", d_PN, operand_KN, x_PK.dtype), sum_of_outer(x_PK, d_PN)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Return the GELU (tanh form, Hendrycks & Gimpel 2016), computed in float32 and rounded once to the type of x.

    Its gradient is computed from x again, which is all that an accelerator keeps.
    """
    return rounded(jax.nn.gelu(x.astype(jnp.float32)), x.dtype)


def _gelu_backward(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    # Without a barrier XLA keeps the float32 tanh of the forward pass. That costs an accelerator memory and saves a CPU
    # time.
    x = jax.lax.platform_dependent(x, cpu=lambda x: x, default=jax.lax.optimization_barrier)
    _, pull = jax.vjp(jax.nn.gelu, x.astype(jnp.float32))
    return (rounded(pull(d.astype(jnp.float32))[0], x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
