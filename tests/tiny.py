"""A checkpoint and data small enough for the programs to run on in seconds."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from pats_jax import models
from pats_jax.models.config import EncoderConfig, default_labels
from pats_jax.run.flags import read_by
from pats_jax.run.settings import Settings

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


def save_checkpoint(folder: Path, num_labels: int | None = None, **changes) -> Path:
    """Writes a random checkpoint, without a head if num_labels is None; changes are of its config."""
    config = dataclasses.replace(CONFIG, id2label=default_labels(num_labels or 2), **changes)
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


def read_flags(kind, **given) -> dict:
    """Those of some settings that count: of methods and adapters only what is chosen."""
    unread = kind.all_entries().keys() - read_by(kind, given)
    return {name: value for name, value in given.items() if name not in unread}


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


# A gym of a handful of tasks: upstream ones with two, three and up to five options, one to watch them by, two targets.
# Only the targets' rows speak of eve and fay.
GYM_CLASSES = {
    "weather": ("warm", "cold"),
    "voice": ("calm", "loud", "dull"),
    "watched": ("bright", "dull"),
    "manners": ("kind", "rude"),
}
PARTITION = {"train": ["weather", "voice", "riddle"], "dev": ["watched"], "test": ["manners", "choice"]}
SEEDS = (13, 21)


def write_gym(folder: Path) -> Path:
    """Writes few-shot tasks as JSON lines: samples 13 and 21 of 6 training and 5 dev rows, 12 test rows for both."""
    for number, name in enumerate(name for names in PARTITION.values() for name in names):
        rng = np.random.default_rng(number)
        who = NAMES[4:] if name in PARTITION["test"] else NAMES[:4]
        rows = {(seed, split): size for seed in SEEDS for split, size in (("train", 6), ("dev", 5))}
        for (seed, split), size in (rows | {(SEEDS[0], "test"): 12}).items():
            write_lines(folder / name / f"{name}_16_{seed}_{split}.jsonl", (_line(name, rng, who) for _ in range(size)))
    return folder


def _line(name, rng, who):
    """A row: in tasks with classes a word like the right one stands in the text, else the option itself."""
    if name in GYM_CLASSES:
        options = list(GYM_CLASSES[name])
        right = str(rng.choice(options))
        word = rng.choice(GOOD if right in GOOD else BAD)
    else:
        options = [str(word) for word in rng.permutation((*GOOD, *BAD))[: 5 if name == "riddle" else 3]]
        word = right = str(rng.choice(options))
    end = " ".join(["and", str(rng.choice(who)), "."]) if rng.random() < 0.5 else "."
    return {"task": name, "input": f"{rng.choice(who)} is {word} {end}", "output": right, "options": options}


def write_lines(path: Path, records: Iterable[dict]) -> Path:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def write_gym_home(home: Path) -> Path:
    """A folder with the checkpoint ``model``, the tasks ``gym`` and the partition ``partition.json``."""
    save_checkpoint(home / "model")
    write_gym(home / "gym")
    (home / "partition.json").write_text(json.dumps(PARTITION, indent=1), encoding="utf-8")
    return home


def embed(model, params, texts: list[str], max_length: int = 16):
    """Texts -> (texts, hidden) of length 1: the mean of the last hidden states, as sentence encoders have it."""
    encoded = dict(tokenizer()(texts, padding=True, truncation=True, max_length=max_length, return_tensors="np"))
    model = model.clone(first_token_only=False)
    _, states = model.apply({"params": params}, **encoded, output_hidden_states=True)
    mask = encoded["attention_mask"][:, :, None]
    mean = jnp.sum(states[-1] * mask, axis=1) / mask.sum(axis=1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def option_logits(model, params, rows) -> list:
    """For every row the scores of its options by the similarity of embeddings, written from its formula."""
    texts = sorted({text for row in rows for text in (row.input, *row.options)})
    vectors = embed(model, params, texts)
    place = {text: number for number, text in enumerate(texts)}
    return [20 * vectors[np.array([place[text] for text in row.options])] @ vectors[place[row.input]] for row in rows]


def option_loss(model, params, rows):
    """The mean of the cross-entropies."""
    scores = option_logits(model, params, rows)
    losses = [jax.nn.logsumexp(one) - one[row.answer] for one, row in zip(scores, rows, strict=True)]
    return jnp.mean(jnp.stack(losses))


def chosen(model, params, rows) -> np.ndarray:
    """The option with the highest score for each row."""
    scores = jax.jit(lambda params: option_logits(model, params, rows))(params)
    return np.array([np.argmax(one) for one in scores])


def flags_for_one_device() -> str:
    """XLA_FLAGS of `conftest` but for the eight devices, for a program that needs one."""
    return " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


def refused(capsys, *args) -> str:
    """The line that `pats-jax` ends with, with code 2, where it has nothing else to say."""
    from pats_jax.programs import cli

    capsys.readouterr()
    try:
        cli.main([str(arg) for arg in args])
    except SystemExit as exit:
        out, error = capsys.readouterr()
        assert exit.code == 2 and out == "", (exit.code, out, error)
        assert error.startswith("pats-jax: error: ") and error.endswith("\n") and error.count("\n") == 1, error
        return error.removeprefix("pats-jax: error: ").strip()
    raise AssertionError("it was not refused")


def flags(**given) -> list[str]:
    """``--name value`` of each; None leaves a flag out, True is a bare one, a tuple has its values one by one."""
    words = []
    for name, value in given.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [] if value is None else [f"--{name}", *map(str, values)]
    return words


def mlm_tensors() -> dict[str, np.ndarray]:
    """A random masked-language-model head by the names of a checkpoint."""
    size, rng, head = CONFIG.hidden_size, np.random.default_rng(3), "cls.predictions"
    shapes = {
        f"{head}.transform.dense.weight": (size, size),
        f"{head}.transform.dense.bias": (size,),
        f"{head}.transform.LayerNorm.weight": (size,),
        f"{head}.transform.LayerNorm.bias": (size,),
        f"{head}.bias": (CONFIG.vocab_size,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
