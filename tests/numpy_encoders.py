"""DistilBERT, ELECTRA and MPNet in NumPy: how they differ from `NumpyBert`. All in the exact GELU."""

import numpy as np
from numpy_bert import NumpyBert, gelu


class NumpyDistilbert(NumpyBert):
    base, stack = "distilbert", "transformer.layer"
    projections = ("attention.q_lin", "attention.k_lin", "attention.v_lin")
    attention_output, wide, narrow = "attention.out_lin", "ffn.lin1", "ffn.lin2"
    blocks = ("attention", "ffn")

    def plain_norm(self, name, x):
        own = {"attention.LayerNorm": "sa_layer_norm", "ffn.LayerNorm": "output_layer_norm"}
        for block, norm in own.items():
            name = name.replace(block, norm)
        return super().plain_norm(name, x)

    def embed(self, words, token_type_ids, positions):
        return self.norm("distilbert.embeddings.LayerNorm", words + self.table("position")[positions])

    def head(self, features):
        return self.linear("classifier", np.maximum(self.linear("pre_classifier", features), 0))


class NumpyElectra(NumpyBert):
    base = "electra"

    def embed(self, words, token_type_ids, positions):
        return self.linear("electra.embeddings_project", super().embed(words, token_type_ids, positions))

    def head(self, features):
        return self.linear("classifier.out_proj", gelu(self.linear("classifier.dense", features)))


def mpnet_bucket(distance: int) -> int:
    """The bucket of a key's place minus a query's, by whole numbers alone.

    Each direction has 16 of the 32: 8 for 0 to 7, and 8 from there to 128, of which each begins sqrt(2) times as far
    away as the one before.
    """
    first, size = (16, distance) if distance > 0 else (0, -distance)
    if size < 8:
        return first + size
    return first + 8 + next(steps for steps in range(7, -1, -1) if size**2 >= 8**2 * 2**steps)


class NumpyMpnet(NumpyBert):
    base = "mpnet"
    projections = ("attention.attn.q", "attention.attn.k", "attention.attn.v")
    attention_output = "attention.attn.o"
    blocks = ("attention", "output")

    def positions(self, attention_mask, first):
        return np.where(attention_mask != 0, np.cumsum(attention_mask != 0, axis=1) + first + 1, 1)

    def embed(self, words, token_type_ids, positions):
        return self.norm("mpnet.embeddings.LayerNorm", words + self.table("position")[positions])

    def head(self, features):
        return self.linear("classifier.out_proj", np.tanh(self.linear("classifier.dense", features)))

    def position_bias(self, length):
        chosen = [[mpnet_bucket(key - query) for key in range(length)] for query in range(length)]
        return self.tensors["mpnet.encoder.relative_attention_bias.weight"][chosen].transpose(2, 0, 1)


CLASSES = {"distilbert": NumpyDistilbert, "electra": NumpyElectra, "mpnet": NumpyMpnet}
