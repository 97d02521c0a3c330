"""A configuration small enough to compile and run in seconds, what disturbs such a run, and what it left behind."""

import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from tcc_jax.config import Config, from_dict
from tcc_jax.corpus.loader import BatchSource
from tcc_jax.corpus.store import open_corpus
from tcc_jax.runs.checkpoint import restore_state
from tcc_jax.training import loop
from tcc_jax.training.sharding import make_mesh
from tcc_jax.training.state import abstract_state
from tests.integration.runs import CLOCK

SMALL = {
    "model": {"num_layers": 1, "width": 16, "num_heads": 2, "dropout": 0.1, "matmul_dtype": "float32"},
    "objective": {"cut_points": 2},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
    "training": {
        "steps": 10,
        "batch_rows": 8,
        "row_length": 32,
        "segments_per_row": 4,
        "log_every": 1,
        "eval_every": 5,
        "eval_steps": 1,
    },
    "checkpoint": {"every_steps": 5, "keep": 10},
    "mesh": {"data": 1},
}


def small_config(**sections: dict) -> Config:
    """Return the small configuration with some fields changed, section by section."""
    names = SMALL.keys() | sections.keys()
    return from_dict({name: SMALL.get(name, {}) | sections.get(name, {}) for name in names})


def small_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Return a mesh of so many devices along each axis."""
    return make_mesh(small_config(model={"num_heads": 8}, mesh={"data": data, "fsdp": fsdp, "tensor": tensor}))


def config_of(corpus, directory, **sections):
    return small_config(run={"directory": str(directory)}, data={"corpus": str(corpus)}, **sections)


def state_at(config, step):
    abstract = abstract_state(config, open_corpus(config.data.corpus).vocabulary.size, small_mesh(1))
    return jax.device_get(restore_state(Path(config.run.directory), step, abstract))


def lines_of(config):
    text = (Path(config.run.directory) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def same_numbers(lines):
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def disturb(patch, step, action):
    """Do something while `step` (from 1) is under way, as the training batch after it is fetched."""

    class DisturbedSource(BatchSource):
        def __init__(self, config, corpus, split, *rows):
            super().__init__(config, corpus, split, *rows)
            self.split = split

        def batches(self, start_step=0):
            for number, batch in enumerate(super().batches(start_step), start_step + 1):
                if self.split == "train" and number == step + 1:
                    action()
                yield batch

    patch.setattr(loop, "BatchSource", DisturbedSource)
