"""DPS Mix: DPS Dense with older weights mixed into the forward pass. See `pats_jax.dps_mix`."""

import dataclasses
from typing import ClassVar

from pats_jax.methods.paths import HEAD, LAYERS
from pats_jax.methods.subnetwork import Staged


@dataclasses.dataclass(frozen=True)
class DpsMix(Staged):
    """Selects input features, and mixes older weights into the forward pass."""

    name: ClassVar = "dps-mix"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "like dps-dense, with older weights mixed into the forward pass"
    source: ClassVar = "https://arxiv.org/abs/2211.01642"
    layers: ClassVar = rf"({LAYERS}|pooler|{HEAD}).*\bkernel$"
    state_bytes: ClassVar = "13"

    def first(self, context):
        from pats_jax.companions import dps
        from pats_jax.methods.masks import layer_mask
        from pats_jax.models.layout import layer_axis

        mask = layer_mask(context.params, self.layers, "layers of dps-mix")
        keep, stage_steps = self.fraction(0.7), self.stage_steps(context)
        return dps.dps_mix(keep, stage_steps, key=context.seed, mask=mask, layer_axis=layer_axis)

    def without_dropout(self, total_steps):
        return True
