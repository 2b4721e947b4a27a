"""What prompts and prefixes have in common: one matrix with a row for each virtual token, and its place in the file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from pats_jax.models.config import EncoderConfig
from pats_jax.models.peft.config import FlatTree, PeftConfig, check

EMBEDDINGS = ("prompt_embeddings",)  # PEFT's name for it, and ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualTokensConfig(PeftConfig):
    """The settings of a kind that adds virtual tokens.

    Attributes:
        length: Virtual tokens; so many fewer positions are left for the text.
    """

    length: int = 20

    prefix: ClassVar[str] = "base_model."

    def __post_init__(self):
        what = f"{self.kind}_length"
        check(what, self.length, isinstance(self.length, int) and self.length >= 1, "a whole number above 0")

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def to_dict(self, tree: FlatTree, config: EncoderConfig) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.length,
            "token_dim": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": 1,
        }

    def to_tensors(self, tree: FlatTree) -> dict[str, np.ndarray]:
        return {EMBEDDINGS[0]: np.asarray(tree[EMBEDDINGS], np.float32)}

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> FlatTree:
        return {tuple(name.split(".")): tensor for name, tensor in tensors.items()}
