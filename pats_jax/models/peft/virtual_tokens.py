"""What prompts and prefixes share: a matrix with one row per virtual token, and its name in the file."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, shown
from pats_jax.models.config import EncoderConfig
from pats_jax.models.peft.config import FlatTree, PeftConfig
from pats_jax.models.peft.saved import TASK, CommonFields, FieldRules, SavedModules

EMBEDDINGS = ("prompt_embeddings",)  # PEFT's name for it, and ours


class _Fields(CommonFields, total=False):
    """The fields that are read from the config of a prompt or prefix."""

    num_virtual_tokens: int | None
    token_dim: int | None
    num_layers: int | None
    num_attention_heads: int | None
    num_transformer_submodules: int | None


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
    def sizes(cls, model: EncoderConfig) -> dict[str, int]:
        """The fields of a saved config that must match the model, with the model's values."""
        return {"token_dim": model.hidden_size, "num_transformer_submodules": 1}

    def to_dict(self, tree: FlatTree, config: EncoderConfig) -> JsonObject:
        return {
            "num_virtual_tokens": self.length,
            "token_dim": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": 1,
        }

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "VirtualTokensConfig":
        if saved.get("task_type") is None:  # PEFT then leaves the virtual tokens out
            raise InputError(f"{saved.source}: task_type is null; virtual tokens are supported only for {TASK!r}")
        for name, own in cls.sizes(saved.model).items():
            if saved.get(name, own) != own:
                raise InputError(
                    f"{saved.source}: {name} is {shown(saved.get(name))}, not {own}; it is for another base model"
                )
        length = saved.get("num_virtual_tokens", 0)
        saved.check_size("num_virtual_tokens", length, EMBEDDINGS[0], 0)
        return cls(length=length)

    def to_tensors(self, tree: FlatTree) -> dict[str, np.ndarray]:
        return {EMBEDDINGS[0]: np.asarray(tree[EMBEDDINGS], np.float32)}

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> FlatTree:
        return {tuple(name.split(".")): tensor for name, tensor in tensors.items()}
