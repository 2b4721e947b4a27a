"""R3F: small random noise on the word embeddings. See `pats_jax.r3f`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import POSITIVE, at_least, setting
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class R3F(Method):
    """Adds a term to the loss."""

    name: ClassVar = "r3f"
    kind: ClassVar = "objective"
    summary: ClassVar = "penalizes changes of the output under small random noise on the word embeddings"
    source: ClassVar = "https://arxiv.org/abs/2008.03156"
    layers: ClassVar = "none"
    passes: ClassVar = "one forward and backward"

    r3f_lambda: float = setting(1.0, "R3F: weight of its loss term", at_least(0))
    r3f_eps: float = setting(1e-5, "R3F: half-width of the noise on the word embeddings", POSITIVE)

    def objective(self):
        from pats_jax import objectives

        return objectives.r3f(self.r3f_lambda, self.r3f_eps)
