"""What the commands share."""

import os
import subprocess
import sys
import threading

import pytest

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
