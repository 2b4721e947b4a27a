"""What prompts and prefixes share: a matrix with one row per virtual token, and its name in the file."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, shown
from pats_jax.models.peft.config import FlatTree, PeftConfig
from pats_jax.models.peft.saved import CommonFields, FieldRules, ModelConfig, SavedModules
from pats_jax.models.seq2seq_config import Seq2SeqConfig

EMBEDDINGS = ("prompt_embeddings",)  # PEFT's name for it, and ours


class _Fields(CommonFields, total=False):
    """The fields that are read from the config of a prompt or prefix."""

    num_virtual_tokens: int | None
    token_dim: int | None
    num_layers: int | None
    num_attention_heads: int | None
    num_transformer_submodules: int | None


_SIZES_OF_ALL = ("token_dim", "num_transformer_submodules")


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """What PEFT writes of a model's sizes; of an encoder-decoder, they are the encoder's."""
    if isinstance(config, Seq2SeqConfig):
        width, layers, heads = config.d_model, config.num_layers_of["encoder"], config.heads_of["encoder"]
    else:
        width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    return {
        "token_dim": width,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 2 if isinstance(config, Seq2SeqConfig) else 1,
    }


# How a prompt or prefix is drawn before training; a saved one holds the vectors that came out.
_WITHOUT_EFFECT = (
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("prefix_projection", "encoder_hidden_size", "init_weights"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualTokensConfig(PeftConfig):
    """The settings of a method that adds virtual tokens.

    Attributes:
      length: number of virtual tokens; each takes one position from the text.
    """

    length: int

    prefix: ClassVar[str] = "base_model."
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields, _WITHOUT_EFFECT)

    @property
    def virtual_tokens(self) -> int:
        return self.length

    @classmethod
    def sizes(cls, model: ModelConfig) -> dict[str, int]:
        """The fields of a saved config that must match the model, with the model's values."""
        return {name: size for name, size in cls.all_sizes(model).items() if name in _SIZES_OF_ALL}

    @classmethod
    def all_sizes(cls, model: ModelConfig) -> dict[str, int]:
        """What PEFT writes of a model's sizes for this method."""
        return sizes_of(model)

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return {"num_virtual_tokens": self.length, **self.all_sizes(config)}

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "VirtualTokensConfig":
        if saved.get("task_type") is None:  # PEFT then leaves the virtual tokens out
            raise InputError(f"{saved.source}: task_type is null; virtual tokens are supported only for {saved.task!r}")
        for name, own in cls.sizes(saved.model).items():
            if saved.get(name, own) != own:
                raise InputError(
                    f"{saved.source}: {name} is {shown(saved.get(name))}, not {own}; it is for another base model"
                )
        length = saved.get("num_virtual_tokens", 0)
        saved.check_size("num_virtual_tokens", cls.rows(length, saved.model), EMBEDDINGS[0], 0)
        return cls(length=length)

    @classmethod
    def rows(cls, length: int, model: ModelConfig) -> int:
        """The rows of the matrix in the file."""
        return length

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        return {EMBEDDINGS[0]: np.asarray(tree[EMBEDDINGS], np.float32)}

    def from_tensors(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> FlatTree:
        return {tuple(name.split(".")): tensor for name, tensor in tensors.items()}
