"""One process at a time in a run directory: flock, and an owner file with a heartbeat where machines share the path.

The kernel frees a flock when its process ends, SIGKILL included. A bucket, mounted or not, or a network file system has
no lock that other machines see: there the owner writes the time every half minute, and whoever sees that stays out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tcc_jax.storage import is_remote, read_small, replace_text
from tcc_jax.terminal import UserError, log

LOCK_FILE = ".lock"
OWNER_FILE = "owner.json"
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 120.0
_SHARED = ("fuse", "nfs", "cifs", "smb", "lustre", "ceph", "beegfs", "9p", "gpfs")


@contextlib.contextmanager
def hold(directory: Path, lost: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Hold a run directory against other processes of this machine, and of others where the path is shared.

    Args:
        directory: the run, which may lie in a bucket.
        lost: called with the reason, from a thread, when another machine has taken the directory over.

    Yields:
        A function that tells whether a directory of this machine is still held: it may have been removed or replaced.

    Raises:
        UserError: another process holds it; the message says which.
    """
    with contextlib.ExitStack() as stack:
        is_held = (lambda: True) if is_remote(directory) else stack.enter_context(flock(directory))
        if is_remote(directory) or is_shared(directory):
            stack.enter_context(owner_file(directory, lost))
        yield is_held


def is_shared(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Return whether other machines may see a path: a network file system or one in user space, such as gcsfuse.

    Args:
        path: an existing folder.
        mounts: the kernel's table of mounts; where there is none, a path counts as local.
    """
    try:
        entries = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    above = {str(parent) for parent in (path.resolve(), *path.resolve().parents)}
    kinds = {point: kind for _, point, kind, *_ in entries if point in above}
    return bool(kinds) and kinds[max(kinds, key=len)].startswith(_SHARED)


@contextlib.contextmanager
def flock(directory: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock of a run directory on a local file system; yields a function that tells whether it is still there.

    Raises:
        UserError: another process holds it; the message says which.
    """
    with open(directory / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(_refusal(directory, file.read().strip() or "another process")) from None
        with contextlib.suppress(OSError):  # On a full disk whoever is refused learns no name.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()

        # Asked once more after this block, by a watch that says how a run ended: the file is closed by then.
        mine = os.fstat(file.fileno())

        def is_there() -> bool:
            try:
                return os.path.samestat(mine, os.stat(directory / LOCK_FILE))
            except FileNotFoundError:
                return False

        yield is_there


@contextlib.contextmanager
def owner_file(
    directory: Any,
    lost: Callable[[str], None],
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
) -> Iterator[None]:
    """Own a run directory that other machines may see: owner.json holds a name and the time.

    Where there is an owner, its next heartbeat keeps us out; without one we wait until the last is stale, but not for a
    process of this machine that is gone. The clocks of the machines must agree to about a minute. Two that start within
    a second of each other both write, and the one that was overwritten finds out: here after a moment, or at its next
    heartbeat, when `lost` is called.

    Args:
        directory: an `etils.epath.Path`; `pathlib.Path` works too.
        lost: called with the reason, from a thread, when another process has taken the directory over.
        heartbeat_seconds: time between two writes.
        stale_seconds: a heartbeat older than this is a process that died.

    Raises:
        UserError: another process owns it.
    """
    path, name = directory / OWNER_FILE, uuid.uuid4().hex
    before = now = _read_owner(path)
    if before and not _is_gone(before):
        left = before["time"] + stale_seconds - time.time()
        if left > 0:
            log(f"{path}: process {before['pid']} on {before['host']}, is it alive? Waiting for {left:.0f} s at most")
        while now and time.time() - before["time"] < stale_seconds:
            time.sleep(min(1.0, heartbeat_seconds))
            now = _read_owner(path)
            if now and now["time"] != before["time"]:
                raise UserError(_refusal(directory, f"process {now['pid']} on {now['host']}"))
    _write_owner(path, name)
    time.sleep(min(1.0, heartbeat_seconds))
    after = _read_owner(path)
    if not after or after["name"] != name:
        raise UserError(_refusal(directory, "a process that started at the same time"))
    done = threading.Event()

    def beat() -> None:
        while not done.wait(heartbeat_seconds):
            # A store that cannot be reached for a moment is no reason to stop.
            with contextlib.suppress(Exception):
                owner = _read_owner(path)
                if owner and owner["name"] != name:
                    lost(f"process {owner['pid']} on {owner['host']} has taken over {directory}")
                    return
                _write_owner(path, name)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        # Whoever comes next finds it stale.
        with contextlib.suppress(Exception):
            owner = _read_owner(path)
            if owner and owner["name"] == name:
                path.unlink()


def _read_owner(path: Any) -> dict[str, Any] | None:
    try:
        owner = json.loads(read_small(path))
        return owner if isinstance(owner, dict) and {"name", "time", "pid", "host"} <= owner.keys() else None
    except (FileNotFoundError, ValueError):
        return None


def _write_owner(path: Any, name: str) -> None:
    owner = {"name": name, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "time": time.time()}
    replace_text(path, json.dumps(owner) + "\n")


def _is_gone(owner: dict[str, Any]) -> bool:
    return bool(_machine()) and owner.get("machine") == _machine() and not Path(f"/proc/{owner['pid']}").exists()


def _machine() -> str:
    # Process ids mean the same within one start of a machine and one namespace of processes (a container has its own).
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _refusal(directory: Any, owner: str) -> str:
    return f"{directory}: in use by {owner}; wait for it, stop it, or choose another run.directory"
