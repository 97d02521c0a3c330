"""Products and what stands between them, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcc_jax.model.products import gelu, sum_of_outer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 3, 8), (64, 32, 100), (64, 100, 32), (31, 1, 129)])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_sum_of_outer_products_keeps_float32_sums(shape, dtype, devices, monkeypatch):
    # Alone, a device gives its operands a layout.
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    positions, rows, columns = shape
    random = np.random.default_rng(0)
    a_PK, b_PN = (jnp.asarray(random.normal(size=(positions, size)), dtype) for size in (rows, columns))
    expected = np.asarray(a_PK, np.float64).T @ np.asarray(b_PN, np.float64)
    product_KN = jax.jit(sum_of_outer)(a_PK, b_PN)
    assert product_KN.dtype == jnp.float32
    np.testing.assert_allclose(product_KN, expected, rtol=1e-5, atol=1e-5)
    # Where the result is turned again, XLA may move its layout back to the operands.
    np.testing.assert_allclose(jax.jit(lambda a, b: sum_of_outer(a, b).T)(a_PK, b_PN), expected.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_slope_are_rounded_once(dtype):
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    exact, slope = np.asarray(x, np.float64), np.sqrt(2 / np.pi)
    tanh = np.tanh(slope * (exact + 0.044715 * exact**3))
    expected = 0.5 * exact * (1 + tanh)
    expected_slope = 0.5 * (1 + tanh) + 0.5 * exact * (1 - tanh**2) * slope * (1 + 3 * 0.044715 * exact**2)
    value, pull = jax.vjp(gelu, x)
    (gradient,) = pull(jnp.ones_like(x))
    assert value.dtype == gradient.dtype == x.dtype
    # In the tail 1 + tanh keeps the bits of 1, six times half a bit of which is 4e-7; its slope is ten times as steep.
    error = 2**-8 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=error, atol=4e-6)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected_slope, rtol=error, atol=4e-6)
