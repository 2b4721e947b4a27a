"""Sensitivity-aware fine-tuning of pretrained language models in JAX.

The public names are resolved on first use (PEP 562), so that ``import pats_jax`` costs next to nothing and never
starts a JAX backend.
"""

import importlib

__version__ = "0.2.0"

_HOMES = {
    "pats": "transforms",
    "pats_noise": "transforms",
    "sensitivity": "transforms",
    "with_raw_gradient": "transforms",
    "PatsNoiseState": "transforms",
    "noisy_tune": "transforms",
    "scale_by_sage": "transforms",
    "child_tuning_d": "subnetworks",
    "child_tuning_f": "subnetworks",
    "dps_dense": "subnetworks",
    "dps_mix": "subnetworks",
    "fisher_mask": "subnetworks",
    "freeze_unselected": "subnetworks",
    "sift": "sparse_updates",
    "forward_params": "anchors",
    "l2_sp": "anchors",
    "mixout": "anchors",
    "lnsr": "objectives",
    "r3f": "objectives",
    "r_drop": "objectives",
    "smart": "objectives",
    "with_objectives": "objectives",
    "Objective": "objectives",
    "TrainState": "train_state",
    "make_loss_fn": "train_state",
    "make_predict_step": "train_state",
    "make_train_step": "train_state",
    "InputError": "errors",
}
_ROOMS = ("data", "models", "random")

__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"pats_jax.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"pats_jax.{name}")
    raise AttributeError(f"module 'pats_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
