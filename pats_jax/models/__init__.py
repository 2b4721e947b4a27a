"""BERT and RoBERTa classifiers in Flax Linen, and the way from Hugging Face checkpoints to their parameters and back.

The names are resolved on first use (PEP 562), so that importing this package costs next to nothing.
"""

import importlib

_HOMES = {
    "EncoderConfig": "config",
    "SequenceClassifier": "bert",
    "checkpoint_folder": "sources",
    "from_pretrained": "pretrained",
    "lacks_pooler": "pretrained",
    "load_mlm_head": "masked_lm",
    "load_tokenizer": "tokenizer",
    "mlm_logits": "masked_lm",
    "save_pretrained": "pretrained",
}

__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"pats_jax.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pats_jax.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
