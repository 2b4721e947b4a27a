"""A checkpoint and data small enough for the programs to run on in seconds."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

from pats_jax import models
from pats_jax.models.config import EncoderConfig, default_labels
from pats_jax.settings import Settings

GOOD = ("warm", "bright", "kind", "calm")
BAD = ("cold", "dull", "rude", "loud")
NAMES = ("ann", "bob", "cid", "dan", "eve", "fay")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *GOOD, *BAD, *NAMES, "and", "is", ".")

# Dropout in one place only: every use of it adds a second to the compilation.
CONFIG = EncoderConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout=0.1,
)


@functools.cache
def tokenizer():
    """A WordPiece tokenizer that knows the words above."""
    import tokenizers
    import transformers

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    built = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    built.normalizer = tokenizers.normalizers.BertNormalizer()
    built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    built.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.BertTokenizer(tokenizer_object=built)


def random_params(config: EncoderConfig):
    """Parameters of a classifier, drawn without compiling anything, so large that its answers are not all the same."""
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(models.SequenceClassifier(config).init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) if leaf.ndim > 1 else np.full(leaf.shape, path[-1].key == "scale")
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def save_checkpoint(folder: Path, num_labels: int | None = None) -> Path:
    """Writes a random checkpoint, without a head if num_labels is None."""
    config = dataclasses.replace(CONFIG, id2label=default_labels(num_labels or 2))
    models.save_pretrained(folder, params=random_params(config), config=config, tokenizer=tokenizer())
    if num_labels is None:
        weights = folder / "model.safetensors"
        save_file({name: x for name, x in load_file(weights).items() if not name.startswith("classifier")}, weights)
    return folder


def sentences(rows: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Sentences of two lengths, and whether they praise, int32 (rows,)."""
    rng = np.random.default_rng(seed)
    praises = rng.permutation(np.arange(rows) % 2).astype(np.int32)

    def write(praise):
        a, b = rng.choice(NAMES, 2)
        c, d = rng.choice(GOOD if praise else BAD, 2)
        return f"{a} and {b} is {c} and {d} ." if rng.random() < 0.5 else f"{a} is {c} ."

    return [write(praise) for praise in praises], praises


def write_table(path: Path, header: Iterable, *rows: Iterable, separator: str = "\t") -> Path:
    """Writes a file with a header, its cells apart by the separator."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (separator.join(map(str, row)) for row in (header, *rows))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_sst2(folder: Path) -> Path:
    """Writes SST-2 in GLUE's layout: 22 training rows, 10 dev rows, 7 test rows."""
    for seed, (name, rows) in enumerate({"train": 22, "dev": 10}.items()):
        write_table(folder / "SST-2" / f"{name}.tsv", ("sentence", "label"), *zip(*sentences(rows, seed), strict=True))
    write_table(folder / "SST-2" / "test.tsv", ("index", "sentence"), *enumerate(sentences(7, 2)[0]))
    return folder


def reference_logits(
    model_folder: Path, first: list[str], second: list[str] | None = None, max_length: int = 24
) -> np.ndarray:
    """Logits (rows, num_labels) of a saved model by one batch in the rows' order, padded by the tokenizer."""
    model, params, _ = models.from_pretrained(model_folder, num_labels=None)
    tokenize = models.load_tokenizer(model_folder)
    encoded = tokenize(first, second, padding=True, truncation=True, max_length=max_length, return_tensors="np")
    return np.asarray(jax.jit(lambda batch: model.apply({"params": params}, **batch))(dict(encoded)))


@contextlib.contextmanager
def quick_compilation(folder: Path) -> Iterator[None]:
    """Little optimisation by XLA, and its results kept in a folder: the same programs are compiled again and again."""
    wanted = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    compilation_cache.reset_cache()
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def quick_settings(folder: Path, **changes) -> Settings:
    """Settings of a run of seconds on a tiny SST-2, whose checkpoint and data are made in a folder."""
    quick = {
        "max_seq_length": 16,
        "train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "length_buckets": 1,
        "sensitivity_batches": 0,
        "num_devices": 1,
        "save_steps": 0,
    }
    return Settings(
        model_name_or_path=str(save_checkpoint(folder / "checkpoint")),
        task_name="sst2",
        data_dir=str(write_sst2(folder / "data")),
        **quick | changes,
    )
