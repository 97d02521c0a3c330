"""What the commands share: one-line errors, argument parsing, progress on a terminal or in a log, plain tables."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_undo: dict[object, Callable[[], None]] = {}
# Between two lines of progress in a log.
_LINE_SECONDS = 10.0


class Advance(Protocol):
    """What `progress` yields: a function to be called with the units of work just done."""

    def __call__(self, count: int, status: str = "") -> None:
        """Move the progress on by `count` units; `status` is shown beside it."""


class UserError(Exception):
    """A mistake of the user's: one line that names the file, field or gene and says what to do. Exits with 2."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a command's `main`: a user's mistake prints one line on standard error and exits with 2, no traceback.

    SIGINT, SIGTERM and SIGHUP end the process at once with 128 and their number, and `undo_if_stopped` sees to it that
    nothing half-written stays behind. A standard stream that is closed is an empty one.
    """

    @functools.wraps(main)
    def run() -> None:
        # nohup has SIGHUP ignored: leave it so. None is a handler that is not Python's and could not be put back.
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        taken = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]
        for number in taken:
            signal.signal(number, _leave)
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        try:
            try:
                main()
            finally:
                _flush()
        except UserError as error:
            _fail(str(error))
        except BrokenPipeError:
            # Whoever read our output has enough of it.
            raise SystemExit(128 + signal.SIGPIPE) from None
        except OSError as error:
            # Unwritable, full or missing places: the system's own words, with the file they are about.
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}")
        finally:
            for number in taken:
                signal.signal(number, before[number])

    return run


@contextlib.contextmanager
def undo_if_stopped(undo: Callable[[], None]) -> Iterator[None]:
    """Have `undo` called where a signal ends the command inside the block; nothing else of the block runs then.

    Args:
        undo: removes what must not stay behind. It may be called at any moment inside the block.
    """
    key = object()
    _undo[key] = undo
    try:
        yield
    finally:
        del _undo[key]


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # What could not be printed stays in the buffer, and the interpreter must not complain of it at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _leave(number: int, frame: object) -> None:
    # Nothing is raised: Python code that C++ calls, such as JAX's hook in the garbage collector, would swallow it and
    # the work go on, or the interpreter be taken down beside threads of XLA that still compute.
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    for undo in reversed(list(_undo.values())):
        with contextlib.suppress(Exception):
            undo()
    # The signal may have come in the middle of a print.
    with contextlib.suppress(Exception):
        log("interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)


def _fail(message: str) -> None:
    log("error: " + one_line(message))
    raise SystemExit(2)


def parse_arguments(kind: type[T], arguments: Sequence[str] | None = None, **settings: Any) -> T:
    """Parse a command line into a dataclass with tyro.

    Args:
        kind: a dataclass; each field becomes a flag, its docstring the help.
        arguments: the command line; None takes `sys.argv[1:]`.
        settings: passed on to `tyro.cli` (`default`, `prog`, `description`).

    Raises:
        UserError: an unknown flag, a value of the wrong type, an empty path or bytes that are no text, as one line.
            `--help` exits with 0.
    """
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            # tyro would keep the last and drop the others without a word.
            raise UserError(f"{flag}: given twice; give it once, with all its values after it")
    for argument in arguments:
        # Python takes bytes that are no text in, and could write them to no file of text.
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"{argument!r}: not text in UTF-8")
    captured = _Captured()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=arguments, registry=_registry(), **settings)
    except SystemExit as stop:
        # --help, or a signal that came just now.
        if stop.code in (0, None) or (isinstance(stop.code, int) and stop.code > 128):
            raise
        # tyro draws a box, or rules, around several lines under a title; an error here is one line.
        drawn = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in captured.getvalue().splitlines()]
        words = " ".join(line.strip("│╰╯─ ") for line in drawn if not line.startswith("╭"))
        words = re.sub("^.*?-{8,} +|-{8,} *", "", words)
        # What went wrong stands before the types that were tried and the option's help.
        words = re.sub(r"\.? *((Got errors|Argument helptext):.*)?For full helptext, (see|run):? ", "; see ", words)
        raise UserError(words or "wrong arguments; see --help") from None


def _registry() -> Any:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    def to_path(words: list[str]) -> Path:
        if not words[0]:
            # pathlib would take it for the current folder. tyro words a ValueError as it sees fit.
            raise UserError("a path on the command line is empty; name a file or a folder")
        return Path(words[0])

    @registry.primitive_rule
    def path_rule(info: Any) -> Any:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=to_path,
            is_instance=lambda path: isinstance(path, Path),
            str_from_instance=lambda path: [str(path)],
        )

    def from_words(words: list[str]) -> dict[str, float]:
        if len(words) % 2:
            raise ValueError("must be pairs of a name and a number")
        return dict(zip(words[::2], map(float, words[1::2]), strict=True))

    # tyro gives each key of a table that is not empty a flag of its own, and then takes no others.
    @registry.primitive_rule
    def table_rule(info: Any) -> Any:
        if info.type != dict[str, float]:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME NUMBER [NAME NUMBER ...]]",
            instance_from_str=from_words,
            is_instance=lambda table: isinstance(table, dict),
            str_from_instance=lambda table: [str(word) for item in table.items() for word in item],
        )

    return registry


class _Captured(io.StringIO):
    """In place of standard error, takes what its own thread writes; what others say, of a signal, is still printed."""

    def __init__(self) -> None:
        super().__init__()
        self._thread, self._printed = threading.get_ident(), sys.stderr

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self._thread else self._printed.write(text)


def log(message: str) -> None:
    """Print one line on standard error, where progress and notices go; standard output is for results.

    One that cannot be printed (a log on a full disk, a terminal that is gone) is lost, and the work goes on.
    """
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def log_lines(messages: Iterable[str]) -> None:
    """Print several lines as `log` does."""
    for message in messages:
        log(message)


@contextlib.contextmanager
def progress(label: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
    """Show the progress of a long piece of work on standard error: a bar on a terminal, plain lines in a log.

    Args:
        label: what is being done.
        total: units of work, if known.
        done: units of work already behind us.

    Yields:
        advance(count, status=""): to be called with the units of work just done and, if any, a word on how it goes.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        # It hides the cursor while it is shown.
        bar = Progress(console=Console(stderr=True), transient=True)
        with undo_if_stopped(bar.stop), bar:
            task = bar.add_task(label, total=total, completed=done)
            yield lambda count, status="": bar.update(task, advance=count, description=f"{label} {status}".rstrip())
        return
    last = time.monotonic()

    def advance(count: int, status: str = "") -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            log(f"{label}: {done:,}" + (f" of {total:,}" if total else "") + (f", {status}" if status else ""))

    yield advance


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows as plain text: the first column flush left, the others flush right, ints with thousands commas."""
    cells = [[cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, rest = (
            row[0].ljust(widths[0]),
            (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        )
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Return a text with its tabs and line ends, and the blanks around them, each made one blank."""
    return " ".join(text.split())


def cell(value: object) -> str:
    """Return a value as a table shows it: ints with thousands commas, floats with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
