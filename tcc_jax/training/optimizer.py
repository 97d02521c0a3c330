"""AdamW or Muon, their schedules, and the rules that say which parameters decay and which Muon moves."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tcc_jax.config import OptimizerConfig

# By path, not by shape: a stack of norm scales is a matrix too.
_NO_DECAY = re.compile(r"(^|/)(scale|output_bias)$")
_MUON = re.compile(r"(^|/)kernel$")
# Root mean square of a Muon update at a learning rate of 1: that of AdamW in practice (Liu et al. 2025).
_MUON_RMS = 0.2


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a run of `steps` steps: clipping by global norm, then AdamW or Muon.

    AdamW is that of Loshchilov & Hutter 2019. Muon (Jordan 2024) moves the kernels of the blocks by the nearest
    orthogonal matrix to their momentum; embeddings, the output bias and norms are left to AdamW.
    """

    def rate(count: jax.Array) -> jax.Array:
        return learning_rate(config, steps, count)

    adamw = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    optimizer = adamw
    if config.kind == "muon":
        muon = optax.contrib.muon(rate, weight_decay=config.weight_decay, consistent_rms=_MUON_RMS)
        optimizer = optax.partition({"muon": muon, "adamw": adamw}, muon_labels)
    if config.gradient_clip == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), optimizer)


def learning_rate(config: OptimizerConfig, steps: int, step: jax.Array | int) -> jax.Array:
    """Return the learning rate of the update after `step` updates, float32.

    It climbs linearly to the peak, which the update number `warmup_steps` has, and ends at `final_fraction` of it at
    the last update: along half a cosine, or constant until the last `decay_share` of the steps and linear from there
    (the warmup-stable-decay schedule of Hu et al. 2024).
    """
    step = jnp.asarray(step, jnp.float32)
    climb = (step + 1) / max(config.warmup_steps, 1)
    if config.schedule == "cosine":
        progress = (step + 1 - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    else:
        shape = jnp.clip((steps - step - 1) / max(config.decay_share * steps, 1), 0, 1)
    fraction = config.final_fraction + (1 - config.final_fraction) * shape
    return config.learning_rate * jnp.minimum(climb, 1) * fraction


def decay_mask(params: Any) -> Any:
    """Return a tree of bools: true for the parameters that weight decay shrinks, false for norms and biases."""
    return jax.tree.map_with_path(lambda path, _: not _NO_DECAY.search(parameter_path(path)), params)


def muon_labels(params: Any) -> Any:
    """Return a tree of names: which optimizer moves a parameter, `muon` (kernels of the blocks) or `adamw`."""
    return jax.tree.map_with_path(lambda path, _: "muon" if _MUON.search(parameter_path(path)) else "adamw", params)


def parameter_path(path: tuple) -> str:
    """Return a parameter's place in its tree as text: `blocks/0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
