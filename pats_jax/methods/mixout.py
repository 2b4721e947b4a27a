"""Mixout: pretrained weights mixed into the forward pass. See `pats_jax.mixout`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import PROBABILITY, setting
from pats_jax.methods.method import Method
from pats_jax.methods.paths import LAYERS


@dataclasses.dataclass(frozen=True)
class Mixout(Method):
    """Replaces dropout."""

    name: ClassVar = "mixout"
    kind: ClassVar = "anchor"
    summary: ClassVar = "mixes pretrained weights into the forward pass"
    source: ClassVar = "https://arxiv.org/abs/1909.11299"
    layers: ClassVar = rf"({LAYERS}|pooler).*\.kernel$"
    state_bytes: ClassVar = "4"
    conflicts: ClassVar = {"dps-mix": "both replace the weights of the forward pass"}

    drop_fraction: float = setting(0.7, "Mixout: fraction of a layer's inputs that use pretrained weights", PROBABILITY)

    def first(self, context):
        from pats_jax.companions import mixout
        from pats_jax.methods.masks import layer_mask
        from pats_jax.models.layout import layer_axis

        mask = layer_mask(context.params, self.layers, "layers of mixout")
        return mixout.mixout(self.drop_fraction, key=context.seed, mask=mask, layer_axis=layer_axis)

    def without_dropout(self, total_steps):
        return True
