"""Attention both ways inside the prompt: `python -m benchmarks.bidirectional`, a trial and no option of the product.

Two layers, one cut a set, rows of prompts; compared with the same under the causal mask, which is a row of
benchmarks/ablation.py and goes first. In this process the decoder has another mask, in training and in scoring: a gene
sees all genes of its set up to the cut that is scored. Those behind the cut are targets: no gene before it sees one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ablation
from tcc_jax.config import ModelConfig, parse_command_line
from tcc_jax.evaluation.recall import make_recall
from tcc_jax.model.attention import attend_visible
from tcc_jax.model.decoder import Decoder, Execution, initial_params, merge
from tcc_jax.training.loop import train

CAUSAL = "layers: 2, cuts: 1 a set"
_causal = Decoder.__call__


def _attend(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    return attend_visible(q_BTNH, k_BTNH, v_BTNH, segments_BT[:, :, None] == segments_BT[:, None, :])


def _both_ways(self, tokens_BT, segments_BT, dropout_key=None, execution=None, positions_BC=None) -> jax.Array:
    # What lies behind the cut of its set is made padding: only other padding sees it, and nobody reads that.
    behind_BCT = jnp.arange(tokens_BT.shape[1]) > positions_BC[:, :, None]
    own_BCT = jnp.take_along_axis(segments_BT, positions_BC, axis=1)[:, :, None] == segments_BT[:, None, :]
    shown_BT = jnp.where(jnp.any(own_BCT & ~behind_BCT, axis=1), segments_BT, 0)
    execution = dataclasses.replace(execution or Execution(), attend=_attend)
    return _causal(self, tokens_BT, shown_BT, dropout_key, execution, positions_BC)


def _check() -> None:
    """Hold the mask to what is said of it: of 8 genes in two sets, the first set is cut behind its third."""
    config = ModelConfig(num_layers=2, width=32, num_heads=2, matmul_dtype="float32")
    decoder = merge(config, 64, 16, initial_params(config, 64, 16, jax.random.key(0)))
    tokens_BT, segments_BT = jnp.arange(20, 28)[None], jnp.array([[1, 1, 1, 1, 1, 2, 2, 2]])

    def changed(call, place: int) -> list[bool]:
        one, other = (call(decoder, t, segments_BT, positions_BC=jnp.array([[0, 2, 6]]))
                      for t in (tokens_BT, tokens_BT.at[0, place].set(50)))  # fmt: skip
        return np.any(np.asarray(one != other)[0], axis=1).tolist()

    assert changed(_both_ways, 2) == [True, True, False], "a later gene is seen by an earlier one of its set"
    assert changed(_causal, 2) == [False, True, False]
    assert not any(changed(_both_ways, 4) + changed(_both_ways, 7)), "a target is seen"


def _train(arguments: Sequence[str]) -> None:
    train(parse_command_line(list(arguments)), make_recall=make_recall)


if __name__ == "__main__":
    _check()
    Decoder.__call__ = _both_ways
    arguments, _ = ablation.row(CAUSAL)
    ablation.keep(f"{CAUSAL}, both ways in the prompt", arguments, CAUSAL, _train)
    print(ablation.table())
