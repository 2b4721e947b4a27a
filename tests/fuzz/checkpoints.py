"""Inputs for the readers of models: configs, weights, tokenizers, adapters. The checkpoint is made here, by hand."""

import functools
import itertools
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from flax.traverse_util import flatten_dict

from pats_jax.data import batches, readers
from pats_jax.models import from_pretrained, load_tokenizer, peft, read_encoder_config

from .inputs import REFUSED, UNKNOWN, Expected, Input, Reader, must
from .mutate import damage_one

# Transformers imports a class when it is first asked for; no input's time should go into that.
IMPORTED = (transformers.AutoTokenizer, transformers.BertTokenizer)

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "##s", ".")
CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "problem_type": "single_label_classification",
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "transformers_version": "5.0.0",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "model_max_length": 16,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, wide, layer = CONFIG["hidden_size"], CONFIG["intermediate_size"], "bert.encoder.layer.0"
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (len(WORDS), hidden),
        "bert.embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (2, hidden),
        "classifier.weight": (3, hidden),
        "classifier.bias": (3,),
    }
    linear = {f"{layer}.attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {f"{layer}.attention.output.dense": (hidden, hidden), f"{layer}.intermediate.dense": (wide, hidden)}
    linear |= {f"{layer}.output.dense": (hidden, wide), "bert.pooler.dense": (hidden, hidden)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("bert.embeddings", f"{layer}.attention.output", f"{layer}.output"):
        shapes |= {f"{name}.LayerNorm.weight": (hidden,), f"{name}.LayerNorm.bias": (hidden,)}
    return shapes


@functools.cache
def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in _shapes().items()}


def to_safetensors(tensors: dict[str, np.ndarray], others: dict[str, tuple[str, str]] | None = None) -> bytes:
    """The format as it is published: the header's length, the header, the bytes of the tensors.

    Args:
      tensors: name -> values.
      others: name -> dtype in the format and in NumPy, where they are not float32.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        dtype, numpy_dtype = (others or {}).get(name, ("F32", "<f4"))
        begin, data = len(data), data + tensor.astype(numpy_dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + data


def from_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of float32 in a file."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            found[name] = np.frombuffer(body[begin:end], "<f4").reshape(entry["shape"])
    return found


@functools.cache
def model_files() -> dict[str, bytes]:
    """A checkpoint in one file, with its tokenizer."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": to_safetensors(_tensors()),
        **tokenizer_files(),
    }


@functools.cache
def sharded_files() -> dict[str, bytes]:
    """The same in two files and an index."""
    names, files, places = sorted(_tensors()), {"config.json": json.dumps(CONFIG).encode()}, {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        files[file] = to_safetensors({name: _tensors()[name] for name in own})
        places |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


@functools.cache
def tokenizer_files() -> dict[str, bytes]:
    """The files of a WordPiece tokenizer."""
    special = [
        {
            "id": number,
            "content": word,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number, word in enumerate(WORDS[:5])
    ]
    settings = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: number for number, word in enumerate(WORDS)},
        },
    }
    return {
        "tokenizer.json": json.dumps(settings).encode(),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG).encode(),
        "vocab.txt": "".join(f"{word}\n" for word in WORDS).encode(),
    }


# configs


def draw_config(rng: random.Random) -> Input:
    if rng.random() < 0.05:
        return Input({"config.json": model_files()["config.json"]}, "sound", Expected([3, 8, "bert"], True))
    files, told = damage_one(rng, {"config.json": model_files()["config.json"]})
    return Input(files, told)


def read_config(folder: Path, given: Input) -> Any:
    """What is accepted must be fit to build a model of."""
    config = read_encoder_config(folder)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        value = getattr(config, name)
        must(type(value) is int and value > 0, f"{name} is {value!r}")
    for name in ("layer_norm_eps", "initializer_range"):
        value = getattr(config, name)
        must(type(value) in (int, float) and 0 <= value < math.inf, f"{name} is {value!r}")
    must(type(config.pad_token_id) is int and config.pad_token_id >= 0, f"pad_token_id is {config.pad_token_id!r}")
    must(config.num_labels >= 1, "there is no label")
    must(all(isinstance(name, str) for name in config.id2label.values()), "a label's name is no text")
    json.dumps(config.to_dict()).encode()
    hash(config)
    return [config.num_labels, config.hidden_size, config.model_type]


# weights


def draw_model(rng: random.Random) -> Input:
    """A checkpoint with a damage in its config or its weights."""
    files = dict(rng.choice((model_files, sharded_files))())
    if rng.random() < 0.05:
        return Input(files, "sound", Expected(accept=True))
    names = [name for name in files if name != "vocab.txt" and "token" not in name]
    if rng.random() < 0.5:
        names.remove("config.json")
    name = rng.choice(names)
    if name.endswith(".safetensors") and rng.random() < 0.3:
        return _with_another_tensor(rng, files, name)
    if name.endswith(".safetensors") and rng.random() < 0.6:
        changed, told = _damage_header(rng, files[name])
        changed = {name: changed}
    else:
        changed, told = damage_one(rng, {name: files[name]})
    return Input(files | changed, told)


_DTYPES = {"F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1", "BOOL": "u1", "F8_E4M3": "u1", "BF16": "<u2"}


def _with_another_tensor(rng, files, name):
    """A tensor is of another dtype or shape, has a value that is not finite, or is another's twin."""
    tensors = from_safetensors(files[name])
    one = rng.choice(sorted(tensors))
    changed = tensors[one].copy()
    match rng.choice(("dtype", "shape", "value", "name")):
        case "dtype":
            dtype = rng.choice(sorted(_DTYPES))
            data = to_safetensors(tensors, {one: (dtype, _DTYPES[dtype])})
            expected = UNKNOWN if dtype in ("F16", "F64", "BF16") else REFUSED
            return Input({**files, name: data}, f"{one} is {dtype}", expected)
        case "shape":
            shape = rng.choice(((0,), (), (1, *changed.shape), changed.shape[::-1], (changed.size,), (3, 5)))
            tensors[one] = np.zeros(shape, np.float32)
            expected, told = UNKNOWN if shape == changed.shape else REFUSED, f"{one} has shape {shape}"
        case "value":
            changed.flat[rng.randrange(changed.size)] = rng.choice((np.nan, np.inf, -np.inf))
            tensors[one], expected, told = changed, REFUSED, f"{one} is not finite"
        case "name":
            other = rng.choice((one.removeprefix("bert."), one.replace("weight", "gamma"), f"{one}\n", "", "cls.x"))
            tensors[other], expected, told = changed, UNKNOWN, f"{one} is also {other!r}"
    return Input({**files, name: to_safetensors(tensors)}, told, expected)


def _damage_header(rng, data):
    """Damages the JSON at the front of a safetensors file, and its length with it."""
    (length,) = struct.unpack("<Q", data[:8])
    damaged, told = damage_one(rng, {"header.json": data[8 : 8 + length]}, special=0)
    header = damaged["header.json"]
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, 2**63, 2**64 - 1, length + 10**6))) + header + data[
            8 + length :
        ], "length"
    return struct.pack("<Q", len(header)) + header + data[8 + length :], told


def read_model(folder: Path, given: Input) -> None:
    """Loads it; what is loaded must be what the files hold, entry by entry."""
    _, params, _ = from_pretrained(folder, num_labels=None)
    held: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        if path.name == "model.safetensors" or not (folder / "model.safetensors").exists():
            held |= from_safetensors(path.read_bytes())
    for path, parameter in flatten_dict(params).items():
        name = f"{'.'.join(path[:-1])}.{'bias' if path[-1] == 'bias' else 'weight'}"
        must(bool(np.isfinite(parameter).all()), f"{name} is not finite")
        if name in held:
            tensor = held[name].T if path[-1] == "kernel" else held[name]
            must(np.array_equal(np.asarray(parameter), tensor), f"{name} is not what the file holds")


# tokenizers


def draw_tokenizer(rng: random.Random) -> Input:
    files = {"config.json": model_files()["config.json"], **tokenizer_files()}
    if rng.random() < 0.3:
        del files["tokenizer.json"]
    if rng.random() < 0.05:
        return Input(files, "sound", Expected([[2, 8, 5, 7, 9, 10, 3], [2, 1, 3]], True))
    changed, told = damage_one(rng, files)
    return Input(changed, told, options={"names": ["tokenizer", "max_seq_length"]})


def read_tokenizer(folder: Path, given: Input) -> list[list[int]] | None:
    """Loads it, and has it take two texts as a training would."""
    tokenizer = load_tokenizer(folder)
    split = readers.Split(["The good films.", "x"], None, None, ["0", "1"])
    tokens = batches.tokenize(split, tokenizer, 8)
    if given.told != "sound":
        return None
    return [tokens.input_ids[begin:end].tolist() for begin, end in itertools.pairwise(tokens.offsets.tolist())]


# adapters

_QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
_PLAIN = {"task_type": "SEQ_CLS", "base_model_name_or_path": "BASE", "inference_mode": True}
_ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "LORA": (
        {
            "r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "target_modules": ["query"],
            "bias": "none",
            "use_rslora": False,
        },
        {f"{_QUERY}.lora_A.weight": (2, 8), f"{_QUERY}.lora_B.weight": (8, 2)},
    ),
    "ADALORA": (
        {
            "init_r": 3,
            "target_r": 2,
            "total_step": 9,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "target_modules": ["query"],
            "bias": "none",
            "rank_pattern": {f"{_QUERY.removeprefix('base_model.model.')}.lora_E": [True, False, True]},
        },
        {f"{_QUERY}.lora_A": (2, 8), f"{_QUERY}.lora_B": (8, 2), f"{_QUERY}.lora_E": (2, 1)},
    ),
    "IA3": (
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
        {
            "base_model.model.bert.encoder.layer.0.attention.self.key.ia3_l": (8, 1),
            "base_model.model.bert.encoder.layer.0.attention.output.dense.ia3_l": (1, 8),
            "base_model.model.bert.encoder.layer.0.output.dense.ia3_l": (1, 12),
        },
    ),
    "PROMPT_TUNING": (
        {"num_virtual_tokens": 3, "token_dim": 8, "num_transformer_submodules": 1},
        {"prompt_embeddings": (3, 8)},
    ),
    "PREFIX_TUNING": (
        {
            "num_virtual_tokens": 3,
            "token_dim": 8,
            "num_layers": 1,
            "num_attention_heads": 2,
            "prefix_projection": False,
        },
        {"prompt_embeddings": (3, 16)},
    ),
}


def draw_adapter(rng: random.Random) -> Input:
    """An adapter's folder, as PEFT writes it, beside the model that it changes."""
    kind = rng.choice(sorted(_ADAPTERS))
    fields, shapes = _ADAPTERS[kind]
    prefix = "base_model.model" if kind in ("LORA", "ADALORA", "IA3") else "base_model"
    shapes = {**shapes, f"{prefix}.classifier.weight": (3, 8), f"{prefix}.classifier.bias": (3,)}
    draws = np.random.default_rng(rng.randrange(2**32))
    files: dict[str, bytes | str] = {
        "adapter_config.json": json.dumps({"peft_type": kind, **_PLAIN, **fields}).encode(),
        "adapter_model.safetensors": to_safetensors({name: draws.normal(size=shape) for name, shape in shapes.items()}),
    }
    expected, told = Expected(accept=True), f"sound {kind}"
    if rng.random() > 0.1:
        name = rng.choice(sorted(files))
        if name.endswith(".safetensors") and rng.random() < 0.6:
            changed, told = _damage_header(rng, files[name])
            files[name] = changed
        else:
            changed, told = damage_one(rng, {name: files[name]})
            files |= changed
        told, expected = f"{kind}: {told}", UNKNOWN
    return Input({**files, **{f"base/{name}": data for name, data in model_files().items()}}, told, expected)


def read_adapter(folder: Path, given: Input) -> None:
    """Loads it onto its model; the name that it has of that is put right where it still has it."""
    path = folder / "adapter_config.json"
    if path.is_file():
        path.write_bytes(path.read_bytes().replace(b'"BASE"', json.dumps(str(folder / "base")).encode()))
    peft.load_peft_model(folder)


READERS = {
    "config": Reader(draw_config, read_config),
    "model": Reader(draw_model, read_model),
    "tokenizer": Reader(draw_tokenizer, read_tokenizer),
    "adapter": Reader(draw_adapter, read_adapter),
}
