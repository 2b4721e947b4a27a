"""HyPe: small random noise on the input of every layer. See `pats_jax.hype`."""

import dataclasses
from typing import ClassVar, Literal

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class HyPe(Method):
    """Changes what each layer reads in training; replaces dropout."""

    name: ClassVar = "hype"
    kind: ClassVar = "objective"
    summary: ClassVar = "adds a little random noise to the input of every layer in training"
    source: ClassVar = "https://arxiv.org/abs/2212.08853"
    layers: ClassVar = "none"

    hype_noise: float = setting(
        1e-5, "HyPe: standard deviation, or half-width, of the noise on hidden states", at_least(0)
    )
    hype_distribution: Literal["normal", "uniform"] = setting("normal", "HyPe: distribution of the noise")

    def objective(self):
        from pats_jax import objectives

        return objectives.hype(self.hype_noise, self.hype_distribution)

    def without_dropout(self, total_steps):
        return True
