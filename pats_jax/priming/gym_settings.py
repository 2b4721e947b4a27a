"""The settings of `pats-jax gym`."""

import dataclasses
from typing import Any, Literal

from pats_jax import methods
from pats_jax.data.gym import SHOTS
from pats_jax.errors import InputError, shown
from pats_jax.run import settings
from pats_jax.run.records import Tuned
from pats_jax.run.settings import FLOAT32_MAX, TrainingSettings, check_value
from pats_jax.run.workers import WorkerSettings

# Common values for each kind, not tuned.
LEARNING_RATES = {
    "full": 5e-5,
    "lora": 1e-3,
    "adapters": 1e-3,
    "bitfit": 1e-3,
    "ia3": 1e-2,
    "prompt": 1e-2,
    "prefix": 1e-2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GymSettings(WorkerSettings, TrainingSettings):
    """Tune primed and unprimed models on few-shot target tasks, and report what priming gains."""

    max_seq_length: int = 64  # tokens; longer inputs are truncated
    max_steps: int = 100  # steps per tuning
    eval_steps: int | None = 25  # score the dev rows every N steps, and keep the best
    per_device_train_batch_size: int = 8  # rows per step
    per_device_eval_batch_size: int = 32  # rows per evaluation batch
    data_dir: str = "builtin"  # folder of few-shot tasks, or "builtin" for generated ones
    partition: str = "builtin"  # builtin, metaicl or a JSON file; the target tasks are its test list
    share_sources: bool = False  # allow lists of a partition to contain tasks built from the same dataset
    shots: int = SHOTS  # shots, as in the names of the task files
    primed: tuple[str, ...] = ()  # folders of finished `pats-jax prime` runs to start from
    kinds: tuple[Tuned, ...] = ("full", "lora")  # tune these: PEFT methods, or the whole model (full), never primed
    direct: bool = True  # also tune from the unprimed model
    tasks: tuple[str, ...] = ()  # target tasks; if unset, all those of the partition
    samples: tuple[int, ...] = ()  # seeds of the few-shot samples; if unset, all
    head: Literal["embedding", "pair", "mlm", "classes"] = "embedding"  # how to score the options
    grid: tuple[str, ...] = ()  # learning rates to try, such as lora=3e-4,1e-3; the best on dev is kept
    max_test_rows: int | None = None  # test on N random rows of each task; if unset, all
    report_only: bool = False  # tune nothing; report on the finished tunings in output_dir

    def check(self) -> None:
        super().check()
        for name in ("max_steps", "max_test_rows"):
            check_value(name, getattr(self, name), lambda x: x >= 1, "at least 1")
        self.check_workers()
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise InputError(f"--kinds {' '.join(self.kinds)}: list at least one kind, each only once")
        for name in ("overwrite", "resume"):
            if getattr(self, name):
                raise InputError(f"--{name}: not needed: the same command keeps finished tunings and runs the others")
        if self.peft:
            raise InputError("--peft: use --kinds")
        for names, instead in _NOT_HERE.items():
            for name in names.split():
                if getattr(self, name) != getattr(GymSettings, name):
                    raise InputError(f"--{name}: {instead}")
        if not (self.direct or self.primed or self.report_only):
            raise InputError("--no_direct: nothing is left to tune; set --primed")
        if not self.output_dir:
            raise InputError("--output_dir is missing")
        for name in self.method.split("+"):
            method = methods.get_methods(name)[0]
            if method.objective or method.trainable or method.start:
                raise InputError(f"--method {name}: works only with pats-jax glue; gym takes optimizer methods")
        self.learning_rates("full")

    def learning_rates(self, kind: str) -> tuple[float, ...]:
        """The learning rates to try for a kind.

        Raises:
          InputError: ``--grid`` is not of the form KIND=RATE,RATE.
        """
        rates: dict[str, tuple[float, ...]] = {name: (rate,) for name, rate in LEARNING_RATES.items()}
        for text in self.grid:
            name, _, values = text.partition("=")
            try:
                own = tuple(float(value) for value in values.split(","))
            except ValueError:
                own = ()
            if name not in rates or not own or not all(0 < rate < FLOAT32_MAX for rate in own):
                what = f"--grid {shown(text, quoted=False)}"
                raise InputError(f"{what}: write KIND=RATE,RATE, where KIND is one of {', '.join(rates)}")
            rates[name] = own
        return rates[kind]

    def with_peft(self, kind: Any) -> "GymSettings":
        """The same settings with ``--peft`` set, for code shared with programs that tune one kind."""
        return dataclasses.replace(self, peft=kind)


def parse(args: list[str]) -> GymSettings:
    """The settings of the command line.

    Raises:
      InputError: on a bad value, or a flag of earlier versions.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help``.
    """
    if any(arg.partition("=")[0] == "--share" for arg in args):
        raise InputError("--share: use --jobs on one machine, and --executor dask --scheduler ADDRESS on several")
    return settings.parse(args, "pats-jax gym", GymSettings)


# Shared training flags that a tuning does not read -> what to use instead.
_NOT_HERE = {
    "learning_rate": "use --grid, which sets the learning rates of each kind",
    "train_batch_size gradient_accumulation_steps": "each step takes one batch of --per_device_train_batch_size rows",
    "early_stopping_patience load_best_model_at_end": "a tuning runs all its steps and keeps the best by dev score",
    "fsdp coordinator_address num_processes process_id": "a tuning runs on one device; use --jobs, or --executor dask",
}
