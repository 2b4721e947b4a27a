"""What an encoder consists of: `Encoder`, of which each family's file defines one."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import flax.linen as nn
from jax import Array
from jax.typing import DTypeLike

from pats_jax.models.config import EncoderConfig


class Head(Protocol):
    """Computes logits (batch, labels) from what a model returns first.

    It is called inside the classifier, so that its modules are named as the checkpoint's tensors are.
    """

    def __call__(
        self, config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
    ) -> Array: ...


class MaskedLanguageModel(NamedTuple):
    """The masked-language-model head of a family's checkpoints, whose decoder is tied to the word embeddings.

    Attributes:
      head: ``head(config)(hidden, word_embeddings)`` gives float32 logits (..., vocab_size).
      prefix: what its tensors' names start with.
      own_names: beginning of a parameter's path in the head -> how it begins in the checkpoint, below the prefix.
      decoder: the decoder's module, whose weight and bias some checkpoints hold a second time; None: ``decoder`` below
        the prefix.
    """

    head: Callable[[EncoderConfig], nn.Module]
    prefix: tuple[str, ...]
    own_names: Mapping[tuple[str, ...], tuple[str, ...]]
    decoder: tuple[str, ...] | None = None

    @property
    def decoder_path(self) -> tuple[str, ...]:
        """The path of the decoder's module in a checkpoint."""
        return (*self.prefix, "decoder") if self.decoder is None else self.decoder

    def checkpoint_path(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """The path of one of the head's parameters in a checkpoint."""
        for start, own in self.own_names.items():
            if path[: len(start)] == start:
                return (*self.prefix, *own, *path[len(start) :])
        return (*self.prefix, *path)


class Encoder(NamedTuple):
    """How a family of encoders is computed.

    Attributes:
      config: its config class, which says what model types it reads.
      model: ``model(config, dtype, form)``, called as `bert.BertModel` is; it returns what the head reads and the
        hidden states.
      head: the sequence classification head.
      masked_lm: the masked-language-model head; None if its checkpoints have none.
    """

    config: type[EncoderConfig]
    model: Callable[..., nn.Module]
    head: Head
    masked_lm: MaskedLanguageModel | None
