"""What the decoder is measured against, and mixed with: genes scored by the training sets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

Scorer = Callable[[Sequence[np.ndarray]], jax.Array | np.ndarray]
"""n arrays of visible gene ids -> [n, V] scores, any float type, higher is better; only their order matters."""
