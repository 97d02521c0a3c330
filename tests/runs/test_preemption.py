"""Requests to stop: what is left to save decides, a second signal ends at once, a maintenance notice is a request."""

import http.server
import signal
import subprocess
import sys
import threading
import time

import pytest

from tcc_jax.runs.preemption import Stop

# What the main thread does meanwhile: C++ code that never looks at Python's signals.
WORK = """
import hashlib, sys, time
from tcc_jax.runs.preemption import Stop
stop = Stop()
stop.on_leave = lambda message: print("left", flush=True)
stop.hear_signals()
if sys.argv[1] == "unsaved":
    stop.must_save()
print("ready", flush=True)
if sys.argv[1] == "deaf":
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
for _ in range(6000):
    if stop:
        print("asked by", stop.reason, flush=True)
        time.sleep(float(sys.argv[2]))
        break
    time.sleep(0.01)
"""


def begin(what, linger=0, nohup=False):
    arguments = [sys.executable, "-c", WORK, what, str(linger)]
    # What is ignored here is ignored there, and the tests may run under nohup themselves.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("what", ["idle", "deaf"])
def test_with_nothing_to_save_the_process_leaves_at_once(number, what):
    process = begin(what)
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "left\n")
    assert f"{number.name}: stopped with no unsaved step" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_with_a_step_to_save_the_main_thread_is_left_to_do_it(number):
    process = begin("unsaved")
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, f"asked by {number.name}\n")
    assert "finishing the step" in error


def test_a_second_signal_ends_at_once():
    process = begin("unsaved", linger=60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked by SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert "SIGTERM again: ending at once" in process.stderr.read()


def test_a_terminal_that_closes_asks_once_however_often_it_does():
    process = begin("unsaved", linger=0.5)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.communicate(timeout=20)[0] == "asked by SIGHUP\n"
    assert process.returncode == 0


def test_under_nohup_a_terminal_may_close():
    process = begin("unsaved", nohup=True)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "asked by SIGTERM\n"


def test_an_event_loop_in_the_main_thread_loses_no_signal():
    uvloop = pytest.importorskip("uvloop")
    with Stop() as stop:
        stop.must_save()

        async def work():
            signal.raise_signal(signal.SIGTERM)
            end = time.monotonic() + 10
            while not stop and time.monotonic() < end:
                time.sleep(0.01)

        uvloop.run(work())
        assert stop.reason == "SIGTERM"


@pytest.mark.parametrize(
    ("key", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_a_maintenance_notice_is_a_request_to_stop(key, value):
    announced, asked = threading.Event(), []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            mine = f"/instance/{key}?" in self.path
            if mine:
                announced.wait(10)
            else:
                time.sleep(0.05)
            calm = {"maintenance-event": "NONE", "preempted": "FALSE"}
            other = next(name for name in calm if f"/{name}?" in self.path)
            self.send_response(200)
            self.send_header("ETag", "1")
            self.end_headers()
            self.wfile.write((value if mine else calm[other]).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        stop = Stop()
        stop.must_save()
        stop.watch_metadata(f"127.0.0.1:{server.server_port}")
        time.sleep(0.3)
        assert not stop
        announced.set()
        end = time.monotonic() + 10
        while not stop and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.reason == f"{key} {value}"
        assert {flavor for _, flavor in asked} == {"Google"}
        assert {"wait_for_change=true" in path for path, _ in asked} == {True}
    finally:
        server.shutdown()
        server.server_close()
