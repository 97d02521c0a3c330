"""What the commands share."""

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tcc_jax import terminal
from tcc_jax.completion.options import CompleteOptions
from tcc_jax.terminal import UserError, log, parse_arguments


def test_what_a_signal_says_while_arguments_are_parsed_is_printed(monkeypatch, capsys):
    def cli(*_, **__):
        speaker = threading.Thread(target=log, args=("SIGTERM: stopped",))
        speaker.start()
        speaker.join()
        print("no such flag", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr("tyro.cli", cli)
    with pytest.raises(UserError, match=r"^no such flag$"):
        parse_arguments(CompleteOptions, ["--nothing"])
    assert capsys.readouterr().err == "SIGTERM: stopped\n"


def outcome(main, redirection="", stdout=subprocess.PIPE):
    """Run a command whose body is `main`, its output buffered as in a shell; return its status and what it says."""
    code = f"import sys\nfrom tcc_jax.terminal import UserError, command\n@command\ndef main():\n    {main}\nmain()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    shell = ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code]
    shown = subprocess.run(shell, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    return shown.returncode, shown.stderr


# As Python code that C++ calls: what it raises is printed and dropped.
SWALLOWED = """
import gc, os, signal, sys, time
from pathlib import Path
from tcc_jax.files import atomic_folder
from tcc_jax.storage import atomic_file, temporary_folder
from tcc_jax.terminal import command, progress

def callback(phase, details):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))

@command
def main():
    os.environ["TMPDIR"] = os.getcwd()
    with atomic_folder("new/out") as folder, atomic_file("file") as file, temporary_folder(), progress("work"):
        (folder / "part").write_text("")
        file.write_text("")
        assert len(os.listdir()) == 3
        print("begun")
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(1)
    print("ended")
main()
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGINT", "interrupted"), ("SIGTERM", "stopped by SIGTERM"), ("SIGHUP", "stopped by SIGHUP")],
)
def test_a_signal_at_any_moment_ends_the_command_and_leaves_nothing(tmp_path, name, words):
    command = [sys.executable, "-c", SWALLOWED, name]
    # Where tests run under nohup, SIGHUP is ignored.
    default = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    environment = {**os.environ, "PYTHONPATH": str(Path(terminal.__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, preexec_fn=default
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + getattr(signal, name), "begun\n", words + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", ["print('result')", "print('result'); raise SystemExit(0)", "print('x' * 100_000)"])
def test_output_that_nobody_reads_or_that_does_not_fit(main):
    reader, writer = os.pipe()
    os.close(reader)
    assert outcome(main, stdout=writer) == (141, "")
    os.close(writer)
    with open("/dev/full", "w") as full:
        assert outcome(main, stdout=full) == (2, "error: No space left on device\n")


def test_closed_standard_streams_are_empty():
    assert outcome("print(len(sys.stdin.buffer.read()), file=sys.stderr)", "<&-") == (0, "0\n")
    assert outcome("print(sys.stdout.isatty(), file=sys.stderr)", ">&-") == (0, "False\n")
    assert outcome("raise UserError('mistake')", "2>&-") == (2, "")
