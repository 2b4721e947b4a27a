"""Child-Tuning D: a fixed fraction of the gradient, by Fisher information. See `pats_jax.child_tuning_d`."""

import dataclasses
from typing import ClassVar

from pats_jax.errors import InputError
from pats_jax.methods.paths import LAYERS
from pats_jax.methods.subnetwork import Freezing


@dataclasses.dataclass(frozen=True)
class ChildTuningD(Freezing):
    """Selects before training, in one pass over the data."""

    name: ClassVar = "child-d"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "keeps a fixed fraction of the encoder's gradient, selected by Fisher information"
    source: ClassVar = "https://arxiv.org/abs/2109.05687"
    layers: ClassVar = LAYERS
    state_bytes: ClassVar = "1"
    passes: ClassVar = "one epoch before training"
    works_in_lanes: ClassVar = False  # each seed has a mask of its own, which is measured before the step is built

    def first(self, context):
        from pats_jax.companions import child_tuning
        from pats_jax.methods.masks import layer_mask

        if context.fisher is None:
            raise InputError("method child-d: needs training data to measure the Fisher information")
        mask = layer_mask(context.params, self.layers, "layers of child-d")
        return child_tuning.child_tuning_d(context.fisher(self.fraction(0.3), mask))
