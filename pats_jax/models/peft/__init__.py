"""Parameter-efficient fine-tuning: a small tree of parameters is added to a classifier, and only it is trained.

The names are resolved on first use (PEP 562), so that importing this package costs next to nothing.
"""

import importlib

_HOMES = {
    "KINDS": "model",
    "AdapterConfig": "adapters",
    "BitFitConfig": "bitfit",
    "Ia3Config": "ia3",
    "LoraConfig": "lora",
    "PeftClassifier": "model",
    "PeftConfig": "config",
    "PrefixConfig": "prefix",
    "PromptConfig": "prompt",
    "add_peft": "model",
    "count_parameters": "model",
    "disable": "model",
    "is_peft_folder": "files",
    "load_peft": "files",
    "load_peft_model": "files",
    "merge": "model",
    "merge_and_unload": "model",
    "save_peft": "files",
    "trainable_mask": "model",
    "unmerge": "model",
}

__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"pats_jax.models.peft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pats_jax.models.peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
