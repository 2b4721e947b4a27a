"""The settings of `pats-jax gym`."""

import dataclasses
from typing import Any, Literal

from pats_jax import methods
from pats_jax.data.gym import SHOTS
from pats_jax.errors import InputError, shown
from pats_jax.run.settings import FLOAT32_MAX, TrainingSettings, check_value

# By what is tuned: usual values, not searched for.
LEARNING_RATES = {
    "full": 5e-5,
    "lora": 1e-3,
    "adapters": 1e-3,
    "bitfit": 1e-3,
    "ia3": 1e-2,
    "prompt": 1e-2,
    "prefix": 1e-2,
}


@dataclasses.dataclass(frozen=True)
class GymSettings(TrainingSettings):
    """Tune on few-shot tasks from primed and unprimed starts, and report what priming gains."""

    max_seq_length: int = 64  # tokens of an input; longer ones are cut
    max_steps: int = 100  # steps of a tuning
    eval_steps: int | None = 25  # steps between scores on the dev rows, of which the best is kept
    per_device_train_batch_size: int = 8  # rows of a step
    per_device_eval_batch_size: int = 32  # rows
    data_dir: str = "builtin"  # folder of few-shot tasks, or "builtin" for generated ones
    partition: str = "builtin"  # builtin, metaicl or a JSON file; its test list are the target tasks
    share_sources: bool = False  # take a partition with tasks of two lists that are built on the same source set
    shots: int = SHOTS  # the number in the files' names
    primed: tuple[str, ...] = ()  # folders of finished runs of `pats-jax prime`
    kinds: tuple[Literal["full", "lora", "bitfit", "ia3", "adapters", "prompt", "prefix"], ...] = (
        "full",
        "lora",
    )  # what is tuned; full, the whole model, is a baseline and never primed
    direct: bool = True  # tune from the unprimed model, too
    tasks: tuple[str, ...] = ()  # target tasks; none: the partition's
    samples: tuple[int, ...] = ()  # seeds of the few-shot samples; none: all
    head: Literal["embedding", "pair", "mlm", "classes"] = "embedding"  # how options are scored
    grid: tuple[str, ...] = ()  # learning rates by kind, as lora=3e-4,1e-3; the best on dev is kept; none: one each
    max_test_rows: int | None = None  # of a task, drawn once at random; none: all
    jobs: int = 1  # processes, which share the cores and the tunings
    share: str = "1/1"  # do the i-th of n equal shares of the tunings only, as 2/3, and no report; for several machines
    report_only: bool = False  # tune nothing: report on the records of the folder

    def check(self) -> None:
        super().check()
        for name in ("max_steps", "jobs", "max_test_rows"):
            check_value(name, getattr(self, name), lambda x: x >= 1, "at least 1")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise InputError(f"--kinds {' '.join(self.kinds)}: give at least one kind, each once")
        for name in ("overwrite", "resume"):
            if getattr(self, name):
                raise InputError(f"--{name}: finished tunings are kept, and the same command makes the others")
        if self.peft:
            raise InputError("--peft: use --kinds")
        for names, instead in _NOT_HERE.items():
            for name in names.split():
                if getattr(self, name) != getattr(GymSettings, name):
                    raise InputError(f"--{name}: {instead}")
        if not (self.direct or self.primed or self.report_only):
            raise InputError("--no_direct: nothing is left to tune; give --primed")
        if not self.output_dir:
            raise InputError("--output_dir is missing")
        parse_share(self.share)
        for name in self.method.split("+"):
            method = methods.get_methods(name)[0]
            if method.objective or method.trainable or method.start:
                raise InputError(f"--method {name}: needs the GLUE program; here it must be a change of the optimizer")
        self.learning_rates("full")

    def learning_rates(self, kind: str) -> tuple[float, ...]:
        """The learning rates that are tried for what is tuned.

        Raises:
          InputError: ``--grid`` is written otherwise than as KIND=RATE,RATE.
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
                raise InputError(f"{what}: write KIND=RATE,RATE with a kind of {', '.join(rates)}")
            rates[name] = own
        return rates[kind]

    def with_peft(self, kind: Any) -> "GymSettings":
        """The same for rooms that read ``--peft``, as those of a program that has one kind."""
        return dataclasses.replace(self, peft=kind)


def parse_share(text: str) -> tuple[int, int]:
    """``2/3`` as (2, 3).

    Raises:
      InputError: it is written otherwise.
    """
    first, _, last = text.partition("/")
    numbers = first.isdecimal() and last.isdecimal() and len(text) <= 20  # Python reads no more than 4300 digits
    if not (numbers and 1 <= int(first) <= int(last)):
        raise InputError(f"--share {shown(text, quoted=False)}: write I/N with 1 <= I <= N")
    return int(first), int(last)


# Flags of all trainings that no tuning reads -> what there is in their place.
_NOT_HERE = {
    "learning_rate": "use --grid, which has the learning rates by kind",
    "train_batch_size gradient_accumulation_steps": "a step takes one batch of --per_device_train_batch_size rows",
    "early_stopping_patience load_best_model_at_end": "a tuning makes all its steps, and keeps what is best on dev",
    "fsdp coordinator_address num_processes process_id": "a tuning runs on one device; use --jobs or --share",
}
