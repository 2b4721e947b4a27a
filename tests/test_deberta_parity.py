"""DeBERTa against Transformers and PEFT in torch: the masked-language-model heads, hidden states, adapters."""

import functools

import jax
import numpy as np
import pytest
from model_parity import logits_of, quick_jit

from pats_jax.models import from_pretrained, load_mlm_head, mlm_logits, peft

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
pytest.importorskip("peft", reason="parity needs peft: make parity installs it without another torch")
import peft as theirs
import torch
import torch_reference
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", ("deberta-v3", "deberta-v2", "deberta-unshared"))
def test_masked_language_model(kind, tmp_path):
    """Of v3 with the head lm_predictions, of the others with cls.predictions. At tokens: padding attends otherwise."""
    reference = torch_reference.tiny_model(kind, seed=1, task="MaskedLM")
    reference.save_pretrained(tmp_path)
    batch = torch_reference.padded_batch(reference.config, rows=4, length=20, seed=1)
    del batch["labels"]
    with torch.no_grad():
        options = {name: torch.from_numpy(values).long() for name, values in batch.items()}
        output = reference(**options, output_hidden_states=True)
    model, params, config = from_pretrained(tmp_path, num_labels=2)
    model, head = model.clone(first_token_only=False), load_mlm_head(tmp_path, config)

    @quick_jit
    def compute(params, head):
        _, states = model.apply({"params": params}, **batch, output_hidden_states=True)
        return states, mlm_logits(head, config, states[-1], config.word_embeddings(params))

    states, logits = compute(params, head)
    at_tokens = batch["attention_mask"] != 0
    for ours, expected in zip((*states, logits), (*output.hidden_states, output.logits), strict=True):
        np.testing.assert_allclose(ours[at_tokens], expected.numpy()[at_tokens], rtol=0, atol=1e-4)


OURS = {
    "lora": peft.LoraConfig(rank=3, alpha=5.0),
    "ia3": peft.Ia3Config(),
    "ia3 by PEFT's default": peft.Ia3Config(input_layers=r"output\.dense$"),
    "prompt": peft.PromptConfig(length=4),
}
THEIRS = {
    "lora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5),
    "lora everywhere but in the pooler": lambda: theirs.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules="all-linear", exclude_modules=["pooler.dense"]
    ),
    "ia3": lambda: theirs.IA3Config(task_type="SEQ_CLS"),
    "prompt": lambda: theirs.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
}


def cases(table):
    """PEFT's prompts do not have the width of the word embeddings where that is not the layers'."""
    found = [(kind, method) for kind in ("deberta-v2", "deberta-unshared") for method in table]
    return pytest.mark.parametrize(
        ("kind", "method"), [case for case in found if case != ("deberta-unshared", "prompt")]
    )


@functools.cache
def base(kind, folder):
    reference = torch_reference.tiny_model(kind)
    reference.save_pretrained(folder / kind)
    batch = torch_reference.padded_batch(reference.config)
    return folder / kind, {name: values for name, values in batch.items() if name != "labels"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def torch_logits(model, batch):
    with torch.no_grad():
        return torch_reference.forward(model.eval(), batch).logits.numpy()


@cases(OURS)
def test_peft_loads_what_we_save(kind, method, made, tmp_path):
    folder, batch = base(kind, made)
    plain, plain_params, _ = from_pretrained(folder, num_labels=3)
    model, params = peft.add_peft(plain, plain_params, OURS[method], key=0)
    rng, mask = np.random.default_rng(0), peft.trainable_mask(model, params)
    params = jax.tree.map(lambda keep, p: p + keep * rng.normal(0, 0.1, p.shape).astype(np.float32), mask, params)
    peft.save_peft(tmp_path, model=model, params=params, base_model_name_or_path=str(folder))
    loaded = theirs.PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(folder), tmp_path)
    ours = logits_of(model, params, batch)
    np.testing.assert_allclose(torch_logits(loaded, batch), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - logits_of(plain, plain_params, batch)).max() > 1e-2


@cases(THEIRS)
def test_we_load_what_peft_saves(kind, method, made, tmp_path):
    """With its default layers, those of deberta-v2; the pooler is the base model's."""
    folder, batch = base(kind, made)
    config = THEIRS[method]()
    adapted = theirs.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path)
    model, params, _ = peft.load_peft_model(tmp_path)
    np.testing.assert_allclose(logits_of(model, params, batch), torch_logits(adapted, batch), rtol=0, atol=1e-4)
