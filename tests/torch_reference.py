"""What Transformers with torch computes: the reference for the stored fixtures and for the live parity tests."""

import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers.models.deberta_v2 import modeling_deberta_v2

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
PAIRS = [
    ("The film was a delight.", "It was dull."),
    ("He sold the company to his brother last year, people say.", "His brother bought the company."),
    ("Rain.", "No rain fell in the valley, and the harvest failed."),
]
_TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "num_labels": 3,
}
# DeBERTa's real settings in small: v3's, to which v2's large ones add the convolution.
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
# ModernBERT's real settings in small: three layers are local, and texts of more than 16 tokens are computed in blocks.
_MODERNBERT = {
    "vocab_size": 48,
    "hidden_size": 12,
    "num_hidden_layers": 5,
    "intermediate_size": 8,
    "local_attention": 8,
    **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}
# RoBERTa's real sizes in small: one token type, positions counted from pad_token_id + 1, eps 1e-5.
_TINY_KINDS = {
    "bert": ("Bert", {"type_vocab_size": 2, "pad_token_id": 0}),
    "roberta": ("Roberta", {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1, "pad_token_id": 1, "hidden_act": "gelu_new"}),
    "camembert": ("Camembert", {"type_vocab_size": 2, "pad_token_id": 1, "hidden_act": "relu"}),
    "distilbert": ("DistilBert", {"hidden_dim": 24, "sinusoidal_pos_embds": True}),  # _TINY's intermediate_size is idle
    "distilbert-relu": ("DistilBert", {"hidden_dim": 24, "activation": "relu"}),
    "electra": ("Electra", {"embedding_size": 12}),
    "electra-base": ("Electra", {"embedding_size": 16, "hidden_act": "gelu_new", "type_vocab_size": 1}),
    "mpnet": ("MPNet", {"layer_norm_eps": 1e-5}),
    "mpnet-relu": ("MPNet", {"hidden_act": "relu", "relative_attention_num_buckets": 40}),
    "deberta-v3": ("DebertaV2", {**_DEBERTA, "legacy": False}),
    "deberta-v2": ("DebertaV2", {**_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-unshared": (
        "DebertaV2",
        {
            "num_hidden_layers": 1,
            "intermediate_size": 24,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 6,
            "type_vocab_size": 2,
            "embedding_size": 10,
            "conv_kernel_size": 5,
            "conv_groups": 2,
            "pooler_hidden_act": "tanh",
        },
    ),
    "deberta-c2p": ("DebertaV2", {**_DEBERTA, "pos_att_type": ["c2p"], "share_att_key": False}),
    "deberta-p2c": (
        "DebertaV2",
        {**_DEBERTA, "pos_att_type": "p2c", "norm_rel_ebd": "none", "max_relative_positions": 17},
    ),
    "deberta-plain": ("DebertaV2", {"pos_att_type": "p2c"}),  # which divides scores without relative attention, too
    "modernbert": ("ModernBert", _MODERNBERT),
    "modernbert-biases": (
        "ModernBert",
        {
            **_MODERNBERT,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": {"rope_theta": 90.0}, "sliding_attention": {"rope_theta": 30.0}},
            "classifier_pooling": "mean",
            "hidden_activation": "gelu_new",
            "classifier_activation": "relu",
            "norm_eps": 1e-3,
            **{f"{name}_bias": True for name in ("norm", "attention", "mlp", "classifier")},
        },
    ),
    "modernbert-global": ("ModernBert", {**_MODERNBERT, "layer_types": ["full_attention"] * 5, "decoder_bias": False}),
}
KINDS = tuple(_TINY_KINDS)


def tiny_model(kind: str, seed: int = 0, task: str = "SequenceClassification", **changes):
    """A model, a classifier if not told, with all parameters random (LayerNorm's too) and large enough to be felt."""
    prefix, options = _TINY_KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**_TINY | options | changes)
    model = getattr(transformers, f"{prefix}For{task}")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("LayerNorm.weight", "norm.weight")) else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def deberta_buckets(position_buckets: int, longest: int, count: int) -> np.ndarray:
    """The buckets of the first distances, int16 (count,)."""
    distances = torch.arange(count)
    return modeling_deberta_v2.make_log_bucket_position(distances, position_buckets, longest).numpy().astype(np.int16)


def logits_of_words(classifier, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of a masked language model with ModernBERT's encoder and head: the decoder's bias and the logits."""
    prefix = type(classifier).__name__.removesuffix("ForSequenceClassification")
    model = getattr(transformers, f"{prefix}ForMaskedLM")(classifier.config).eval()
    model.load_state_dict(classifier.state_dict(), strict=False)
    model.decoder.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.decoder.bias.numpy(), forward(model, inputs).logits.numpy()


# 3 heads of 6 units are not the 16 of the model.
_T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 40,
    "d_model": 16,
    "max_position_embeddings": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
}
_TINY_SEQ2SEQ = {
    "t5": ("T5", _T5),
    "t5-1.1": ("T5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-deeper": ("T5", {**_T5, "num_decoder_layers": 3}),  # than its encoder
    "bart": ("Bart", _BART),
    "bart-scaled": ("Bart", {**_BART, "scale_embedding": True, "activation_function": "relu"}),
}
SEQ2SEQ_KINDS = tuple(_TINY_SEQ2SEQ)
# Of the others, none has heads that PEFT's prefixes fit. Three layers are an odd number.
_TINY_SEQ2SEQ["t5-square"] = ("T5", {**_T5, "num_heads": 4, "d_kv": 4, "num_layers": 3})
_TINY_SEQ2SEQ["bart-square"] = ("Bart", {**_BART, "encoder_attention_heads": 4})
GENERATING_KINDS = tuple(
    kind for kind in SEQ2SEQ_KINDS if kind != "t5-deeper"
)  # where Transformers' cache is too short


def tiny_seq2seq(kind: str, seed: int = 0, scale: float = 0.2):
    """A T5 or BART in eager attention, with all parameters random and large enough to be felt."""
    prefix, options = _TINY_SEQ2SEQ[kind]
    config = getattr(transformers, f"{prefix}Config")(**options)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    model.set_attn_implementation("eager")
    if kind == "t5-1.1":  # Transformers 5 ties the head of a new model, and of a checkpoint whose head is its own not
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_((1.0 if is_norm else 0.0) + scale * torch.randn(parameter.shape, generator=generator))
        if kind == "bart-scaled":
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    return model.eval()


def save_seq2seq(model, folder) -> None:
    """A folder as Transformers 5 writes it, but for a head that it would leave out as tied."""
    model.save_pretrained(folder)
    stored = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    if getattr(model, "lm_head", None) is not None and model.lm_head.weight is not model.get_input_embeddings().weight:
        stored["lm_head.weight"] = model.lm_head.weight.detach().numpy()
        safetensors.numpy.save_file(stored, f"{folder}/model.safetensors", metadata={"format": "pt"})


def seq2seq_batch(config, rows: int = 5, source: int = 9, target: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Random sources and targets of different lengths; one label in the middle is ignored."""
    random = np.random.default_rng(seed)

    def lengths(longest):
        return np.concatenate([[longest], random.integers(2, longest, rows - 1)])[:, None]

    mask = np.arange(source)[None] < lengths(source)
    is_label = np.arange(target)[None] < lengths(target)
    is_label[0, 3] = False
    ids = random.integers(4, config.vocab_size, (rows, source))
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": np.where(is_label, random.integers(4, config.vocab_size, (rows, target)), -100).astype(np.int32),
    }


def minilm(folder: str, head: np.ndarray):
    """MiniLM with a given head kernel, (labels, hidden), and a zero bias."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=len(head))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(head))
        model.classifier.bias.zero_()
    return model.eval()


def padded_batch(config, rows: int = 5, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in rows of different lengths, pairs where the model knows two token types.

    The first row has padding in its middle: RoBERTa's positions skip it, BERT's count it.
    """
    random = np.random.default_rng(seed)
    lengths = np.concatenate([[length], random.integers(3, length, rows - 1)])
    mask = np.arange(length)[None] < lengths[:, None]
    mask[0, 4] = False
    ids = random.integers(5, config.vocab_size, (rows, length))
    is_second = (np.arange(length)[None] >= lengths[:, None] // 2) & (getattr(config, "type_vocab_size", 1) > 1)
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": (mask & is_second).astype(np.int32),
        "labels": random.integers(0, config.num_labels, rows).astype(np.int32),
    }


def tokenised(tokenizer) -> dict[str, np.ndarray]:
    """Three pairs of sentences of different lengths as a padded batch, labelled 0, 1, 2."""
    encoded = tokenizer([a for a, _ in PAIRS], [b for _, b in PAIRS], padding=True, return_tensors="np")
    batch = {name: values.astype(np.int32) for name, values in encoded.items()}
    return batch | {"labels": np.arange(len(PAIRS), dtype=np.int32)}


def forward(model, batch: dict[str, np.ndarray]):
    return model(**{name: torch.from_numpy(values).long() for name, values in batch.items()})


def reference(model, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits, loss, every gradient, and every parameter after one AdamW step (which changes the model)."""
    output = forward(model, batch)
    output.loss.backward()
    expected = {"logits": output.logits.detach().numpy().copy(), "loss": output.loss.detach().numpy().copy()}
    expected |= {f"gradient/{name}": value.grad.numpy().copy() for name, value in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY).step()
    expected |= {f"after/{name}": value.detach().numpy().copy() for name, value in model.named_parameters()}
    return expected
