"""LNSR: noise on one layer's output. See `pats_jax.lnsr`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import POSITIVE, at_least, setting
from pats_jax.errors import InputError
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Lnsr(Method):
    """Adds a term to the loss."""

    name: ClassVar = "lnsr"
    kind: ClassVar = "objective"
    summary: ClassVar = "penalizes how far noise on one layer's output changes the layers above it"
    source: ClassVar = "https://arxiv.org/abs/2206.05658"
    layers: ClassVar = "none"
    passes: ClassVar = "one forward and backward above the layer"

    lnsr_layer: int = setting(1, "LNSR: add noise to the output of this layer; 0: to the embeddings", at_least(0))
    lnsr_lambda: float = setting(1.0, "LNSR: weight of its loss term", at_least(0))
    lnsr_noise_std: float = setting(0.05, "LNSR: standard deviation of the noise on the hidden states", POSITIVE)

    def objective(self):
        from pats_jax import objectives

        return objectives.lnsr(self.lnsr_layer, self.lnsr_lambda, self.lnsr_noise_std)

    def check_model(self, num_layers):
        if self.lnsr_layer >= num_layers:
            raise InputError(f"lnsr_layer {self.lnsr_layer}: must be less than the model's {num_layers} layers")

    def why_not_with(self, peft):
        return "LNSR cannot handle the prompt's tokens among the hidden states" if peft == "prompt" else None
