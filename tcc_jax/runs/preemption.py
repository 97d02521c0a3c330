"""Asked to stop: SIGTERM, SIGINT, SIGHUP or a maintenance notice of the machine, answered in every phase of a run.

The main thread finishes its step, saves and ends. A thread of its own hears the signals, because Python's handlers wait
while the main thread is inside a compilation; before the first step there is nothing to save and it ends the process.
Nothing here imports jax, so that signals are heard before it is imported.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

from tcc_jax.terminal import log

# The last is that of a terminal or a connection that is closed.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FROM_HANDLER = 0x80
_METADATA = "http://{host}/computeMetadata/v1/instance/{key}?wait_for_change=true&timeout_sec=60&last_etag={etag}"
# Values of the two keys of Google's metadata server that mean: this machine goes on as it is.
_CALM = {"maintenance-event": "NONE", "preempted": "FALSE"}


class Stop:
    """A request to stop.

    Attributes:
        reason: who asked, or "" if nobody did.
        on_leave: called with a message before the process leaves at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.on_leave: Callable[[str], None] = lambda message: None
        self._lock = threading.Lock()
        self._must_save = False
        self._undo: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        """Return whether somebody asked."""
        return bool(self.reason)

    def must_save(self) -> None:
        """Say that there is a step to save from now on: the process no longer leaves at once."""
        with self._lock:
            self._must_save = True

    def request(self, reason: str) -> None:
        """Ask to stop; the first reason counts. Ends the process with 0 at once if there is no step to save."""
        with self._lock:
            if self.reason:
                return
            if self._must_save:
                self.reason = reason
                log(f"{reason}: finishing the step, then saving; once more ends at once")
                return
            message = f"{reason}: stopped with no unsaved step; the same command goes on"
            log(message)
            self.on_leave(message)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def hear_signals(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP from now on, heard by a thread. A second one ends the process at once.

        Used as a context, a `Stop` does so for as long as the block lasts.
        SIGHUP, which a terminal that is closed may send twice, does not; where it is ignored, by nohup, it stays so.

        Does nothing outside the main thread, where signals cannot be taken.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)

        # The wakeup file gets a signal's number even while C++ code runs; but an event loop in the main thread (Orbax
        # runs one) takes that file for itself, and then only the handler is called.
        def handle(number: int, _: object) -> None:
            mouth.send(bytes([number | _FROM_HANDLER]))

        hears = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in hears}
        wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(ear,), name="signals", daemon=True)
        thread.start()

        def undo() -> None:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            mouth.close()
            thread.join()
            ear.close()

        self._undo = undo

    def __enter__(self) -> Stop:
        self.hear_signals()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()

    def watch_metadata(self, host: str | None = None) -> None:
        """Ask to stop when Google's metadata server announces maintenance or preemption of this machine.

        Source: https://cloud.google.com/compute/docs/metadata/querying-metadata (keys `instance/maintenance-event` and
        `instance/preempted`, long polls with `wait_for_change`).

        Args:
            host: of the server; None takes GCE_METADATA_IP (as JAX does) or metadata.google.internal.
        """
        host = host or os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        for key in _CALM:
            threading.Thread(target=self._poll, args=(host, key), name=f"metadata {key}", daemon=True).start()

    def _listen(self, ear: socket.socket) -> None:
        # Most signals are heard twice, through the wakeup file and from the handler.
        heard, heard_in_all, insisted = {0: 0, _FROM_HANDLER: 0}, 0, False
        while numbers := ear.recv(1):
            heard[numbers[0] & _FROM_HANDLER] += 1
            if max(heard.values()) == heard_in_all:
                continue
            heard_in_all += 1
            number = signal.Signals(numbers[0] & ~_FROM_HANDLER)
            if number != signal.SIGHUP:
                if insisted:
                    log(f"{number.name} again: ending at once")
                    os._exit(128 + number)
                insisted = True
            self.request(number.name)

    def _poll(self, host: str, key: str) -> None:
        etag, calm = "0", _CALM[key]
        while not self.reason:
            url = _METADATA.format(host=host, key=key, etag=etag)
            try:
                request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
                with urllib.request.urlopen(request, timeout=90) as answer:
                    etag, value = answer.headers.get("ETag", "0"), answer.read().decode().strip()
            except (OSError, urllib.error.URLError, ValueError):
                threading.Event().wait(5)
                continue
            if value != calm:
                self.request(f"{key} {value}")
