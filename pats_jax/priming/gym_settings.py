"""The settings of `pats-jax gym`."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from pats_jax.core.settings import FLOAT32_MAX, About, Choice, Entry, Group, Preset, at_least, entries, setting
from pats_jax.data.settings import GymDataSettings
from pats_jax.errors import InputError, shown
from pats_jax.methods.settings import AdamWSettings, OptimizerSettings
from pats_jax.methods.table import METHOD_CHOICE
from pats_jax.models import peft
from pats_jax.models.settings import ModelSettings
from pats_jax.priming import crossfit_recipe
from pats_jax.priming.text_settings import TextSettings
from pats_jax.run.records import Tuned
from pats_jax.run.settings import OF_CLASSIFIERS, TunedModel
from pats_jax.run.worker_settings import WorkerSettings
from pats_jax.training.settings import (
    BatchSettings,
    DeviceSettings,
    LoopSettings,
    ProcessSettings,
    SavingSettings,
)

# Common values for each kind, not tuned.
LEARNING_RATES = {
    "full": 5e-5,
    "lora": 1e-3,
    "adalora": 1e-2,
    "adapters": 1e-3,
    "bitfit": 1e-3,
    "ia3": 1e-2,
    "prompt": 1e-2,
    "prefix": 1e-2,
}


@dataclasses.dataclass(frozen=True)
class TuningSettings(Group):
    """One tuning of a start on a few-shot sample."""

    title: ClassVar[str] = "tuning"

    max_steps: int = setting(100, "steps per tuning", at_least(1), is_basic=True)
    eval_steps: int | None = setting(25, "score the dev rows every N steps, and keep the best", at_least(1))
    per_device_train_batch_size: int = setting(8, "rows per step", at_least(1))
    per_device_eval_batch_size: int = setting(32, "rows per evaluation batch", at_least(1, 65_536))
    head: Literal["embedding", "pair", "mlm", "classes", "generate", "likelihood"] = setting(
        "embedding", "how to score the options; T5, BART: generate answers, or likelihood of options", is_basic=True
    )
    batch_grid: tuple[int, ...] = setting(
        (), "rows per step to try with every learning rate; if unset, per_device_train_batch_size"
    )
    ties: Literal["loss", "first"] = setting(
        "loss", "of equal dev scores keep that of the lowest dev loss, or the first, as CrossFit does"
    )
    grid: tuple[str, ...] = setting(
        (), "learning rates to try, such as lora=3e-4,1e-3; the best on dev is kept", is_basic=True
    )
    max_test_rows: int | None = setting(None, "test on N random rows of each task; if unset, all", at_least(1))

    def check(self) -> None:
        super().check()
        self.learning_rates("full")
        if not all(size >= 1 for size in self.batch_grid):
            raise InputError(f"--batch_grid {' '.join(map(str, self.batch_grid))}: each must be at least 1")

    def learning_rates(self, kind: str) -> tuple[float, ...]:
        """The learning rates to try for a kind.

        Raises:
          InputError: if ``--grid`` is not of the form KIND=RATE,RATE.
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

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The rows per step to try."""
        return tuple(dict.fromkeys(self.batch_grid)) or (self.per_device_train_batch_size,)


@dataclasses.dataclass(frozen=True)
class WholeModel(Group):
    """Tuning of the whole model, as an alternative to adapters; it has no settings of its own."""

    kind: ClassVar[Literal["full"]] = "full"


KINDS_CHOICE = Choice(
    Entry(
        "kinds",
        "kinds",
        Group,
        tuple[Tuned, ...],
        ("full", "lora"),
        About("what to tune: PEFT methods, or the whole model (full), which is never primed", is_basic=True),
    ),
    kinds=lambda: {"full": WholeModel, **peft.KINDS},
    chosen=lambda kinds: tuple(WholeModel if kind == "full" else peft.KINDS[kind] for kind in kinds),
    name=lambda configs: tuple(config.kind for config in configs),
    has_basic=False,
)

_NOT_NEEDED = "not needed: the same command keeps finished tunings and runs the others"
_ONE_BATCH = "each step takes one batch of --per_device_train_batch_size rows"
_ALL_STEPS = "a tuning runs all its steps and keeps the best by dev score"
_ONE_DEVICE = "a tuning runs on one device; use --jobs, or --executor dask for several machines"


@dataclasses.dataclass(frozen=True, init=False)
class GymSettings(TunedModel):
    """Tune primed and unprimed models on few-shot target tasks, and report what priming gains."""

    choices: ClassVar[Mapping[str, Choice]] = {"methods": METHOD_CHOICE, "adapters": KINDS_CHOICE}
    elsewhere: ClassVar[Mapping[str, str]] = {
        "peft": "use --kinds",
        "share": "use --jobs on one machine, and --executor dask --scheduler ADDRESS on several",
        "learning_rate": "use --grid, which sets the learning rates of each kind",
        **{flag: hint for flag, hint in OF_CLASSIFIERS.items() if flag not in entries(TextSettings)},
        **dict.fromkeys(("overwrite", "resume"), _NOT_NEEDED),
        **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_private_repo"), "a gym keeps no model to upload"),
        **dict.fromkeys(("train_batch_size", "gradient_accumulation_steps"), _ONE_BATCH),
        **dict.fromkeys(("early_stopping_patience", "load_best_model_at_end"), _ALL_STEPS),
        **dict.fromkeys(("fsdp", "coordinator_address", "num_processes", "process_id"), _ONE_DEVICE),
    }
    former: ClassVar[frozenset[str]] = frozenset(
        flag
        for kind in (OptimizerSettings, LoopSettings, SavingSettings, DeviceSettings, ProcessSettings, BatchSettings)
        for flag in entries(kind)
    ) | {"peft", "share"}

    presets: ClassVar[Mapping[str, Preset]] = {"crossfit": crossfit_recipe.tuning}

    preset: Literal["crossfit"] | None = setting(
        None, "crossfit: the defaults of CrossFit's recipe, for T5 and BART", is_basic=True, of_one_start=True
    )
    output_dir: str | None = setting(
        None, "folder of the tunings; repeat the same command to resume them", is_path=True, is_basic=True
    )
    primed: tuple[str, ...] = setting(
        (), "folders of finished `pats-jax prime` runs to start from", is_path=True, is_basic=True
    )
    direct: bool = setting(True, "also tune from the unprimed model")
    tasks: tuple[str, ...] = setting((), "target tasks; if unset, all those of the partition", is_basic=True)
    samples: tuple[int, ...] = setting((), "seeds of the few-shot samples; if unset, all")
    report_only: bool = setting(False, "tune nothing; report on the finished tunings in output_dir")
    adapters: "tuple[WholeModel | peft.PeftConfig, ...]" = ()  # of --kinds
    model: ModelSettings = ModelSettings(max_seq_length=64)
    optimizer: AdamWSettings = AdamWSettings()
    data: GymDataSettings = GymDataSettings()
    tuning: TuningSettings = TuningSettings()
    text: TextSettings = TextSettings()
    workers: WorkerSettings = WorkerSettings()

    @property
    def kinds(self) -> tuple[Tuned, ...]:
        """``--kinds``: what to tune."""
        return KINDS_CHOICE.name(self.adapters)

    def adapter(self, kind: Tuned) -> "peft.PeftConfig | None":
        """The config of a kind among ``kinds``; None for the whole model."""
        return next((each for each in self.adapters if isinstance(each, peft.PeftConfig) and each.kind == kind), None)

    def check(self) -> None:
        super().check()
        head = self.tuning.head
        self.text.check_read(head, is_read=head in ("generate", "likelihood"))
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise InputError(f"--kinds {' '.join(self.kinds)}: list at least one kind, each only once")
        if not (self.direct or self.primed or self.report_only):
            raise InputError("--no_direct: nothing is left to tune; set --primed")
        if not self.output_dir:
            raise InputError("--output_dir is missing")
        for adapter in self.adapters:
            if not isinstance(adapter, WholeModel):
                adapter.in_training(self.tuning.max_steps)
        for method in self.methods:
            if method.has("objective") or method.has("gradient") or method.trainable or method.has("start"):
                raise InputError(f"--method {method.name}: works only with pats-jax glue; gym takes optimizer methods")
