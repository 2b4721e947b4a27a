"""NoisyTune: a little noise on every tensor once. See `pats_jax.noisy_tune`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class NoisyTune(Method):
    """Changes the parameters that training starts from."""

    name: ClassVar = "noisytune"
    kind: ClassVar = "noise"
    summary: ClassVar = "adds a little noise to every tensor once, before training"
    source: ClassVar = "https://arxiv.org/abs/2202.12024"

    noise_intensity: float = setting(0.15, "NoisyTune: width of the noise, in tensor standard deviations", at_least(0))

    def start(self, params, seed):
        from pats_jax.companions import noisy_tune
        from pats_jax.models.layout import layer_axis

        return noisy_tune.noisy_tune(params, self.noise_intensity, key=seed, layer_axis=layer_axis)

    def why_not_with(self, peft):
        return "it changes the base model's weights, which must stay fixed"
