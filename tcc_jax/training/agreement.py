"""How hosts agree: a flag that one of them raises reaches all at the same step, without another wait."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tcc_jax.training.sharding import over_devices, replicated


class Agreement:
    """Hosts act on a request of any of them at the same step: the flags travel with the steps and are read as late.

    Args:
        mesh: the devices.
        late: how many calls later the flags of several hosts are read.
    """

    def __init__(self, mesh: Mesh, late: int) -> None:
        self._mesh, self._late = mesh, late
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(lambda flags_NK: jnp.max(flags_NK, axis=0), out_shardings=replicated(mesh))

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether any host raised it: in this call on a single host, else `late` calls ago."""
        if jax.process_count() == 1:
            return flags
        local_NK = np.tile(np.array(flags, np.int32), (len(self._mesh.local_devices), 1))
        with jax.transfer_guard_host_to_device("allow"):
            flags_NK = jax.make_array_from_process_local_data(over_devices(self._mesh), local_NK)
        self._pending.append(self._any(flags_NK))
        if len(self._pending) <= self._late:
            return (False,) * len(flags)
        return tuple(bool(flag) for flag in jax.device_get(self._pending.popleft()))
