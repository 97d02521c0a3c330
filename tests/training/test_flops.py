from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tcc_jax.config import Config, ModelConfig, ObjectiveConfig, TrainingConfig
from tcc_jax.model.decoder import abstract_params
from tcc_jax.training.flops import flops_per_token, peak_flops

CONFIG = Config(
    model=ModelConfig(num_layers=3, width=64, num_heads=4, hidden_width=160),
    training=TrainingConfig(row_length=32, segments_per_row=4),
)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("TPU v6 lite", 918e12),
        # One of a chip's two devices.
        ("TPU7x", 1153.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_kind(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_parameters_in_products_are_those_of_the_model() -> None:
    params = abstract_params(CONFIG.model, 300, 32)
    kernels = [leaf.size for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 2]
    assert flops_per_token(CONFIG, 300, keys_per_token=0) == 6 * (sum(kernels) + params["embedding"].size)


def test_attention_is_six_layers_width_length() -> None:
    alone = flops_per_token(CONFIG, 300) - flops_per_token(CONFIG, 300, keys_per_token=0)
    assert alone == 6 * 3 * 64 * 32


def test_the_head_and_the_last_block_count_only_where_they_are_computed() -> None:
    cut = replace(CONFIG, objective=ObjectiveConfig(cut_points=2))
    saved = flops_per_token(CONFIG, 300, keys_per_token=5) - flops_per_token(cut, 300, keys_per_token=5)
    # Queries, output, feed-forward and products with the keys; keys and values themselves are computed everywhere.
    block = 6 * (2 * 64**2 + 2 * 64 * 160) + 12 * 64 * 5
    assert saved == pytest.approx((6 * 384 * 64 + block) * (1 - 4 * 2 / 32))
    # Places that no set takes are computed, and not useful.
    unused = flops_per_token(cut, 300, 5) - flops_per_token(cut, 300, 5, scored_per_token=0.1)
    assert unused == pytest.approx((6 * 384 * 64 + block) * (4 * 2 / 32 - 0.1))
    assert flops_per_token(CONFIG, 300, 5, scored_per_token=0.1) == flops_per_token(CONFIG, 300, 5)


def test_the_formula_agrees_with_the_compilers_count_of_a_plain_product() -> None:
    # One product of a [T, D] by [D, F] costs 2 T D F forward and twice that backward: 6 D F a token.
    x, w = jnp.ones((32, 64)), jnp.ones((64, 160))
    compiled = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(x @ w) ** 2, argnums=(0, 1))).lower(x, w).compile()
    assert compiled.cost_analysis()["flops"] / 32 == pytest.approx(6 * 64 * 160, rel=0.02)
