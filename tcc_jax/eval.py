"""`python -m tcc_jax.eval`: complete unseen gene sets, and test how well that recovers what was hidden of them."""

from __future__ import annotations

from tcc_jax.evaluation.options import REPORT_FILE, EvaluateOptions
from tcc_jax.files import atomic_folder, keep_compilations
from tcc_jax.terminal import command, log, log_lines, parse_arguments


@command
def main() -> None:
    """Run the command."""
    options = parse_arguments(EvaluateOptions, prog="python -m tcc_jax.eval")
    options.check()
    keep_compilations()
    # Imported here: --help and mistakes answer before the seconds that jax takes to import.
    from tcc_jax.evaluation.evaluate import evaluate

    with atomic_folder(options.out, marker=REPORT_FILE, replace=options.overwrite) as folder:
        report = evaluate(options, folder)
    # Only now: a reader that has seen enough must not cost a finished evaluation.
    print(report.text())
    log_lines(report.unread)
    log(f"report in {options.out}")


if __name__ == "__main__":
    main()
