"""``python -m benchmarks SUBJECT [flags]``: see ``--help``, and ``docs/performance.md`` for what was measured."""

import sys

import rich.console
import tyro

from benchmarks import report
from benchmarks.against_torch import AgainstTorch
from benchmarks.checkpointing import Checkpoint
from benchmarks.compilation import Compile
from benchmarks.devices import Devices
from benchmarks.memory import Memory
from benchmarks.optimizer import Optimizer
from benchmarks.pipeline import Pipeline
from benchmarks.random_numbers import Random
from benchmarks.step import Step
from pats_jax.errors import InputError

SUBJECTS: dict[str, type[report.Subject]] = {
    "step": Step,
    "torch": AgainstTorch,
    "optimizer": Optimizer,
    "compile": Compile,
    "memory": Memory,
    "pipeline": Pipeline,
    "devices": Devices,
    "random": Random,
    "checkpoint": Checkpoint,
}


def main(args: list[str] | None = None) -> None:
    """Runs a subject; exits with code 2 and one line on stderr when the input is wrong."""
    args = sys.argv[1:] if args is None else args
    subject = tyro.extras.subcommand_cli_from_dict(
        SUBJECTS, args=args, prog="python -m benchmarks", description=__doc__, use_underscores=True
    )
    name = next(name for name, kind in SUBJECTS.items() if type(subject) is kind)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    try:
        report.finish(name, subject.run(), subject.output_file, subject.add, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
