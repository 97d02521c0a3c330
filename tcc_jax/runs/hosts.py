"""Several processes as one run: how they find each other, and how they end when one of them is gone.

JAX's own service notices a process that died too, but answers with an abort and a C++ stack; here a thread of each
process looks after the others and ends its own with one line that names who is missing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax

from tcc_jax.config import HostsConfig
from tcc_jax.terminal import UserError, log

# Those of JAX's clusters that need nothing but variables or Google's metadata server.
_CLUSTERS = ("ompi", "slurm", "gcetpu", "gketpu")
_BEAT_SECONDS = 1.0
# How long a process may be silent once a collective operation has failed here: somebody is gone, and it shows soon.
_SILENCE_AFTER_FAILURE = 5.0
# Exit codes where another process is gone: without a word, so that the same command goes on, or with its reason.
_LOST, _FAILED = os.EX_TEMPFAIL, 1
_ALIVE, _VERDICT, _DONE = "tcc_jax/alive/", "tcc_jax/verdict/", "done"
_PARTS, _TOLD, _AS_LONG_AS_IT_TAKES = "tcc_jax/parts/", ":", 2**31 - 1
_numbers = itertools.count()


def find_hosts(hosts: HostsConfig) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`, or None for a process that is alone.

    Each of coordinator, count and index is taken from the configuration, else from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. What is still open is left to JAX where it finds more than one process of a
    Slurm job, an Open MPI job or a TPU slice (on Compute Engine or on GKE).

    Raises:
        UserError: some of the three are given, the others not, and no cluster is there to tell; or they do not fit.
    """
    given = {
        "coordinator_address": hosts.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        "num_processes": hosts.count or _number("JAX_NUM_PROCESSES"),
        "process_id": hosts.index if hosts.index >= 0 else _number("JAX_PROCESS_ID"),
    }
    address, count, index = given.values()
    if count == 1:
        return None
    if address is not None and not str(address).rpartition(":")[2].isdecimal():
        raise UserError(f"hosts.coordinator or JAX_COORDINATOR_ADDRESS = {address}: must be ADDRESS:PORT")
    if count is not None and index is not None and not 0 <= int(index) < int(count):
        raise UserError(f"hosts.index or JAX_PROCESS_ID = {index}: must be from 0 to {int(count) - 1}")
    if None not in given.values():
        return given | {"cluster_detection_method": "deactivate"}
    cluster = _cluster()
    if cluster:
        return given | {"cluster_detection_method": cluster}
    if set(given.values()) == {None}:
        return None
    names = {
        "coordinator_address": "hosts.coordinator (JAX_COORDINATOR_ADDRESS)",
        "num_processes": "hosts.count (JAX_NUM_PROCESSES)",
        "process_id": "hosts.index (JAX_PROCESS_ID)",
    }
    missing = " and ".join(names[name] for name, value in given.items() if value is None)
    raise UserError(f"several hosts: {missing} must be given too, or none of the three on a single machine")


def join_hosts(hosts: HostsConfig) -> Peers | None:
    """Join the other processes of the run, before JAX is used; return a watch over them, or None if there are none.

    Raises:
        UserError: as `find_hosts` does, or the others cannot be reached.
    """
    arguments = find_hosts(hosts)
    if arguments is None:
        return None
    # JAX's own service would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # JAX's service is a second line of defence: it aborts what still runs a minute after the watch has spoken.
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=hosts.timeout_seconds + 60)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = arguments["coordinator_address"] or f"the coordinator ({arguments['cluster_detection_method']})"
        raise UserError(
            f"several hosts: cannot join the others at {where}: {reason}; start all processes within five minutes, "
            "with the same coordinator and count and each with its own index"
        ) from None
    return Peers(hosts.timeout_seconds) if jax.process_count() > 1 else None


def all_or_none(failure: str, finish: Callable[[], str]) -> str:
    """Let the first process finish what every process has done its part of; return why not, the same on all of them.

    Called by all as often and in the same order, from any one thread: it is no collective operation of the devices.

    Args:
        failure: why this process's part failed, or "".
        finish: called on the first process alone, once no part has failed; returns why it could not, or "".
    """
    if jax.process_count() == 1:
        return failure or finish()
    from jax._src.distributed import global_state

    assert global_state.client is not None
    client, prefix = global_state.client, f"{_PARTS}{next(_numbers)}/"

    def hear(index: int) -> str:
        # A process that dies instead is seen by the watch, which ends this one.
        return client.blocking_key_value_get(f"{prefix}{index}", _AS_LONG_AS_IT_TAKES).removeprefix(_TOLD)

    if jax.process_index():
        client.key_value_set(f"{prefix}{jax.process_index()}", _TOLD + failure)
        return hear(0)
    failures = [failure, *map(hear, range(1, jax.process_count()))]
    if not any(failures):
        failures = [finish()]
    answer = "; ".join(f"process {index}: {failure}" for index, failure in enumerate(failures) if failure)
    client.key_value_set(f"{prefix}0", _TOLD + answer)
    return answer


class Peers:
    """A watch over the other processes of a run; ends this one when one of them is gone.

    The exit code is 75 (EX_TEMPFAIL) where a process is gone without a word, since the same command goes on then, and 1
    where it said why it failed.

    Every process tells JAX's coordination service once a second that it is alive. The first one, where the service
    runs, sees who is silent and says so to the others; these notice by themselves when the first one is gone. To be
    used as a context: leaving it without an exception is a proper end, which the others do not mind.

    Args:
        timeout_seconds: after so long without a sign a process counts as dead.

    Attributes:
        on_loss: called with what happened, and with whether the same command goes on, in a thread, before this process
            ends at once.
    """

    def __init__(self, timeout_seconds: float) -> None:
        from jax._src.distributed import global_state

        assert global_state.client is not None and global_state.coordinator_address is not None
        self._client, self._timeout = global_state.client, timeout_seconds
        host, _, port = global_state.coordinator_address.rpartition(":")
        self._first_process = (host.strip("[]"), int(port))
        self._index, self._count = jax.process_index(), jax.process_count()
        self._silence, self._heard = timeout_seconds, False
        self._left = threading.Event()
        self._reached = time.monotonic()
        self.on_loss: Callable[[str, bool], None] = lambda message, _: log(f"error: {message}; start all again")

    def __enter__(self) -> Peers:
        _hold_up_aborts()
        self._beating = threading.Thread(target=self._beat, name="peers beat", daemon=True)
        self._beating.start()
        threading.Thread(target=self._guard, name="peers guard", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._hear_watch(error)
        self._left.set()
        # A beat under way would overwrite the last word. It hangs where the first process is stopped: wait no longer.
        self._beating.join(10 * _BEAT_SECONDS)
        if kind is not None:
            # JAX would wait for the others at the end of the interpreter, and abort when they are gone.
            atexit.register(_end, 2 if issubclass(kind, (UserError, OSError)) else 1)
        last = _DONE if kind is None else "failed: " + " ".join(str(error).split())[:500]
        self._tell(_ALIVE + str(self._index), last)
        if kind is not None and self._index == 0:
            # The service ends with this process: what it said must have been heard by then.
            self._tell(f"{_VERDICT}{_FAILED}", f"process 0 has {last}")
            time.sleep(3 * _BEAT_SECONDS)

    @contextlib.contextmanager
    def speak_first(self) -> Iterator[None]:
        """Before a failure inside this block leaves it, wait for the watch, which ends this process if one is gone."""
        try:
            yield
        except Exception as error:
            self._hear_watch(error)
            raise

    def _hear_watch(self, error: BaseException | None) -> None:
        if self._heard or not isinstance(error, Exception) or isinstance(error, UserError):
            return
        # Most likely a collective operation without the process that is gone.
        self._silence, self._heard = min(self._timeout, _SILENCE_AFTER_FAILURE), True
        time.sleep(self._silence + 10 * _BEAT_SECONDS)

    def _beat(self) -> None:
        """Say that this process is alive, and hear what the first one says; calls hang if that one is stopped."""
        beats = 0
        while not self._left.wait(_BEAT_SECONDS):
            beats += 1
            try:
                self._client.key_value_set(_ALIVE + str(self._index), str(beats), allow_overwrite=True)
                verdicts = self._client.key_value_dir_get(_VERDICT)
            except Exception:
                if not self._left.is_set():
                    self._leave("process 0 has ended", _LOST)
                return
            self._reached = time.monotonic()
            # Time to end by the same mistake in its own words.
            if verdicts and self._index and not self._left.wait(_BEAT_SECONDS):
                key, verdict = verdicts[0]
                self._leave(verdict, int(key.rpartition("/")[2]))

    def _guard(self) -> None:
        seen: dict[str, tuple[str, float]] = {str(index): ("", time.monotonic()) for index in range(self._count)}
        while not self._left.wait(_BEAT_SECONDS):
            now = time.monotonic()
            if self._index:
                if now - self._reached > self._silence:
                    self._leave(f"process 0 has given no sign for {self._silence:.0f} s", _LOST)
                if now - self._reached > 2 * _BEAT_SECONDS and self._is_refused():
                    self._leave("process 0 has ended", _LOST)
                continue
            try:
                signs = self._client.key_value_dir_get(_ALIVE)
            except Exception:
                # A call that fails once is no reason to stop watching.
                continue
            for key, value in signs:
                index = key.rpartition("/")[2]
                if seen[index][0] != value:
                    seen[index] = (value, now)
            for index, (value, time_seen) in seen.items():
                if value.startswith("failed"):
                    self._condemn(f"process {index} has {value}", _FAILED)
                elif value != _DONE and now - time_seen > self._silence:
                    self._condemn(f"process {index} has given no sign for {self._silence:.0f} s", _LOST)

    def _is_refused(self) -> bool:
        """Return whether nobody listens any more where the first process did."""
        try:
            socket.create_connection(self._first_process, timeout=_BEAT_SECONDS).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def _condemn(self, verdict: str, code: int) -> None:
        self._tell(f"{_VERDICT}{code}", verdict)
        # Time for the others to hear it, or to end by the same mistake in their own words.
        if not self._left.wait(3 * _BEAT_SECONDS):
            self._leave(verdict, code)

    def _tell(self, key: str, value: str) -> None:
        try:
            self._client.key_value_set(key, value, allow_overwrite=True)
        except Exception as error:
            log(f"warning: the other processes cannot be told: {' '.join(str(error).split())[:200]}")

    def _leave(self, message: str, code: int) -> None:
        try:
            self.on_loss(message, code == _LOST)
        finally:
            os._exit(code)


def _hold_up_aborts() -> None:
    # JAX's service aborts this process in the moment in which the first one is gone. The C library's `sleep` as the
    # handler holds that up, for as many seconds as SIGABRT has for a number (6), so that the watch has the last word.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{name} = {text}: must be a number")
    return int(text)


def _cluster() -> str | None:
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.name in _CLUSTERS and cluster.is_env_present():
            return cluster.name if cluster.get_process_count() > 1 else None
    return None
