"""A T5 checkpoint and a gym with text-to-text tasks, small enough for the programs to run on in seconds."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from pats_jax import models
from pats_jax.models.seq2seq_config import config_from_dict

WORDS = (*tiny.GOOD, *tiny.BAD, *tiny.NAMES, "and", "is", ".", "(A)", "(B)", "(C)", "1", "2", "3")
TASKS = ("weather", "voice", "watched", "manners", "choice", "copy", "who", "names")
VOCABULARY = ("<pad>", "</s>", "<unk>", *WORDS, *(f"[{name}]" for name in TASKS))
CONFIG = {
    "model_type": "t5",
    "vocab_size": len(VOCABULARY) + 3,  # more than the tokenizer has
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "scale_decoder_outputs": False,
}


@functools.cache
def tokenizer():
    """A tokenizer of whole words that appends ``</s>``."""
    import tokenizers
    import transformers

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    built.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@functools.cache
def random_model(**changes):
    """Model, parameters drawn without compiling anything, and config."""
    config = config_from_dict(CONFIG | changes)
    model, ids = models.T5(config), jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, labels=ids))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return (rng.normal(size=leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape)).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes), config


def save_checkpoint(folder: Path, **changes) -> Path:
    """Writes a random checkpoint with its tokenizer."""
    _, params, config = random_model(**changes)
    models.save_pretrained(folder, params=params, config=config, tokenizer=tokenizer())
    return folder


PARTITION = {"train": ["weather", "voice", "copy"], "dev": ["watched", "who"], "test": ["manners", "choice", "names"]}


def write_gym(folder: Path) -> Path:
    """The tasks of `tiny.write_gym`, and three that ask for a text's last name; copy also takes both names."""
    tiny.write_gym(folder)
    sizes = {(seed, split): size for seed in tiny.SEEDS for split, size in (("train", 6), ("dev", 5))}
    for number, name in enumerate(("copy", "who", "names")):
        rng = np.random.default_rng(100 + number)
        for (seed, split), size in (sizes | {(13, "test"): 12}).items():
            path, lines = folder / name / f"{name}_16_{seed}_{split}", []
            for _ in range(size):
                one, other = rng.choice(tiny.NAMES[4:] if name == "names" else tiny.NAMES[:4], 2)
                lines.append((f"{one} and {other} .", other, f"{one} {other}"))
            if name == "copy":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".tsv").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
                continue
            records = ({"task": name, "input": text, "output": answer, "options": []} for text, answer, _ in lines)
            tiny.write_lines(path.with_suffix(".jsonl"), records)
    return folder


def write_home(home: Path) -> Path:
    """A folder with the checkpoint ``model``, the tasks ``gym`` and the partition ``partition.json``."""
    save_checkpoint(home / "model")
    write_gym(home / "gym")
    (home / "partition.json").write_text(json.dumps(PARTITION, indent=1), encoding="utf-8")
    return home
