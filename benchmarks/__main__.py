"""``python -m benchmarks SUBJECT [flags]``: how fast and how large, each ratio measured in turns in one process.

`check` compares ratios with the stored ones, `plot` draws what is stored, `all` runs every subject. On CPU, ``taskset``
says which cores to use; nothing else should be running. ``docs/performance.md`` has what was measured.
"""

import dataclasses
import logging
import subprocess
import sys

import rich.console
import tyro

from benchmarks import report
from benchmarks.against_torch import AgainstTorch
from benchmarks.check import Check
from benchmarks.checkpointing import Checkpoint
from benchmarks.compilation import Compile
from benchmarks.devices import Devices
from benchmarks.goals import Plot
from benchmarks.lanes import Lanes
from benchmarks.long_texts import Long
from benchmarks.memory import Memory
from benchmarks.optimizer import Optimizer
from benchmarks.pipeline import Pipeline
from benchmarks.priming import Priming
from benchmarks.random_numbers import Random
from benchmarks.step import Step
from benchmarks.text_to_text import TextToText
from benchmarks.tpu import Tpu
from pats_jax.errors import InputError
from pats_jax.reporting.console import say
from pats_jax.run import xla_flags

SUBJECTS: dict[str, type[report.Subject]] = {
    "step": Step,
    "torch": AgainstTorch,
    "long": Long,
    "text2text": TextToText,
    "optimizer": Optimizer,
    "compile": Compile,
    "memory": Memory,
    "pipeline": Pipeline,
    "priming": Priming,
    "devices": Devices,
    "random": Random,
    "checkpoint": Checkpoint,
    "lanes": Lanes,
}


@dataclasses.dataclass(frozen=True)
class All:
    """Run every subject with its defaults, each in a process of its own; the results files are written anew."""

    subjects: tuple[str, ...] = ()  # which of them; none: all
    data_dir: str | None = None  # folder of GLUE's TSV files; none: the built-in data

    def run(self, console: rich.console.Console) -> int:
        failed = {}
        for name in report.choose(self.subjects, SUBJECTS):
            command = [sys.executable, "-m", "benchmarks", name]
            if self.data_dir and name in ("compile", "pipeline"):
                command += ["--data_dir", self.data_dir]
            code = subprocess.run(command).returncode
            if code:
                failed[name] = code
        for name, code in failed.items():
            say(console, f"FAILED {name}: {f'killed by signal {-code}' if code < 0 else f'exit code {code}'}")
        return 1 if failed else 0


def main(args: list[str] | None = None) -> None:
    """Runs a subject or another command; exits with code 2 and one line on stderr when the input is wrong."""
    chosen = tyro.extras.subcommand_cli_from_dict(
        SUBJECTS | {"all": All, "check": Check, "plot": Plot, "tpu": Tpu},
        args=args,
        prog="python -m benchmarks",
        description=__doc__,
        use_underscores=True,
    )
    xla_flags.set_defaults()  # as in the programs
    logging.getLogger("pats_jax").setLevel(logging.ERROR)  # that heads are new is no news here
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    try:
        if isinstance(chosen, report.Subject):
            name = next(name for name, kind in SUBJECTS.items() if type(chosen) is kind)
            report.finish(name, chosen.run(), chosen.output_file, chosen.add, console)
        else:
            sys.exit(chosen.run(console))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
