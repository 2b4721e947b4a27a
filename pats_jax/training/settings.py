"""The settings of a training run: batches, loop, checkpoints, devices."""

import dataclasses
from typing import ClassVar, Literal, Self

from pats_jax.core.settings import POSITIVE, PROBABILITY, Group, Range, at_least, setting
from pats_jax.errors import InputError

# The settings that are arrays in the step, so each lane may have its own; in a run alone, those of the optimizer are.
LANE_NUMBERS = (
    "learning_rate",
    "weight_decay",
    "noise_scale",
    "decay",
    "r3f_lambda",
    "r_drop_alpha",
    "smart_alpha",
    "lnsr_lambda",
)
OF_A_LANE = {*LANE_NUMBERS, "seed", "response", "output_dir"}
LANES_ON_CPU = 4  # where nobody says how many


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 device`` or ``2 devices``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclasses.dataclass(frozen=True)
class BatchSettings(Group):
    """The rows of a step, and how they are padded."""

    title: ClassVar[str] = "batches"

    per_device_train_batch_size: int = setting(
        32, "rows per device and micro-batch", at_least(1), is_basic=True, free_on_resume=True
    )
    per_device_eval_batch_size: int = setting(64, "rows per device", at_least(1, 65_536), free_on_resume=True)
    gradient_accumulation_steps: int = setting(
        1, "micro-batches per device in one optimizer step", at_least(1), free_on_resume=True
    )
    train_batch_size: int | None = setting(
        None,
        "rows per optimizer step over all devices; sets the per-device size",
        at_least(1),
        chosen_by_run=True,
    )
    length_buckets: int | None = setting(
        None,
        "maximum number of padded lengths in training; if unset, as many as are worth compiling",
        at_least(1),
        chosen_by_run=True,
    )

    def over(self, num_devices: int) -> Self:
        """The same settings with both batch sizes filled in for this many devices.

        ``train_batch_size`` is the product of rows, devices and micro-batches; if it is given, it
        determines ``per_device_train_batch_size``, so that a run is the same on other devices.

        Raises:
          InputError: if train_batch_size cannot be split evenly.
        """
        parts = num_devices * self.gradient_accumulation_steps
        total = self.train_batch_size or self.per_device_train_batch_size * parts
        if total % parts:
            raise InputError(
                f"--train_batch_size {total}: cannot be split evenly across {counted(num_devices, 'device')} "
                f"with --gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        return dataclasses.replace(self, train_batch_size=total, per_device_train_batch_size=total // parts)


@dataclasses.dataclass(frozen=True)
class LengthSettings(Group):
    """How long to train."""

    title: ClassVar[str] = "length"

    num_train_epochs: float = setting(
        3.0,
        "passes over the training data",
        Range(POSITIVE.holds, POSITIVE.text, 1_000_000),
        is_basic=True,
    )
    max_steps: int = setting(
        -1,
        "optimizer steps; -1: as many as the epochs take",
        Range(lambda x: x >= 1 or x == -1, "at least 1, or -1 for as many as the epochs take"),
    )
    sensitivity_batches: int | None = setting(
        None,
        "measure sensitivity on N batches before and after training; if unset, 8 with PATS",
        at_least(0),
        chosen_by_run=True,
    )


@dataclasses.dataclass(frozen=True)
class SmoothingSettings(Group):
    """The loss of classes, or of words."""

    title: ClassVar[str] = "loss"

    label_smoothing_factor: float = setting(0.0, "share of the loss that all classes have alike", PROBABILITY)


@dataclasses.dataclass(frozen=True)
class LossSettings(SmoothingSettings):
    """The loss of classes."""

    class_weights: Literal["balanced"] | None = setting(
        None, "balanced: rows of class c count n / (k n_c), for n rows of k classes, n_c of them of c"
    )


@dataclasses.dataclass(frozen=True)
class LoopSettings(Group):
    """When to log, evaluate and stop."""

    title: ClassVar[str] = "loop"

    logging_steps: int = setting(10, "log to metrics.jsonl every N steps", at_least(1))
    eval_steps: int | None = setting(
        None, "evaluate every N steps; if unset, after each epoch, or about five times in priming", at_least(1)
    )
    early_stopping_patience: int | None = setting(None, "stop after N evaluations without a better score", at_least(1))
    load_best_model_at_end: bool = setting(False, "keep the model with the best score, not the last one")
    max_nonfinite_steps: int = setting(
        5,
        "skip up to N steps with a non-finite loss or gradient, then stop",
        at_least(0),
        free_on_resume=True,
    )
    report_to: Literal["none", "tensorboard"] = setting(
        "none", "where to log, besides metrics.jsonl", free_on_resume=True
    )
    profile: bool = setting(
        False,
        "profile ten steps with JAX's profiler; the trace goes to output_dir/profile",
        free_on_resume=True,
    )


@dataclasses.dataclass(frozen=True)
class SavingSettings(Group):
    """When to save checkpoints."""

    title: ClassVar[str] = "checkpoints"

    save_steps: int = setting(
        500,
        "save a checkpoint every N steps, and at the end of longer runs; 0: only when interrupted",
        at_least(0),
        free_on_resume=True,
    )
    save_total_limit: int | None = setting(
        2, "keep the N newest checkpoints, and the best one; None: all", at_least(1), free_on_resume=True
    )


@dataclasses.dataclass(frozen=True)
class DeviceSettings(Group):
    """Which devices to use, and how they share the work."""

    title: ClassVar[str] = "devices"

    parallel: Literal["jit", "pmap"] = setting(
        "jit", "how devices share the work: jit over a mesh, or pmap", free_on_resume=True
    )
    fsdp: int = setting(1, "shard parameters and optimizer state over N devices", at_least(1), free_on_resume=True)
    num_devices: int | None = setting(None, "use only N devices; if unset, all", at_least(1), free_on_resume=True)


@dataclasses.dataclass(frozen=True)
class ProcessSettings(Group):
    """Several processes, outside Slurm and TPU pods, where they find each other by themselves."""

    title: ClassVar[str] = "processes"

    coordinator_address: str | None = setting(None, "HOST:PORT of process 0", of_one_start=True)
    num_processes: int | None = setting(
        None, "total number of processes; needs coordinator_address", at_least(1), of_one_start=True
    )
    process_id: int | None = setting(
        None, "number of this process, from 0; needs coordinator_address", at_least(0), of_one_start=True
    )
    heartbeat_timeout_seconds: int = setting(
        100, "stop if another process does not respond for this long", at_least(1), free_on_resume=True
    )

    def check(self) -> None:
        super().check()
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            raise InputError(f"--process_id {self.process_id}: must be less than --num_processes {self.num_processes}")


@dataclasses.dataclass(frozen=True)
class CompilerSettings(Group):
    """How programs are compiled."""

    title: ClassVar[str] = "compilation"

    deterministic: bool = setting(False, "on a GPU: bit-for-bit reproducible, but slower; no effect elsewhere")
    compilation_cache_dir: str | None = setting(
        None,
        "folder for compiled programs; if unset, in your cache folder; none: keep none",
        is_path=True,
        free_on_resume=True,
    )
