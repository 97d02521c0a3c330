"""tcc_jax: train a decoder-only transformer on human gene sets, and complete new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tcc_jax.completion.model import Model

__version__ = "0.1.0"


def load(path: str) -> Model:
    """Open a checkpoint for completion.

    Args:
        path: a run directory, one step inside it (`RUN/checkpoints/STEP`), or an export.

    Returns:
        A `tcc_jax.completion.model.Model`, weights in float32 on the default device.

    Raises:
        UserError: the path holds no readable checkpoint.
    """
    # Imported here so that `import tcc_jax` does not start JAX.
    from tcc_jax.completion.model import load

    return load(path)
