"""R-Drop: two passes with different dropout. See `pats_jax.r_drop`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class RDrop(Method):
    """Adds a term to the loss."""

    name: ClassVar = "r-drop"
    kind: ClassVar = "objective"
    summary: ClassVar = "penalizes disagreement between two passes with different dropout"
    source: ClassVar = "https://arxiv.org/abs/2106.14448"
    layers: ClassVar = "none"
    passes: ClassVar = "one forward and backward"

    r_drop_alpha: float = setting(1.0, "R-Drop: weight of its loss term", at_least(0))

    def objective(self):
        from pats_jax import objectives

        return objectives.r_drop(self.r_drop_alpha)
