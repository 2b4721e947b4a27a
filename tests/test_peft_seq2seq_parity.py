"""Adapters of T5 and BART go to the library PEFT with torch and come back: the same logits."""

import functools

import jax
import numpy as np
import pytest
from model_parity import quick_jit

from pats_jax.models import from_pretrained_seq2seq, peft

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
pytest.importorskip("peft", reason="parity needs peft: make parity installs it without another torch")
import peft as theirs
import torch
import torch_reference
from transformers import AutoModelForSeq2SeqLM

pytestmark = pytest.mark.parity
TASK = {"task_type": "SEQ_2_SEQ_LM"}

OURS = {
    "lora": peft.LoraConfig(rank=3, alpha=5.0, dropout=0.1),
    "lora of all linear layers": peft.LoraConfig(rank=2, layers="all-linear"),
    "dora": peft.LoraConfig(
        rank=3,
        layers=r"\.(q|v|q_proj|v_proj|wo|wi|wi_0|fc2)$",
        dora=True,
        dropout=0.1,
        rank_pattern=("(decoder|encoder).*(wo|fc2)=2",),
        alpha_pattern=(r".*(block|layers)\.1\..*=5",),
    ),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9),
    "ia3": peft.Ia3Config(),
    "prompt": peft.PromptConfig(length=4),
    "prefix": peft.PrefixConfig(length=4, place="decoder"),
}
THEIRS = {
    "lora": lambda: theirs.LoraConfig(**TASK, r=3, lora_alpha=5, lora_dropout=0.1),
    "lora everywhere": lambda: theirs.LoraConfig(**TASK, r=2, target_modules="all-linear"),
    "lora of a layer": lambda: theirs.LoraConfig(
        **TASK, target_modules=["o", "k_proj", "q", "q_proj"], layers_to_transform=1
    ),
    "dora": lambda: theirs.LoraConfig(
        **TASK,
        r=3,
        target_modules=["q", "v", "q_proj", "v_proj", "wo", "wi", "wi_0", "fc2"],
        use_dora=True,
        lora_dropout=0.1,
        rank_pattern={"(decoder|encoder).*(wo|fc2)": 2},
        alpha_pattern={r".*(block|layers)\.1\..*": 5},
    ),
    "adalora": lambda: theirs.AdaLoraConfig(**TASK, init_r=4, lora_alpha=20, total_step=9),
    "ia3": lambda: theirs.IA3Config(**TASK),
    "prompt": lambda: theirs.PromptTuningConfig(**TASK, num_virtual_tokens=4),
    "prefix": lambda: theirs.PrefixTuningConfig(**TASK, num_virtual_tokens=4),
    "projected prefix": lambda: theirs.PrefixTuningConfig(**TASK, num_virtual_tokens=4, prefix_projection=True),
}
KINDS = ("t5", "t5-1.1", "bart-scaled")
SQUARE = ("t5-square", "bart-square")  # with heads that PEFT's prefixes fit


def cases(table):
    """Every method with every model that it fits; T5 1.1, whose layers have T5's names, in `make slow`."""
    pairs = [(method, kind) for method in table for kind in (SQUARE if "prefix" in method else KINDS)]
    marks = {True: pytest.mark.slow, False: ()}
    return pytest.mark.parametrize(
        ("method", "kind"), [pytest.param(*pair, marks=marks[pair[1] == "t5-1.1"]) for pair in pairs]
    )


@functools.cache
def base_folder(kind, made):
    folder = made / kind
    torch_reference.save_seq2seq(torch_reference.tiny_seq2seq(kind, seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def torch_base(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()


def batch_for(config):
    return torch_reference.seq2seq_batch(config, rows=4, source=9, target=6, seed=1)


def torch_logits(model, batch):
    with torch.no_grad():
        return torch_reference.forward(model.eval(), batch).logits.numpy()


def our_logits(model, params, batch):
    return np.asarray(quick_jit(lambda params: model.apply({"params": params}, **batch))(params))


@cases(OURS)
def test_peft_loads_what_we_save(method, kind, made, tmp_path):
    folder = base_folder(kind, made)
    plain, plain_params, config = from_pretrained_seq2seq(folder)
    model, params = peft.add_peft(plain, plain_params, OURS[method], key=0)
    rng = np.random.default_rng(0)
    params["peft"] = jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), params["peft"])
    peft.save_peft(tmp_path, model=model, params=params, base_model_name_or_path=str(folder))

    batch = batch_for(config)
    # PEFT 0.21 computes no loss with an AdaLoRA that is not trainable: it looks for the weight of the regulariser
    loaded = theirs.PeftModel.from_pretrained(torch_base(folder), tmp_path, is_trainable=method == "adalora")
    ours = our_logits(model, params, batch)
    np.testing.assert_allclose(torch_logits(loaded, batch), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - our_logits(plain, plain_params, batch)).max() > 1e-2


@cases(THEIRS)
def test_we_load_what_peft_saves(method, kind, made, tmp_path):
    folder = base_folder(kind, made)
    torch.manual_seed(0)
    tuned = theirs.get_peft_model(torch_base(folder), THEIRS[method]())
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path)
    layers = "separate" if method == "lora of a layer" else "stacked"
    model, params, config = peft.load_peft_seq2seq(tmp_path, layers=layers)
    if method == "lora everywhere":
        plain = from_pretrained_seq2seq(folder, layers=layers)[:2]
        own = peft.add_peft(*plain, peft.LoraConfig(rank=2, layers="all-linear"), key=0)[1]
        assert jax.tree.structure(own["peft"]) == jax.tree.structure(params["peft"])
    batch = batch_for(config)
    np.testing.assert_allclose(our_logits(model, params, batch), torch_logits(tuned, batch), rtol=0, atol=1e-4)
