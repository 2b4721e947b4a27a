"""The settings of the programs that train: groups that belong to the modules that read them, composed per program.

The flags of a program are the names of its settings, and so are the keys of config.json; see `pats_jax.run.flags`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeVar

from pats_jax.core.settings import SEED, About, Choice, Composed, Entry, Flat, Group, as_json, entries, setting
from pats_jax.data.settings import DataSettings, OwnData
from pats_jax.errors import InputError
from pats_jax.methods.method import Method
from pats_jax.methods.paths import EARLIER_MATRICES, MATRICES
from pats_jax.methods.settings import OptimizerSettings
from pats_jax.methods.table import METHOD_CHOICE, joined_names
from pats_jax.models import peft
from pats_jax.models.settings import CheckpointSettings, ModelSettings
from pats_jax.run.records import PeftKind
from pats_jax.training.settings import (
    BatchSettings,
    CompilerSettings,
    DeviceSettings,
    LengthSettings,
    LoopSettings,
    LossSettings,
    ProcessSettings,
    SavingSettings,
    SmoothingSettings,
)

_WITH_LORA_B: tuple[PeftKind, ...] = ("lora", "adalora")  # the adapters that LoRA+ is for

PEFT_CHOICE = Choice(
    Entry(
        "peft",
        "peft",
        Group,
        PeftKind | None,
        None,
        About("PEFT method: train only its adapter and the head", is_basic=True),
    ),
    kinds=lambda: peft.KINDS,
    chosen=lambda kind: () if kind is None else (peft.KINDS[kind],),
    name=lambda configs: configs[0].kind if configs else None,
    has_basic=False,
)


@dataclasses.dataclass(frozen=True)
class FolderSettings(Group):
    """The folder of a run."""

    title: ClassVar[str] = "run"

    output_dir: str | None = setting(
        None,
        "folder of the run; if unset, a folder in runs/ named after the run",
        is_path=True,
        is_basic=True,
        free_on_resume=True,
    )
    overwrite: bool = setting(
        False,
        "replace the run in output_dir; it is kept as output_dir.previous until the new one ends",
        of_one_start=True,
    )
    resume: bool = setting(
        False,
        "resume the interrupted run in output_dir; start a new one if there is none",
        is_basic=True,
        of_one_start=True,
    )

    def check(self) -> None:
        super().check()
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite cannot be used together")


@dataclasses.dataclass(frozen=True)
class HubSettings(Group):
    """Whether and where to publish the model."""

    title: ClassVar[str] = "hub"

    push_to_hub: bool = setting(
        False, "upload the model and its card to the Hugging Face hub at the end", of_one_start=True
    )
    hub_model_id: str | None = setting(
        None, "with --push_to_hub: the repository, USER/NAME; if unset, named after output_dir", of_one_start=True
    )
    hub_private_repo: bool | None = setting(
        None,
        "with --push_to_hub: whether a new repository is private; if unset, as the account says",
        of_one_start=True,
    )

    def check(self) -> None:
        super().check()
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) is not None and not self.push_to_hub:
                raise InputError(f"--{name}: needs --push_to_hub")


@dataclasses.dataclass(frozen=True, init=False)
class TunedModel(Composed):
    """The settings of every program that trains: model, methods, compilation, seed."""

    choices: ClassVar[Mapping[str, Choice]] = {"methods": METHOD_CHOICE}

    seed: int = setting(
        42, "random seed for the new head, the order of examples, dropout and noise", SEED, is_basic=True
    )
    model: CheckpointSettings = ModelSettings()
    methods: tuple[Method, ...] = ()  # those of --method
    compiler: CompilerSettings = CompilerSettings()

    @property
    def method(self) -> str:
        """``--method``: the names of the methods, joined by ``+``."""
        return joined_names(self.methods)

    @property
    def model_attention(self) -> str:
        """The model's ``attention``; with ``--deterministic`` not cuDNN's, whose order of summation may vary."""
        return "einsum" if self.compiler.deterministic else self.model.asked_attention

    def check(self) -> None:
        super().check()
        if self.model.asked_attention == "cudnn" and self.model_attention != "cudnn":
            raise InputError("--attention cudnn: not available with --fsdp or --deterministic")

    @classmethod
    def renamed(cls, saved: Flat) -> Flat:
        """The current names: the noise's default parameters were written otherwise before there were more models."""
        return saved | {"noise_layers": MATRICES} if saved.get("noise_layers") in EARLIER_MATRICES else saved

    def with_layers(
        self, layers: Literal["separate", "stacked"], unroll: int, adapter: "peft.PeftConfig | None"
    ) -> Self:
        """The same settings with the backend's defaults where ``--layers`` and ``--unroll`` say nothing.

        An adapter on some layers needs separate ones.
        """
        if adapter is not None and adapter.differs_by_layer:
            layers = "separate"
        return self.replace(model=self.model.with_layers(layers, unroll))


@dataclasses.dataclass(frozen=True, init=False)
class TrainingSettings(TunedModel):
    """The further settings of programs with one training per run: optimizer, loop, checkpoints, devices, folder."""

    choices: ClassVar[Mapping[str, Choice]] = {"methods": METHOD_CHOICE, "adapters": PEFT_CHOICE}

    adapters: "tuple[peft.PeftConfig, ...]" = ()  # of --peft: one, or none
    folder: FolderSettings = FolderSettings()
    hub: HubSettings = HubSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    loop: LoopSettings = LoopSettings()
    saving: SavingSettings = SavingSettings()
    devices: DeviceSettings = DeviceSettings()
    processes: ProcessSettings = ProcessSettings()

    @property
    def adapter(self) -> "peft.PeftConfig | None":
        """The config of ``--peft``; None without one."""
        return self.adapters[0] if self.adapters else None

    def check(self) -> None:
        super().check()
        if self.optimizer.lora_plus_ratio != 1 and self.peft not in _WITH_LORA_B:
            raise InputError(f"--lora_plus_ratio: needs --peft {' or '.join(_WITH_LORA_B)}")

    @property
    def peft(self) -> PeftKind | None:
        """``--peft``: the kind of the adapter."""
        return PEFT_CHOICE.name(self.adapters)

    @property
    def phases(self) -> set[str]:
        """What the run does: any of "train", "eval" and "predict"."""
        return {"train", "eval"}

    @property
    def model_attention(self) -> str:
        """The model's ``attention``; with ``--fsdp`` not cuDNN's, which cannot be sharded that way."""
        return "einsum" if self.devices.fsdp > 1 else super().model_attention

    def over(self, num_devices: int) -> Self:
        """The same settings, with batch sizes filled in for this many devices.

        Raises:
          InputError: if a step cannot be split evenly.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, init=False)
class FineTuningSettings(TrainingSettings):
    """The further settings of programs that train, evaluate and predict on tables of rows."""

    program: ClassVar[str]

    do_train: bool = setting(False, "train; without --do_train, --do_eval and --do_predict: train and evaluate")
    do_eval: bool = setting(False, "evaluate on the validation set")
    do_predict: bool = setting(False, "write predictions for the test set", is_basic=True)
    data: OwnData = DataSettings()
    metric_for_best_model: str | None = setting(
        None, "the score that picks the best model, such as macro_f1; if unset, the main metric of the data"
    )
    batches: BatchSettings = BatchSettings()
    length: LengthSettings = LengthSettings()
    loss: SmoothingSettings = SmoothingSettings()

    def check(self) -> None:
        super().check()
        keeps_best = self.loop.load_best_model_at_end or self.loop.early_stopping_patience
        if keeps_best and not {"train", "eval"} <= self.phases:
            raise InputError("--load_best_model_at_end, --early_stopping_patience: need --do_train and --do_eval")
        for name in entries(type(self.loss)):
            if getattr(self.loss, name) and "train" not in self.phases:
                raise InputError(f"--{name}: needs --do_train")
        if self.metric_for_best_model and "eval" not in self.phases:
            raise InputError("--metric_for_best_model: needs --do_eval")

    @property
    def phases(self) -> set[str]:
        """What the run does: any of "train", "eval" and "predict"."""
        return {phase for phase in ("train", "eval", "predict") if getattr(self, f"do_{phase}")} or self.usual_phases

    @property
    def usual_phases(self) -> set[str]:
        """The phases of a run that is not told what to do."""
        return {"train", "eval"}

    def over(self, num_devices: int) -> Self:
        return self.replace(batches=self.batches.over(num_devices))


# Flags of some programs that others refuse.
OF_TEXT_TO_TEXT = dict.fromkeys(
    ("source_column", "target_column", "text_column", "summary_column", "source_prefix")
    + ("max_source_length", "max_target_length", "num_beams"),
    "is for `pats-jax text2text`; omit it",
)
OF_CLASSIFIERS = dict.fromkeys(
    ("dataset_name", "dataset_config_name", "class_weights", "label_smoothing_factor", "metric_for_best_model"),
    "is for `pats-jax train` and `pats-jax glue`; omit it",
)


@dataclasses.dataclass(frozen=True, init=False)
class Settings(FineTuningSettings):
    """Fine-tune a pretrained encoder, such as BERT, on a GLUE task or on your own files."""

    program: ClassVar[str] = "glue"
    elsewhere: ClassVar[Mapping[str, str]] = OF_TEXT_TO_TEXT

    do_predict: bool = setting(False, "write test-set predictions in the GLUE server's format", is_basic=True)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    loss: LossSettings = LossSettings()

    def check(self) -> None:
        super().check()
        if self.data.low_resource and "train" not in self.phases:
            raise InputError("--low_resource: needs --do_train")
        if self.data.out_of_domain and "eval" not in self.phases:
            raise InputError("--out_of_domain: needs --do_eval")


_A_TASK = "is for GLUE tasks; use `pats-jax glue`"


@dataclasses.dataclass(frozen=True, init=False)
class OwnDataSettings(Settings):
    """Fine-tune a pretrained encoder, such as BERT, on your own texts."""

    program: ClassVar[str] = "train"
    elsewhere: ClassVar[Mapping[str, str]] = OF_TEXT_TO_TEXT | dict.fromkeys(
        ("task_name", "data_dir", "out_of_domain", "out_of_domain_dir"), _A_TASK
    )

    data: DataSettings = DataSettings(validation_split_percentage=10.0)

    def check(self) -> None:
        if not self.data.own_name:
            raise InputError("no data: set --train_file or --dataset_name")
        super().check()

    @property
    def usual_phases(self) -> set[str]:
        """With ``--test_file`` the run also predicts."""
        return {"train", "eval"} | ({"predict"} if self.data.test_file else set())


Program = TypeVar("Program", bound=TunedModel)
Kind = TypeVar("Kind", bound=TrainingSettings)


def resuming(ours: Kind, saved: Kind) -> Kind:
    """The settings for resuming a saved run: unset ones are those that it chose, on the devices available now.

    Raises:
      InputError: if a setting that defines the run differs; the message names each one that does.
    """
    known, flat, theirs = ours.all_entries(), ours.flat(), saved.to_dict()
    unset = [flag for flag, value in flat.items() if value is None and known[flag].about.chosen_by_run]
    chosen = ours.replace(**{flag: theirs[flag] for flag in unset})
    own = chosen.to_dict()
    fixed = [flag for flag in own if flag in theirs and not known[flag].about.free_on_resume]
    differing = [flag for flag in fixed if own[flag] != theirs[flag]]
    if differing:
        changes = ", ".join(f"{flag} was {as_json(theirs[flag])} and is {as_json(own[flag])}" for flag in differing)
        raise InputError(f"--resume: {ours.folder.output_dir} holds a run with different settings: {changes}")
    return chosen
