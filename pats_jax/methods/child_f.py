"""Child-Tuning F: a random fraction of the gradient. See `pats_jax.child_tuning_f`."""

import dataclasses
from typing import ClassVar

from pats_jax.methods.subnetwork import Selecting


@dataclasses.dataclass(frozen=True)
class ChildTuningF(Selecting):
    """Draws the fraction anew at each step."""

    name: ClassVar = "child-f"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "keeps a random fraction of the gradient at each step"
    source: ClassVar = "https://arxiv.org/abs/2109.05687"

    def first(self, context):
        from pats_jax.companions import child_tuning
        from pats_jax.models.layout import layer_axis

        return child_tuning.child_tuning_f(self.fraction(0.3), key=context.seed, layer_axis=layer_axis)
