"""Products and what stands between them, against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tcc_jax.model.products import gelu, rounded, sum_of_outer


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


def test_float32_is_rounded_to_the_nearest_bfloat16_ties_to_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    # Ties, and their neighbours; the largest numbers, which round to infinity; the smallest ones.
    halves = (bits[:1000] & 0xFFFF0000) | 0x8000
    bits = np.concatenate([bits, halves - 1, halves, halves + 1, [0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000000, 0x80008001]])
    numbers = bits.astype(np.uint32).view(np.float32)
    numbers = np.concatenate([numbers[~np.isnan(numbers)], np.float32([np.inf, -np.inf, np.nan, -np.nan])])
    found = np.asarray(jax.jit(lambda x: rounded(x, jnp.bfloat16))(numbers))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(found), np.signbit(numbers))
    # What arithmetic makes of numbers that are none.
    assert np.isnan(jax.jit(lambda x: rounded(x - x, jnp.bfloat16))(np.float32([np.inf, np.nan]))).all()
    assert rounded(jnp.ones(3), jnp.float32).dtype == jnp.float32


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
