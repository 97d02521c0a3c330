"""What the commands share."""

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
