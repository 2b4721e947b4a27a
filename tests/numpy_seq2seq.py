"""T5 and BART in NumPy, from the formulas, with places in which the tests of adapters act."""

import numpy as np
from flax.traverse_util import flatten_dict
from scipy.special import erf, softmax

from pats_jax.models.relative_positions import buckets
from pats_jax.models.seq2seq_config import T5Config


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def of(params, config):
    """The reference of a model; its methods may be replaced."""
    return (NumpyT5 if isinstance(config, T5Config) else NumpyBart)(params, config)


class Reference:
    """What the two have in common.

    Attributes:
      p: the parameters by their dotted names.
      prompt: before the source's embeddings, (length, hidden), or None.
    """

    def __init__(self, params, config):
        self.p = {".".join(path): np.asarray(x, np.float64) for path, x in flatten_dict(params).items()}
        self.config, self.prompt = config, None

    def linear(self, name, x):
        return x @ self.p[f"{name}.kernel"] + self.p.get(f"{name}.bias", 0)

    def prefix(self, name):
        """Keys and values before those of an attention, (length, units) each."""
        return None

    def adapt(self, name, x, residual, norm):
        """What is added to the residual after a block."""
        return x

    def first_position(self, side):
        return 0

    def attention(self, name, projections, hidden, states, bias, heads, scale):
        """``bias`` is that of the last keys, (..., heads or 1, queries or 1, keys); more keys before them get 0."""
        query, key, value, output = (f"{name}.{projection}" for projection in projections)
        q, k, v = self.linear(query, hidden), self.linear(key, states), self.linear(value, states)
        prefix = self.prefix(name)
        if prefix is not None:
            k, v = (
                np.concatenate([np.tile(x, (len(k), 1, 1)), y], axis=1) for x, y in zip(prefix, (k, v), strict=True)
            )
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
        scores[..., scores.shape[-1] - bias.shape[-1] :] += bias
        mixed = np.einsum("bhqk,bkhd->bqhd", softmax(scores, axis=-1), v)
        return self.linear(output, mixed.reshape(*mixed.shape[:2], -1))

    def logits(self, batch):
        """(batch, target length, vocab_size)."""
        ids, mask, labels = (np.asarray(batch[name]) for name in ("input_ids", "attention_mask", "labels"))
        words = self.embed(ids)
        if self.prompt is not None:
            words = np.concatenate([np.tile(self.prompt, (len(ids), 1, 1)), words], axis=1)
            mask = np.concatenate([np.ones((len(ids), len(self.prompt))), mask], axis=1)
        padding = np.where(mask[:, None, None] != 0, 0, -1e30)
        target = np.concatenate([np.full((len(labels), 1), self.config.decoder_start_token_id), labels[:, :-1]], axis=1)
        target = np.where(target == -100, self.config.pad_token_id, target)
        causal = np.where(np.tri(target.shape[1]), 0, -1e30)[None, None]
        states = self.stack("encoder", words, padding, None, None)
        return self.head(self.stack("decoder", self.embed(target), causal, states, padding))


class NumpyT5(Reference):
    names = ("q", "k", "v", "o")

    def norm(self, name, x):
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.layer_norm_epsilon) * self.p[f"{name}.scale"]

    def embed(self, ids):
        return self.p["shared.embedding"][ids]

    def relative(self, side, queries, keys):
        """Of queries that end where the keys end."""
        distances = np.arange(keys)[None] - (np.arange(queries) + keys - queries)[:, None]
        config = self.config
        chosen = buckets(
            distances,
            bidirectional=side == "encoder",
            count=config.relative_attention_num_buckets,
            farthest=config.relative_attention_max_distance,
        )
        return np.moveaxis(self.p[f"{side}.relative_attention_bias.embedding"][chosen], 2, 0)[None]

    def own_bias(self, side, length, bias):
        return self.relative(side, length, length) + bias

    def stack(self, side, x, bias, states, padding):
        config, bias = self.config, self.own_bias(side, x.shape[1], bias)
        for number in range(config.num_layers_of[side]):
            block = f"{side}.block.{number}.layer"

            def residual(sublayer, compute, x):
                name = f"{block}.{sublayer}"  # noqa: B023
                added = compute(name, self.norm(f"{name}.layer_norm", x))
                return x + self.adapt(name, added, x, lambda y: y)

            def attend(name, h):
                return self.attention(f"{name}.SelfAttention", self.names, h, h, bias, config.num_heads, 1.0)

            def cross(name, h):
                name = f"{name}.EncDecAttention"
                return self.attention(name, self.names, h, states, padding, config.num_heads, 1.0)

            x = residual(0, attend, x)
            if states is not None:
                x = residual(1, cross, x)
            x = residual(1 if states is None else 2, self.feed_forward, x)
        return self.norm(f"{side}.final_layer_norm", x)

    def feed_forward(self, name, h):
        name = f"{name}.DenseReluDense"
        wide = tanh_gelu(self.linear(f"{name}.wi_0", h)) * self.linear(f"{name}.wi_1", h)
        return self.linear(f"{name}.wo", wide)

    def head(self, x):
        return self.linear("lm_head", x)


class NumpyBart(Reference):
    names = ("q_proj", "k_proj", "v_proj", "out_proj")

    def norm(self, name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
        return centred / deviation * self.p[f"{name}.scale"] + self.p[f"{name}.bias"]

    def embed(self, ids):
        return self.p["model.shared.embedding"][ids] * (self.config.d_model**0.5 if self.config.scale_embedding else 1)

    def stack(self, side, x, bias, states, padding):
        config, start = self.config, f"model.{side}"
        first = 2 + self.first_position(side)
        x = x + self.p[f"{start}.embed_positions.embedding"][first : first + x.shape[1]]
        x = self.norm(f"{start}.layernorm_embedding", x)
        heads = config.heads_of[side]
        scale = (config.d_model // heads) ** -0.5
        for number in range(config.num_layers_of[side]):
            layer = f"{start}.layers.{number}"

            def residual(place, norm, added, x):
                name, norm = f"{layer}.{place}", f"{layer}.{norm}"  # noqa: B023
                return self.norm(norm, x + self.adapt(name, added, x, lambda y: self.norm(norm, y)))

            added = self.attention(f"{layer}.self_attn", self.names, x, x, bias, heads, scale)
            x = residual("self_attn", "self_attn_layer_norm", added, x)
            if states is not None:
                added = self.attention(f"{layer}.encoder_attn", self.names, x, states, padding, heads, scale)
                x = residual("encoder_attn", "encoder_attn_layer_norm", added, x)
            added = self.linear(f"{layer}.fc2", gelu(self.linear(f"{layer}.fc1", x)))
            x = residual("output", "final_layer_norm", added, x)
        return x

    def head(self, x):
        return x @ self.p["model.shared.embedding"].T
