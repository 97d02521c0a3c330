"""AdamW with a warm-up and a cosine, and the rule that says which parameters decay."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tcc_jax.config import OptimizerConfig

# By path, not by shape: a stack of norm scales is a matrix too.
_NO_DECAY = re.compile(r"(^|/)(scale|output_bias)$")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) with clipping by global norm, for a run of `steps` steps."""
    adamw = optax.adamw(
        lambda count: learning_rate(config, steps, count),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.gradient_clip == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), adamw)


def learning_rate(config: OptimizerConfig, steps: int, step: jax.Array | int) -> jax.Array:
    """Return the learning rate of the update after `step` updates, float32.

    It climbs linearly to the peak, which the update number `warmup_steps` has, then follows half a cosine down to
    `final_fraction` of it at the last update.
    """
    step = jnp.asarray(step, jnp.float32)
    climb = (step + 1) / max(config.warmup_steps, 1)
    progress = (step + 1 - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    fraction = config.final_fraction + (1 - config.final_fraction) * cosine
    return config.learning_rate * jnp.minimum(climb, 1) * fraction


def decay_mask(params: Any) -> Any:
    """Return a tree of bools: true for the parameters that weight decay shrinks, false for norms and biases."""
    return jax.tree.map_with_path(lambda path, _: not _NO_DECAY.search(parameter_path(path)), params)


def parameter_path(path: tuple) -> str:
    """Return a parameter's place in its tree as text: `blocks/0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
