"""A configuration small enough to compile and run in seconds."""

from jax.sharding import Mesh

from tcc_jax.config import Config, from_dict
from tcc_jax.training.sharding import make_mesh

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
