"""Processes of `python -m tcc_jax.train` that start fast: forked from one that has imported everything.

Importing jax, flax and orbax takes seconds and starts no thread and no backend, so a fork of a process that has done it
is a training process like any other: it is killed, stopped and waited for by its own process id.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class Nursery:
    """Starts training processes; leaving the `with` block ends what is still running.

    Args:
        environment: variables for all of them, beside this process's own.
    """

    def __init__(self, **environment: str) -> None:
        variables = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        # Compiled as for a user, and not as quickly as in the other tests (tests/conftest.py).
        variables["XLA_FLAGS"] = os.environ.get("TCC_TEST_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
        variables |= environment
        # Without this, programs that compile in a blink are not kept, and every start compiles them again.
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.nursery"],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children: list[Child] = []
        assert self._server.stdout.readline() == "ready\n"

    def start(self, *arguments: object, log: Path) -> Child:
        """Start `python -m tcc_jax.train ARGUMENTS`; what it says is added to the file `log`."""
        pid = self.ask(start=[str(argument) for argument in arguments], log=str(log))
        self._children.append(Child(pid, self, log))
        return self._children[-1]

    def ask(self, **question):
        """Send a question to the server and return its answer."""
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill(9)
                child.wait()
        self._server.stdin.close()
        self._server.wait(timeout=10)


@dataclass
class Child:
    """A training process."""

    pid: int
    nursery: Nursery
    log: Path
    status: int | None = None

    def kill(self, number: int) -> None:
        """Send it a signal; it may have ended already."""
        if self.status is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return its exit status (negative: the signal that ended it), or None while it runs."""
        if self.status is None:
            self.status = self.nursery.ask(poll=self.pid)
        return self.status

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end and return its exit status."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, f"process {self.pid} still runs after {seconds} s: {self.log.read_text()}"
            time.sleep(0.01)
        return self.status


def _serve() -> None:
    import tcc_jax.completion.model
    import tcc_jax.evaluation.protocol
    import tcc_jax.training.loop  # noqa: F401
    from tcc_jax import train

    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(json.dumps(pid), flush=True)
            continue
        log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["tcc_jax.train", *question["start"]]
        train.main()
        # As at the end of a program: out of the loop, through the interpreter's own end.
        return


if __name__ == "__main__":
    _serve()
