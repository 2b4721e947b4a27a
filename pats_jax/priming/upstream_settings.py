"""The settings of `pats-jax prime`."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pats_jax.core.settings import POSITIVE, Flat, Group, Preset, at_least, entries, setting
from pats_jax.data.settings import GymDataSettings
from pats_jax.errors import InputError
from pats_jax.methods.settings import OptimizerSettings
from pats_jax.models.settings import ModelSettings
from pats_jax.priming import crossfit_recipe
from pats_jax.priming.text_settings import TextSettings
from pats_jax.run.settings import OF_CLASSIFIERS, TrainingSettings
from pats_jax.training.settings import counted

_MOST_ROWS = 2**20  # of a step, which is drawn whole in memory


@dataclasses.dataclass(frozen=True)
class UpstreamSettings(Group):
    """The upstream stage: its algorithm, what it trains, and its steps."""

    title: ClassVar[str] = "upstream"

    algorithm: Literal["mtl", "maml", "fomaml", "reptile"] = setting(
        "mtl", "multi-task learning (mtl), or a meta-learner", is_basic=True
    )
    train: Literal["plm", "pe", "plm+pe"] = setting(
        "plm", "what to train: model, adapter (--peft), or both", is_basic=True
    )
    head: Literal["embedding", "pair", "mlm", "generate", "likelihood"] = setting(
        "embedding", "how to score the options; T5, BART: generate answers, or likelihood of options", is_basic=True
    )
    max_steps: int = setting(1000, "outer steps", at_least(1), is_basic=True)
    max_options: int = setting(
        6, "if a training row has more, keep the right one and draw the others at random", at_least(2, 1000)
    )
    tasks_per_step: int = setting(
        4, "tasks per step, over all devices and micro-batches", at_least(1, 8192), is_basic=True
    )
    task_batch_size: int = setting(
        8, "rows per task: mtl trains on them; maml and fomaml test adapted parameters on them", at_least(1, 8192)
    )
    inner_learning_rate: float = setting(1e-5, "meta-learners: learning rate of the inner steps (plain SGD)", POSITIVE)
    inner_steps: int = setting(1, "meta-learners: inner steps on each task's training rows", at_least(1, 1000))
    inner_batch_size: int = setting(16, "meta-learners: rows per inner step", at_least(1, 8192))
    gradient_accumulation_steps: int = setting(
        1, "micro-batches per device in one outer step", at_least(1), free_on_resume=True
    )
    per_device_eval_batch_size: int = setting(64, "rows per device", at_least(1, 65_536), free_on_resume=True)

    def check(self) -> None:
        super().check()
        rows = self.tasks_per_step * (self.task_batch_size + self.inner_steps * self.inner_batch_size)
        if rows > _MOST_ROWS:
            raise InputError(
                f"--tasks_per_step, --task_batch_size, --inner_steps, --inner_batch_size: a step has {rows} rows; "
                f"reduce it to at most {_MOST_ROWS}"
            )

    def check_split(self, num_devices: int) -> None:
        """Raises InputError if the tasks of a step cannot be split evenly across ``num_devices`` devices."""
        if self.tasks_per_step % (num_devices * self.gradient_accumulation_steps):
            raise InputError(
                f"--tasks_per_step {self.tasks_per_step}: cannot be split evenly across "
                f"{counted(num_devices, 'device')} "
                f"with --gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )


_BATCH_FLAGS = ("per_device_train_batch_size", "train_batch_size")


@dataclasses.dataclass(frozen=True, init=False)
class PrimingSettings(TrainingSettings):
    """Prime a pretrained model, its adapters or both on the upstream tasks of a few-shot gym."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(_BATCH_FLAGS, "use --tasks_per_step, --task_batch_size"),
        **{flag: hint for flag, hint in OF_CLASSIFIERS.items() if flag not in entries(TextSettings)},
    }
    former: ClassVar[frozenset[str]] = frozenset(_BATCH_FLAGS)
    presets: ClassVar[Mapping[str, Preset]] = {"crossfit": crossfit_recipe.upstream}

    preset: Literal["crossfit"] | None = setting(
        None, "crossfit: the defaults of CrossFit's recipe, for T5 and BART", is_basic=True, of_one_start=True
    )
    model: ModelSettings = ModelSettings()
    data: GymDataSettings = GymDataSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    text: TextSettings = TextSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=3e-5, max_grad_norm=0.1)

    def check(self) -> None:
        super().check()
        train, head = self.upstream.train, self.upstream.head
        self.text.check_read(head, is_read=head in ("generate", "likelihood"))
        if ("pe" in train.split("+")) != (self.peft is not None):
            missing = "needs an adapter; set --peft" if self.peft is None else "trains no adapter; omit --peft"
            raise InputError(f"--train {train}: {missing}")
        if self.optimizer.lora_plus_ratio != 1 and train != "pe":
            raise InputError("--lora_plus_ratio: needs --train pe; it is not for the model's own parameters")
        for method in self.methods:
            if method.has("objective") or method.has("gradient") or method.trainable or method.has("around"):
                raise InputError(f"--method {method.name}: not available for priming; it works only with pats-jax glue")
        if self.model.attention == "cudnn":
            raise InputError("--attention cudnn: not available for priming; omit the flag")

    def over(self, num_devices: int) -> Self:
        self.upstream.check_split(num_devices)
        return self

    @classmethod
    def renamed(cls, saved: Flat) -> Flat:
        """The current names: the first version wrote task_batch_size as query_batch_size."""
        saved = super().renamed(saved)
        if "query_batch_size" not in saved:
            return saved
        return {"task_batch_size" if key == "query_batch_size" else key: value for key, value in saved.items()}
