"""DPS Dense: the weights with the largest gradients. See `pats_jax.dps_dense`."""

import dataclasses
from typing import ClassVar

from pats_jax.methods.paths import HEAD, LAYERS
from pats_jax.methods.subnetwork import Staged


@dataclasses.dataclass(frozen=True)
class DpsDense(Staged):
    """Selects weights by the gradients of one stage, and trains only these in the next."""

    name: ClassVar = "dps-dense"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "trains the weights with the largest gradients, selected anew every other stage"
    source: ClassVar = "https://arxiv.org/abs/2211.01642"
    layers: ClassVar = rf"({LAYERS}|pooler|{HEAD}).*\bkernel$"
    state_bytes: ClassVar = "4"

    def first(self, context):
        from pats_jax.companions import dps
        from pats_jax.methods.masks import layer_mask
        from pats_jax.models.layout import layer_axis

        mask = layer_mask(context.params, self.layers, "layers of dps-dense")
        return dps.dps_dense(self.fraction(0.7), self.stage_steps(context), mask=mask, layer_axis=layer_axis)

    def without_dropout(self, total_steps):
        return total_steps < 2000
