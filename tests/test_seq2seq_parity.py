"""Live parity of T5 and BART with Transformers in torch: forward, backward, an AdamW step, files and generation."""

import functools
import json

import jax
import numpy as np
import pytest
from generation_cases import grid
from model_parity import assert_agrees, quick_jit, seq2seq_loss_and_gradients

from pats_jax import make_seq2seq_loss_fn
from pats_jax.models import (
    GenerationConfig,
    from_pretrained_seq2seq,
    make_generate_step,
    relative_positions,
    save_pretrained,
)

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
import torch
import torch_reference
from torch_reference import LEARNING_RATE, WEIGHT_DECAY
from transformers import AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.trainer_pt_utils import LabelSmoother

pytestmark = pytest.mark.parity
KINDS = torch_reference.SEQ2SEQ_KINDS
kinds = pytest.mark.parametrize("kind", KINDS)


def load_in_torch(folder):
    """A folder as Transformers loads it; nothing may be missing, unexpected or of another shape."""
    model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    return model.eval()


def torch_logits(model, batch):
    with torch.no_grad():
        return torch_reference.forward(model, batch).logits.numpy()


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("t5-deeper", "bart-scaled") else ()) for kind in KINDS],
)
@pytest.mark.parametrize("layers", ["separate", "stacked"])
def test_logits_gradients_a_step_and_files(kind, layers, tmp_path):
    reference = torch_reference.tiny_seq2seq(kind, seed=1)
    torch_reference.save_seq2seq(reference, tmp_path / "torch")
    batch = torch_reference.seq2seq_batch(reference.config, rows=7, source=14, target=11, seed=1)
    logits = torch_logits(reference, batch)
    np.testing.assert_array_equal(torch_logits(load_in_torch(tmp_path / "torch"), batch), logits)
    model, params, config = from_pretrained_seq2seq(tmp_path / "torch", layers=layers)

    save_pretrained(tmp_path / "ours", params=params, config=config)
    saved = load_in_torch(tmp_path / "ours")
    assert type(saved) is type(reference)
    np.testing.assert_array_equal(torch_logits(saved, batch), logits)

    if layers == "stacked":
        found = quick_jit(model.apply)({"params": params}, **batch)
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)
        return
    rates = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    expected = torch_reference.reference(reference, batch)
    assert_agrees(expected, model, params, batch, **rates, compute=seq2seq_loss_and_gradients)


@kinds
def test_a_masked_target_is_torchs(kind, tmp_path):
    reference = torch_reference.tiny_seq2seq(kind, seed=2)
    torch_reference.save_seq2seq(reference, tmp_path)
    model, params, config = from_pretrained_seq2seq(tmp_path)
    batch = torch_reference.seq2seq_batch(reference.config, seed=2)
    target = np.random.default_rng(0).integers(3, config.vocab_size, (5, 6)).astype(np.int32)
    mask = (np.arange(6) < [[6], [4], [2], [6], [5]]).astype(np.int32)
    del batch["labels"]
    batch |= {"decoder_input_ids": target, "decoder_attention_mask": mask}
    ours = quick_jit(model.apply)({"params": params}, **batch)
    np.testing.assert_allclose(ours[mask == 1], torch_logits(reference, batch)[mask == 1], rtol=0, atol=1e-4)


@kinds
def test_label_smoothing_is_the_trainers(kind, tmp_path):
    reference = torch_reference.tiny_seq2seq(kind)
    torch_reference.save_seq2seq(reference, tmp_path)
    model, params, config = from_pretrained_seq2seq(tmp_path)
    batch = torch_reference.seq2seq_batch(config)
    with torch.no_grad():
        output = torch_reference.forward(reference, batch)
        expected = LabelSmoother(epsilon=0.1)(output, torch.from_numpy(batch["labels"]).long())
    loss, _ = make_seq2seq_loss_fn(model.apply, label_smoothing=0.1, deterministic=True)(params, batch, None)
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tied", "has_head"), [(True, False), (False, True), (False, False), (True, True)])
def test_configs_of_transformers_4(tied, has_head, tmp_path):
    """One key says both whether the head is tied and whether the states are scaled; the file has a head or not."""
    torch_reference.save_seq2seq(torch_reference.tiny_seq2seq("t5-1.1" if has_head else "t5"), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"tie_word_embeddings": tied}
    for name in ("scale_decoder_outputs", "dtype", "is_gated_act", "dense_act_fn"):
        values.pop(name, None)
    path.write_text(json.dumps(values))
    model, params, config = from_pretrained_seq2seq(tmp_path)
    assert (config.scale_decoder_outputs, config.tie_word_embeddings) == (tied, not has_head)
    batch = torch_reference.seq2seq_batch(config)
    expected = torch_logits(load_in_torch(tmp_path), batch)
    np.testing.assert_allclose(quick_jit(model.apply)({"params": params}, **batch), expected, rtol=0, atol=1e-4)
    save_pretrained(tmp_path / "ours", params=params, config=config)
    np.testing.assert_array_equal(torch_logits(load_in_torch(tmp_path / "ours"), batch), expected)


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 12), (8, 20), (16, 64), (64, 256), (6, 50)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_torchs(count, farthest, bidirectional):
    distances = np.arange(-3000, 3001)
    ours = relative_positions.buckets(distances, bidirectional=bidirectional, count=count, farthest=farthest)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distances), bidirectional, count, farthest)
    np.testing.assert_array_equal(ours, theirs.numpy())


# generation: one program for each setting, run on many models of one shape

SEEDS = range(3)


@functools.cache
def models_of(kind, made):
    """Models of a kind: ours with stacked layers, the parameters of each, and torch's."""
    theirs = [torch_reference.tiny_seq2seq(kind, seed, scale=0.5) for seed in SEEDS]
    params = []
    for seed, reference in zip(SEEDS, theirs, strict=True):
        torch_reference.save_seq2seq(reference, made / f"{kind}-{seed}")
        model, own, config = from_pretrained_seq2seq(made / f"{kind}-{seed}")
        params.append(own)
    return model, config, params, theirs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def cases():
    """The quick tests have every ninth case: greedy search once, and beams with every kind of model."""
    for number, case in enumerate(grid()):
        marks = pytest.mark.slow if number % 9 else ()
        yield pytest.param(number, id="-".join(map(str, case.values())), marks=marks)


@pytest.mark.parametrize("number", [*cases()])
def test_tokens_are_those_of_generate(number, made):
    """At three seeds each, of the kinds of models by turns: 207 in all, a ninth of them without `make slow`."""
    case, kind = grid()[number], torch_reference.GENERATING_KINDS[number // 2 % 4]
    model, config, params, theirs = models_of(kind, made)
    folder = made / f"{kind}-0"
    stored = json.loads((folder / "generation_config.json").read_text())
    settings = GenerationConfig.from_dict(stored | case)
    step = quick_jit(make_generate_step(model, settings))
    for seed, own, reference in zip(SEEDS, params, theirs, strict=True):
        batch = torch_reference.seq2seq_batch(config, rows=4, seed=seed)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = jax.device_get(step(own, batch))
        ours = found.sequences.reshape(-1, found.sequences.shape[-1])[:, : int(found.length)]
        inputs = {name: torch.from_numpy(values).long() for name, values in batch.items()}
        expected = reference.generate(**inputs, **case, return_dict_in_generate=True, output_scores=True)
        np.testing.assert_array_equal(ours, expected.sequences.numpy())
        if settings.num_beams > 1:
            scores = expected.sequences_scores.numpy()
            np.testing.assert_allclose(found.scores.reshape(-1), scores, rtol=1e-4, atol=1e-4)
