"""ModernBERT's masked language model, long texts and adapters, live against torch; `test_parity` has the rest."""

import functools

import numpy as np
import pytest
from model_parity import logits_of, loss_and_gradients, quick_jit

from pats_jax.models import from_pretrained, load_mlm_head, mlm_logits, peft

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
pytest.importorskip("peft", reason="parity needs peft: make parity installs it without another torch")
import peft as theirs
import torch
import torch_reference
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.parity
KINDS = ("modernbert", "modernbert-biases", "modernbert-global")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_words_are_torchs(kind, tmp_path):
    """The folder is as Transformers writes it, the decoder tied. What padding has is not compared."""
    reference = torch_reference.tiny_model(kind, seed=3, task="MaskedLM")
    reference.save_pretrained(tmp_path)
    batch = torch_reference.padded_batch(reference.config, length=20)
    del batch["labels"]
    with torch.no_grad():
        expected = torch_reference.forward(reference, batch).logits.numpy()
    model, params, config = from_pretrained(tmp_path, num_labels=3)
    compute = quick_jit(functools.partial(model.clone(first_token_only=False).apply, output_hidden_states=True))
    states = compute({"params": params}, **batch)[1]
    logits = mlm_logits(load_mlm_head(tmp_path, config), config, states[-1], config.word_embeddings(params))
    is_token = batch["attention_mask"] != 0
    np.testing.assert_allclose(logits[is_token], expected[is_token], rtol=0, atol=1e-4)
    tensors = {name: torch.from_numpy(x).long() for name, x in batch.items()}
    own_states = reference.model(**tensors, output_hidden_states=True).hidden_states
    for ours, own in zip(states, own_states, strict=True):
        np.testing.assert_allclose(ours[is_token], own.detach().numpy()[is_token], rtol=0, atol=1e-4)


def test_long_texts(tmp_path):
    """The real window of 128 tokens and bases of frequencies; rows of up to 700 tokens, with gaps and padding."""
    changes = {"local_attention": 128, "max_position_embeddings": 8192, "classifier_pooling": "mean"}
    reference = torch_reference.tiny_model("modernbert", **changes)
    reference.save_pretrained(tmp_path)
    batch = torch_reference.padded_batch(reference.config, rows=3, length=700)
    batch["attention_mask"][0, 200:400] = 0
    output = torch_reference.forward(reference, batch)
    output.loss.backward()
    model, params, _ = from_pretrained(tmp_path, num_labels=3)
    loss, logits, gradients = loss_and_gradients(model, params, batch)
    np.testing.assert_allclose(logits, output.logits.detach().numpy(), rtol=0, atol=1e-4)
    for layer, gradient in gradients["model"]["layers"].items():
        expected = reference.model.layers[int(layer)].attn.Wqkv.weight.grad.numpy().T
        np.testing.assert_allclose(
            gradient["attn"]["Wqkv"]["kernel"], expected, rtol=0, atol=1e-3 * np.abs(expected).max()
        )


THEIRS = {
    "lora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["Wqkv"]),
    "lora everywhere": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["Wqkv", "Wo", "Wi"]),
    "lora with its head": lambda: theirs.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["Wi", "mlp.Wo"], modules_to_save=["head", "classifier"]
    ),
    "ia3": lambda: theirs.IA3Config(
        task_type="SEQ_CLS", target_modules=["Wqkv", "mlp.Wo"], feedforward_modules=["mlp.Wo"]
    ),
    "prompt": lambda: theirs.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, num_attention_heads=2, token_dim=12
    ),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_adapters_go_both_ways(kind, tmp_path):
    """PEFT saves, we load; we save, PEFT loads: three times the same logits, whether or not PEFT saves the head."""
    torch_reference.tiny_model("modernbert").save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    batch = torch_reference.padded_batch(base.config, length=18)
    del batch["labels"], batch["token_type_ids"]
    model = theirs.get_peft_model(base, THEIRS[kind]())
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape))
        expected = torch_reference.forward(model.eval(), batch).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    ours, params, _ = peft.load_peft_model(tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(ours, params, batch), expected, rtol=0, atol=1e-4)
    plain, plain_params, _ = from_pretrained(tmp_path / "base", num_labels=3)
    assert np.abs(logits_of(plain, plain_params, batch) - expected).max() > 1e-2

    peft.save_peft(tmp_path / "ours", model=ours, params=params, base_model_name_or_path=str(tmp_path / "base"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = theirs.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(torch_reference.forward(again, batch).logits.numpy(), expected, rtol=0, atol=1e-5)
