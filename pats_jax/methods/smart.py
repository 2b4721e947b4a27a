"""SMART: a small adversarial step on the word embeddings. See `pats_jax.smart`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import POSITIVE, at_least, setting
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Smart(Method):
    """Adds a term to the loss."""

    name: ClassVar = "smart"
    kind: ClassVar = "objective"
    summary: ClassVar = "penalizes changes of the output under a small adversarial step on the word embeddings"
    source: ClassVar = "https://arxiv.org/abs/1911.03437"
    layers: ClassVar = "none"
    passes: ClassVar = "two forward, one backward, one to the embeddings"

    smart_alpha: float = setting(1.0, "SMART: weight of its loss term", at_least(0))
    smart_step_size: float = setting(
        1e-5, "SMART: largest entry of the adversarial step on the word embeddings", POSITIVE
    )
    smart_noise_std: float = setting(1e-5, "SMART: standard deviation of the step's random start", POSITIVE)

    def objective(self):
        from pats_jax import objectives

        return objectives.smart(self.smart_alpha, self.smart_step_size, self.smart_noise_std)
