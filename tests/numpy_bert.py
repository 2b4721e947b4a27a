"""BERT's classifier in NumPy, float64, from tensors by their Hugging Face names, with places for PE modules."""

from collections.abc import Callable, Mapping

import numpy as np
import scipy.special

Tensors = Mapping[str, np.ndarray]


def gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


class NumpyBert:
    """The forward pass, of which a test replaces parts, and other encoders the names and formulas.

    Attributes:
      linear: ``linear(name, x)``: the layer of that name.
      norm: ``norm(name, x)``: the LayerNorm of that name.
      block_end: ``block_end(name, x, residual)``: what closes a block, given its projection's output.
      prompt: word embeddings before the text's, (tokens, hidden), or None.
      prefix: ``prefix[layer] = (keys, values)``, (tokens, hidden) each, or None.
    """

    base, stack = "bert", "encoder.layer"
    projections = ("attention.self.query", "attention.self.key", "attention.self.value")
    attention_output, wide, narrow = "attention.output.dense", "intermediate.dense", "output.dense"
    blocks = ("attention.output", "output")  # where adapters are
    activation = staticmethod(gelu)

    def __init__(self, tensors: Tensors, config):
        self.tensors = {name: np.float64(x) for name, x in tensors.items()}
        self.config = config
        self.linear: Callable = self.plain_linear
        self.norm: Callable = self.plain_norm
        self.block_end: Callable = lambda name, x, residual: self.norm(f"{name}.LayerNorm", residual + x)
        self.prompt: np.ndarray | None = None
        self.prefix: list[tuple[np.ndarray, np.ndarray]] | None = None

    def plain_linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def plain_norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_eps)
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def logits(self, input_ids, attention_mask, token_type_ids):
        """The logits, (batch, labels)."""
        words, first = self.table("word")[input_ids], 0
        if self.prompt is not None:
            rows, count = len(input_ids), len(self.prompt)
            words = np.concatenate([np.broadcast_to(self.prompt, (rows, *self.prompt.shape)), words], axis=1)
            attention_mask = np.concatenate([np.ones((rows, count)), attention_mask], axis=1)
            token_type_ids = np.concatenate([np.zeros((rows, count), int), token_type_ids], axis=1)
        if self.prefix is not None:
            first = len(self.prefix[0][0])
        hidden = self.embed(words, token_type_ids, self.positions(attention_mask, first))
        if self.prefix is not None:
            attention_mask = np.concatenate([np.ones((len(input_ids), first)), attention_mask], axis=1)
        for index in range(self.config.num_hidden_layers):
            hidden = self._layer(index, hidden, attention_mask)
        return self.head(hidden[:, 0])

    def table(self, name):
        return self.tensors[f"{self.base}.embeddings.{name}_embeddings.weight"]

    def positions(self, attention_mask, first):
        return first + np.arange(attention_mask.shape[1])

    def embed(self, words, token_type_ids, positions):
        hidden = words + self.table("token_type")[token_type_ids] + self.table("position")[positions]
        return self.norm(f"{self.base}.embeddings.LayerNorm", hidden)

    def head(self, features):
        return self.linear("classifier", np.tanh(self.linear("bert.pooler.dense", features)))

    def position_bias(self, length):
        """What is added to the scores of each head, (heads, length, length)."""
        return np.zeros((self.config.num_attention_heads, length, length))

    def _layer(self, index, hidden, attention_mask):
        name = f"{self.base}.{self.stack}.{index}"
        query, key, value = (self.linear(f"{name}.{part}", hidden) for part in self.projections)
        bias = self.position_bias(hidden.shape[1])
        if self.prefix is not None:
            own_key, own_value = self.prefix[index]
            key = np.concatenate([np.broadcast_to(own_key, (len(key), *own_key.shape)), key], axis=1)
            value = np.concatenate([np.broadcast_to(own_value, (len(value), *own_value.shape)), value], axis=1)
            bias = np.pad(bias, ((0, 0), (0, 0), (len(own_key), 0)))
        heads = [
            self._attend(*parts, attention_mask)
            for parts in zip(*map(self._split, (query, key, value)), bias, strict=True)
        ]
        attended = self.linear(f"{name}.{self.attention_output}", np.concatenate(heads, axis=-1))
        attended = self.block_end(f"{name}.{self.blocks[0]}", attended, hidden)
        wide = self.activation(self.linear(f"{name}.{self.wide}", attended))
        return self.block_end(f"{name}.{self.blocks[1]}", self.linear(f"{name}.{self.narrow}", wide), attended)

    def _split(self, x):
        return np.split(x, self.config.num_attention_heads, axis=-1)

    def _attend(self, query, key, value, bias, attention_mask):
        scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1]) + bias
        scores = np.where(attention_mask[:, None, :] != 0, scores, -np.inf)
        return scipy.special.softmax(scores, axis=-1) @ value
