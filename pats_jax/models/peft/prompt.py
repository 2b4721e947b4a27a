r"""Prompt tuning: trained word embeddings before the text's own.

::

    embeddings = [p_1, ..., p_length, word embeddings of the text]

Positions start at p_1, the prompt has token type 0, and all tokens attend to it. A prompt works with ids and with
``inputs_embeds``. The p_i, (hidden,), start as the word embeddings of tokens drawn at random. As in PEFT, the head
reads the first position, which is p_1 rather than [CLS].

An encoder-decoder has the prompt before the source, and the decoder attends to it, too. As in PEFT, BART's scale of
word embeddings is not applied to it. PEFT's file holds a second prompt that nothing reads; ours has zeros there.

References:
  Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv:2104.08691).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import at_least, setting
from pats_jax.models import bart, t5
from pats_jax.models.encoder_decoder import EncoderDecoder
from pats_jax.models.peft.config import FlatTree, Interceptor, own_variable
from pats_jax.models.peft.saved import ModelConfig
from pats_jax.models.peft.virtual_tokens import EMBEDDINGS, VirtualTokensConfig
from pats_jax.models.seq2seq_config import BartConfig, Seq2SeqConfig, T5Config
from pats_jax.models.sequence_classifier import SequenceClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig(VirtualTokensConfig):
    """The settings of prompt tuning.

    Attributes:
      length: number of virtual tokens; each takes one position from the text.
    """

    length: int = setting(
        20,
        "prompt tuning: number of virtual tokens; each takes one position from the text",
        at_least(1, 8192),
        flag="prompt_length",
    )

    kind: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "trained word embeddings before the text's own"
    source: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        tokens = jax.random.randint(key, (self.length,), 0, config.vocab_size)
        return {EMBEDDINGS: jnp.take(base[_words(config)], tokens, axis=0)}

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        return self._before_source(config) if isinstance(config, Seq2SeqConfig) else self._before_text()

    def variables(self, tree: Any, config: ModelConfig, stacked: bool) -> Any:
        if not isinstance(config, Seq2SeqConfig):
            return tree
        return {"model": {"encoder": tree}} if isinstance(config, BartConfig) else {"encoder": tree}

    def _before_text(self) -> Interceptor:
        def prepend(next_fun, args, kwargs, context):
            model = context.module
            if not isinstance(model, SequenceClassifier) or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"), args, strict=False)) | kwargs
            if inputs.get("continue_from") is not None:
                raise ValueError("continue_from cannot be used with a prompt: its tokens are among the hidden states")
            ids = inputs.pop("input_ids", None)
            words = inputs["inputs_embeds"] if ids is None else model.embed(ids)
            inputs["inputs_embeds"] = _prepended(own_variable(model, *EMBEDDINGS), words)
            for name, filler in (("attention_mask", 1), ("token_type_ids", 0)):
                if inputs.get(name) is not None:
                    inputs[name] = self._longer(inputs[name], filler)
            return next_fun(**inputs)

        return prepend

    def _before_source(self, config: Seq2SeqConfig) -> Interceptor:
        longest = config.max_length

        def prepend(next_fun, args, kwargs, context):
            module, method = context.module, context.method_name
            if isinstance(module, EncoderDecoder) and method == "decode":
                target, felt, states, (own, mask), deterministic = args
                return next_fun(target, felt, states, (own, self._longer(mask, 1)), deterministic)
            if isinstance(module, EncoderDecoder) and method == "step":
                *others, mask = args
                return next_fun(*others, self._longer(mask, 1))
            is_stack = isinstance(module, bart.Stack | t5.Stack) and method == "__call__"
            if not is_stack or module.is_decoder:
                return next_fun(*args, **kwargs)
            words, (padding,), *others = args
            if longest is not None and words.shape[1] + self.length > longest:
                raise ValueError(
                    f"sequences have {words.shape[1]} tokens and the prompt {self.length}, "
                    f"but the model has {longest} positions"
                )
            padding = jnp.pad(padding, ((0, 0), (0, 0), (0, 0), (self.length, 0)))
            return next_fun(_prepended(own_variable(module, *EMBEDDINGS), words), (padding,), *others)

        return prepend

    def _longer(self, values: Any, filler: int) -> jax.Array:
        """What belongs to the tokens of a text, (batch, length), with a filler for the prompt."""
        return jnp.pad(jnp.asarray(values), ((0, 0), (self.length, 0)), constant_values=filler)

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return super().to_dict(tree, config) | {"prompt_tuning_init": "SAMPLE_VOCAB"}

    @classmethod
    def all_sizes(cls, model: ModelConfig) -> dict[str, int]:
        width = {} if isinstance(model, Seq2SeqConfig) else {"token_dim": model.embedding_size}
        return super().all_sizes(model) | width

    @classmethod
    def rows(cls, length: int, model: ModelConfig) -> int:
        return 2 * length if isinstance(model, Seq2SeqConfig) else length

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        tensors = super().to_tensors(tree, config)
        unread = self.rows(self.length, config) - self.length
        return {name: np.pad(x, ((0, unread), (0, 0))) for name, x in tensors.items()}

    def from_tensors(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> FlatTree:
        tree = super().from_tensors(tensors, config)
        return {path: x[: self.length] if path == EMBEDDINGS else x for path, x in tree.items()}


def _words(config: ModelConfig) -> tuple[str, ...]:
    """The path of the table of words."""
    if isinstance(config, Seq2SeqConfig):
        return ("shared", "embedding") if isinstance(config, T5Config) else ("model", "shared", "embedding")
    return (config.base_prefix, *config.words_path, "embedding")


def _prepended(vectors: jax.Array, words: jax.Array) -> jax.Array:
    """A prompt (length, hidden) before each row of embedded words (batch, length, hidden)."""
    prompt = jnp.broadcast_to(vectors, (len(words), *vectors.shape)).astype(words.dtype)
    return jnp.concatenate([prompt, words], axis=1)
