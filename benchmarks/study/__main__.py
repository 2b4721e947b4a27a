"""``python -m benchmarks.study run|report``."""

import argparse
import logging
import sys

from pats_jax.errors import InputError


def parser() -> argparse.ArgumentParser:
    """The parser of the commands' flags."""
    from benchmarks import study
    from benchmarks.study import run

    found = argparse.ArgumentParser(prog="python -m benchmarks.study", description=study.__doc__)
    commands = found.add_subparsers(required=True)
    of_run = commands.add_parser("run", help="train; a finished training is not repeated")
    run.add_flags(of_run)
    of_run.set_defaults(command=run.run)
    of_report = commands.add_parser("report", help="write study.md, study.json and study.png")
    of_report.add_argument("--output_dir", required=True, help="folder of runs.jsonl; the report is written there")
    of_report.set_defaults(command=_report)
    return found


def main(args: list[str] | None = None) -> None:
    """Reads the flags and runs a command; exits with code 2 and one line on stderr when the input is wrong."""
    flags = parser().parse_args(args)
    logging.getLogger("pats_jax").setLevel(logging.ERROR)  # that heads are new is no news here
    try:
        flags.command(flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _report(flags):
    from benchmarks.study import report  # SciPy and Matplotlib, which a machine that trains may lack

    report.report(flags)


if __name__ == "__main__":
    main()
