"""ModernBERT's classifier in NumPy, float64: each score by the definitions of window and rotation."""

import numpy as np
import scipy.special
from numpy_bert import NumpyBert, gelu


class NumpyModernbert(NumpyBert):
    """`NumpyBert` with ModernBERT's embeddings, layers and head; ``block_end(name, x, residual)`` closes a block."""

    def __init__(self, tensors, config):
        super().__init__(tensors, config)
        self.block_end = lambda name, x, residual: residual + x

    def plain_linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def plain_norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_eps)
        return scaled * self.tensors[f"{name}.weight"] + self.tensors.get(f"{name}.bias", 0)

    def logits(self, input_ids, attention_mask):
        """The logits, (batch, labels)."""
        words = self.tensors["model.embeddings.tok_embeddings.weight"][input_ids]
        if self.prompt is not None:
            rows, count = len(input_ids), len(self.prompt)
            words = np.concatenate([np.broadcast_to(self.prompt, (rows, *self.prompt.shape)), words], axis=1)
            attention_mask = np.concatenate([np.ones((rows, count)), attention_mask], axis=1)
        hidden = self.norm("model.embeddings.norm", words)
        for index in range(self.config.num_hidden_layers):
            hidden = self._layer(index, hidden, attention_mask)
        hidden = self.norm("model.final_norm", hidden)
        if self.config.classifier_pooling == "mean":
            weights = attention_mask / attention_mask.sum(1, keepdims=True)
            features = np.einsum("bl,blh->bh", weights, hidden)
        else:
            features = hidden[:, 0]
        features = self.norm("head.norm", gelu(self.linear("head.dense", features)))
        return self.linear("classifier", features)

    def _layer(self, index, hidden, attention_mask):
        name = f"model.layers.{index}"
        normed = self.norm(f"{name}.attn_norm", hidden) if index else hidden
        attended = self._attention(index, f"{name}.attn.Wqkv", normed, attention_mask)
        hidden = self.block_end(f"{name}.attn", self.linear(f"{name}.attn.Wo", attended), hidden)
        inner, gate = np.split(self.linear(f"{name}.mlp.Wi", self.norm(f"{name}.mlp_norm", hidden)), 2, axis=-1)
        return self.block_end(f"{name}.mlp", self.linear(f"{name}.mlp.Wo", gelu(inner) * gate), hidden)

    def _attention(self, index, name, hidden, attention_mask):
        query, key, value = map(self._split, np.split(self.linear(name, hidden), 3, axis=-1))
        is_local = index % self.config.global_attn_every_n_layers != 0
        theta = self.config.local_rope_theta if is_local else self.config.global_rope_theta
        places = np.arange(hidden.shape[1])
        distance = np.abs(places[:, None] - places)
        seen = distance <= self.config.local_attention // 2 if is_local else np.full_like(distance, True, bool)
        seen = seen & (attention_mask[:, None, :] != 0)
        prefix = [[] for _ in query], [[] for _ in query]
        if self.prefix is not None:
            prefix = tuple(self._split(x) for x in self.prefix[index])
            seen = np.concatenate([np.full((*seen.shape[:2], len(self.prefix[index][0])), True), seen], axis=-1)
        heads = []
        for q, k, v, own_key, own_value in zip(query, key, value, *prefix, strict=True):
            k, v = (_before(own, x) for own, x in ((own_key, turned(k, theta)), (own_value, v)))
            scores = turned(q, theta) @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
            heads.append(scipy.special.softmax(np.where(seen, scores, -1e9), axis=-1) @ v)
        return np.concatenate(heads, axis=-1)


def turned(x, theta):
    """Units i and i + width / 2 as a complex number, times e^(i angle)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] * theta ** (-np.arange(half) / half)
    product = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([product.real, product.imag], axis=-1)


def _before(prefix, x):
    return x if len(prefix) == 0 else np.concatenate([np.broadcast_to(prefix, (len(x), *prefix.shape)), x], axis=1)
