"""Matrix products: operands in the type of the run, sums in float32, gradients of parameters in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# What `jax.checkpoint` can be told to keep of a block.
PRODUCT = "product"


def contract(subscripts: str, a: jax.Array, b: jax.Array, out: jnp.dtype | type = jnp.float32) -> jax.Array:
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


def sum_of_outer(a_PK: jax.Array, b_PN: jax.Array) -> jax.Array:
    """Return the sum over P of the outer products of a and b, KN float32: the gradient of a kernel."""
    return jax.lax.platform_dependent(
        a_PK, b_PN, cpu=_turned_sum_of_outer, default=functools.partial(contract, "PK,PN->KN")
    )


def _turned_sum_of_outer(a_PK: jax.Array, b_PN: jax.Array) -> jax.Array:
    # XLA's fast products on a CPU sum over the columns of the left operand. Turn the smaller one, behind a barrier: XLA
    # would take the transposition back.
    if a_PK.shape[1] > b_PN.shape[1]:
        return jax.lax.optimization_barrier(_turned_sum_of_outer(b_PN, a_PK)).T
    return contract("KP,PN->KN", jax.lax.optimization_barrier(a_PK.T), b_PN)


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
