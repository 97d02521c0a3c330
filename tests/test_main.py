"""The commands as a list, and their help."""

import subprocess
import sys

import pytest

from tcc_jax.__main__ import COMMANDS


def run(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)


def test_lists_the_commands():
    done = run("tcc_jax")
    assert done.returncode == 0
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


def test_unknown_command():
    done = run("tcc_jax", "evaluate")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: no command 'evaluate'; the commands are {', '.join(COMMANDS)}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_starting_jax(name):
    code = (
        f"import sys, tcc_jax.{name} as command\n"
        "sys.argv = ['command', '--help']\n"
        "try:\n    command.main()\n"
        "except SystemExit as stop:\n    print('exit', stop.code, 'jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--" in done.stdout
    assert done.stdout.splitlines()[-1] in ("exit 0 False", "exit None False"), done.stdout + done.stderr


def test_runs_a_command():
    assert "--gmt" in run("tcc_jax", "prepare", "--help").stdout
