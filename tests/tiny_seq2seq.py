"""A tiny T5 and a tiny BART with tokenizers, and texts that they learn to copy or to reverse."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from pats_jax import models
from pats_jax.models.bart import Bart
from pats_jax.models.seq2seq_config import BartConfig, T5Config

WORDS = tuple("ant bee cat dog eel fox gnu hen ibis jay".split())
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
BART_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@functools.cache
def tokenizer(kind):
    """T5's knows whole words, BART's bytes and the words."""
    import transformers

    if kind == "t5":
        vocabulary = [(token, 0.0) for token in T5_SPECIAL] + [(f"▁{word}", -1.0) for word in WORDS] + [("▁", -2.0)]
        return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    names = (*BART_SPECIAL, *_byte_tokens())
    return transformers.RobertaTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])


def _byte_tokens():
    import tokenizers

    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def config(kind, **changes):
    size = len(tokenizer(kind)) + 3  # more ids than the tokenizer has, as T5's checkpoints
    if kind == "t5":
        sizes = {"vocab_size": size, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
        return T5Config(**{**sizes, "num_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.0, **changes})
    sizes = {"vocab_size": size, "d_model": 16, "max_position_embeddings": 64}
    sizes |= {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in _BART_SIDE.items()}
    return BartConfig(**{**sizes, "dropout": 0.0, **changes})


_BART_SIDE = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}


def save_checkpoint(folder: Path, kind: str = "t5", **changes) -> Path:
    """Writes a random checkpoint, drawn without compiling anything; changes are of its config."""
    made = config(kind, **changes)
    model = models.T5(made) if isinstance(made, T5Config) else Bart(made)
    ids = jnp.ones((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, labels=ids))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim < 2:
            return np.full(leaf.shape, path[-1].key == "scale", np.float32)
        width = leaf.shape[0] if path[-1].key == "kernel" else 4
        return (rng.normal(size=leaf.shape) / width**0.5).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    models.save_pretrained(folder, params=params, config=made, tokenizer=tokenizer(kind))
    return folder


def pairs(rows: int, seed: int, words: tuple[int, int] = (1, 4), reverse: bool = False) -> list[tuple[str, str]]:
    """Sources of some words, and the same words, in their order or reversed."""
    rng = np.random.default_rng(seed)
    drawn = [list(rng.choice(WORDS, rng.integers(words[0], words[1] + 1))) for _ in range(rows)]
    return [(" ".join(row), " ".join(row[::-1] if reverse else row)) for row in drawn]


def write_pairs(path: Path, rows: list[tuple[str, str]], names: tuple[str, str] = ("source", "target")) -> Path:
    return tiny.write_table(path, names, *rows)
