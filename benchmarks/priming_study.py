"""What the studies of priming share: upstream stages, the search of their learning rates, and the gym.

Each stage and each gym is a command of `pats-jax` in a process of its own. A finished one is not repeated, so a study
that was stopped goes on where it was. Nothing else is stored: what is decided follows from what is finished.
"""

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import rich.console
import tyro

from pats_jax.core import files
from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, Preempted
from pats_jax.reporting.console import say
from pats_jax.run import run_folder, workers
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.worker_settings import WorkerSettings
from pats_jax.run.workers import Job

_WARMUP_STEPS = 10
LORA = ("--train", "pe", "--peft", "lora")
MODEL = ("--train", "plm")


@dataclasses.dataclass(frozen=True)
class Stage:
    """An upstream stage, at a constant learning rate after a short warmup.

    Attributes:
      flags: what is trained, and how.
      rates: the learning rates to try.
      check_steps: steps between two scores on the dev tasks.
      max_steps: after so many steps it ends.
    """

    flags: tuple[str, ...]
    rates: tuple[str, ...]
    check_steps: int
    max_steps: int

    def command(self, rate: str) -> tuple[str, ...]:
        """The flags of `pats-jax prime` for a learning rate."""
        steps, check = str(self.max_steps), str(self.check_steps)
        warmup = str(min(1.0, _WARMUP_STEPS / self.max_steps))
        schedule = ("--lr_scheduler_type", "constant_with_warmup", "--warmup_ratio", warmup)
        when = ("--max_steps", steps, "--eval_steps", check, "--save_steps", check, "--save_total_limit", "1")
        form = ("--num_devices", "1", "--layers", "stacked", "--seed", "1", "--max_grad_norm", "1", "--resume")
        return (*self.flags, "--learning_rate", rate, *schedule, *when, *form)


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder of stages and gyms.

    Attributes:
      root: the folder.
      common: the flags that both programs get: model, data, head, lengths.
      jobs: stages, or tunings, at a time; they share the cores.
      console: where to say what is done.
      lock: of the folder.
    """

    root: pathlib.Path
    common: tuple[str, ...]
    jobs: int
    console: rich.console.Console
    lock: FolderLock

    def best_rates(self, stages: Mapping[str, Stage], checks: int, flags: Sequence[str]) -> dict[str, str]:
        """The learning rate of each stage with the best score on the dev tasks within so many checks."""
        # rates of one stage share their compiled programs, so they do not begin together
        tried = [(name, rate) for name, stage in stages.items() for rate in stage.rates]
        tried.sort(key=lambda one: stages[one[0]].rates.index(one[1]))
        folders = {(name, rate): f"rates/{name}-{rate}" for name, rate in tried}
        short = {
            name: dataclasses.replace(stage, max_steps=checks * stage.check_steps) for name, stage in stages.items()
        }
        self.prime({folder: (*short[name].command(rate), *flags) for (name, rate), folder in folders.items()})
        chosen = {}
        for name, stage in stages.items():
            scores = {rate: self._dev_score(folders[name, rate]) for rate in stage.rates}
            chosen[name] = max(scores, key=lambda rate: scores[rate])
            say(self.console, f"{name}: best dev score by learning rate: {scores}")
        return chosen

    def prime(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Runs or resumes upstream stages, each in the folder of its name, with these flags."""
        missing = {name: flags for name, flags in commands.items() if self._results(name) is None}
        self._run({name: ("prime", *flags) for name, flags in missing.items()}, self.jobs)

    def gym(self, name: str, flags: Sequence[str]) -> None:
        """Makes the missing tunings of a gym, and its report."""
        self._run({name: ("gym", "--jobs", str(self.jobs), *flags)}, 1)

    def tunings(self, name: str) -> list[JsonObject]:
        """The records of a gym's tunings."""
        return [files.read_json(path) for path in sorted((self.root / name).glob("tunings/*/*.json"))]

    def _results(self, name: str) -> JsonObject | None:
        return run_folder.read_results(self.root / name)

    def _dev_score(self, name: str) -> float:
        results = self._results(name)
        assert results is not None, name
        (score,) = results["best"]["metrics"].values()
        return score

    def _run(self, commands: Mapping[str, Sequence[str]], at_a_time: int) -> None:
        """Runs commands of `pats-jax`, each with its folder; the output of each goes to a log beside it.

        Raises:
          InputError: if one fails; the message has its last line. The others have been stopped.
          Preempted: if this process was asked to stop; so have they.
        """
        jobs = []
        for name, (program, *flags) in commands.items():
            folder = self.root / name
            files.make_folder(folder.parent)
            arguments = ("-m", "pats_jax", program, *self.common, "--output_dir", str(folder), *flags)
            jobs.append(Job(name, arguments, log=str(folder.with_name(f"{folder.name}.log"))))
        with (
            workers.connect(WorkerSettings(jobs=at_a_time), self.lock) as fleet,
            workers.note_signals() as asked,
            contextlib.closing(workers.run_jobs(jobs, fleet, self.root, asked)) as all_ended,
        ):
            for job, ended in all_ended:
                if why := workers.reason(job, ended):
                    raise InputError(f"{job.log}: {why}")
                say(self.console, f"{job.name} finished ({ended.seconds:.0f} s)")
        if asked.signal_number is not None:
            raise Preempted("interrupted; repeat the command to resume", asked.signal_number)


@contextlib.contextmanager
def open_study(folder: str, common: Sequence[str], jobs: int) -> Iterator[Study]:
    """A study in a folder, which nobody else may use meanwhile."""
    root = pathlib.Path(folder)
    files.make_folder(root)
    with workers.hold(root) as lock:
        yield Study(root, tuple(common), jobs, rich.console.Console(highlight=False, soft_wrap=True), lock)


def write_partition(path: pathlib.Path, train: Sequence[str], dev: Sequence[str], test: Sequence[str]) -> str:
    """Writes a partition and returns its path."""
    files.make_folder(path.parent)
    files.write_json(path, {"train": list(train), "dev": list(dev), "test": list(test)})
    return str(path)


class Settings(Protocol):
    """The settings of a study, a dataclass."""

    output_dir: str
    jobs: int

    @property
    def common(self) -> tuple[str, ...]:
        """The flags that both programs get."""


AnySettings = TypeVar("AnySettings", bound=Settings)


def main(
    kind: type[AnySettings],
    run: Callable[[AnySettings, Study], None],
    args: Sequence[str] | None,
    name: str,
    description: str | None,
) -> None:
    """Runs a study by its flags; exits with code 2 and one line on stderr for wrong input, 128 + N after signal N.

    Args:
      kind: of its settings.
      run: runs what is missing.
      args: the flags; None: those of this process.
      name: of the module, for the help.
      description: of the study, for the help.
    """
    prog = f"python -m benchmarks.{name}"
    settings = tyro.cli(kind, args=args, prog=prog, description=description, use_underscores=True)
    logging.getLogger("pats_jax").setLevel(logging.ERROR)
    try:
        with open_study(settings.output_dir, settings.common, settings.jobs) as study:
            run(settings, study)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
