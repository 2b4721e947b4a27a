r"""Prompt tuning: trained word embeddings before the text's own.

::

    embeddings = [p_1, ..., p_length, word embeddings of the text]

Positions start at p_1, the prompt has token type 0, and all tokens attend to it. A prompt works with ids and with
``inputs_embeds``. The p_i, (hidden,), start as the word embeddings of tokens drawn at random. As in PEFT, the head
reads the first position, which is p_1 rather than [CLS].

References:
  Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv:2104.08691).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import at_least, setting
from pats_jax.models.bert import SequenceClassifier
from pats_jax.models.config import EncoderConfig
from pats_jax.models.peft.config import FlatTree, Interceptor, own_variable
from pats_jax.models.peft.virtual_tokens import EMBEDDINGS, VirtualTokensConfig


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

    def draw(self, base: FlatTree, config: EncoderConfig, key: jax.Array) -> FlatTree:
        words = base[config.base_prefix, "embeddings", "word_embeddings", "embedding"]
        tokens = jax.random.randint(key, (self.length,), 0, config.vocab_size)
        return {EMBEDDINGS: jnp.take(words, tokens, axis=0)}

    def interceptor(self, config: EncoderConfig, deterministic: bool) -> Interceptor:
        def prepend(next_fun, args, kwargs, context):
            model = context.module
            if not isinstance(model, SequenceClassifier) or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"), args, strict=False)) | kwargs
            if inputs.get("continue_from") is not None:
                raise ValueError("continue_from cannot be used with a prompt: its tokens are among the hidden states")
            ids = inputs.pop("input_ids", None)
            words = inputs["inputs_embeds"] if ids is None else model.embed(ids)
            rows = len(words)
            vectors = own_variable(model, *EMBEDDINGS)
            prompt = jnp.broadcast_to(vectors, (rows, *vectors.shape)).astype(words.dtype)
            inputs["inputs_embeds"] = jnp.concatenate([prompt, words], axis=1)
            for name, filler in (("attention_mask", 1), ("token_type_ids", 0)):
                if inputs.get(name) is not None:
                    of_prompt = jnp.full((rows, self.length), filler, jnp.asarray(inputs[name]).dtype)
                    inputs[name] = jnp.concatenate([of_prompt, inputs[name]], axis=1)
            return next_fun(**inputs)

        return prepend

    def to_dict(self, tree: FlatTree, config: EncoderConfig) -> JsonObject:
        return super().to_dict(tree, config) | {"prompt_tuning_init": "SAMPLE_VOCAB"}
