"""ASAM: SAM with a step that is longer where weights are larger. See `pats_jax.asam`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.sam import Ascent


@dataclasses.dataclass(frozen=True)
class Asam(Ascent):
    """Two gradients a step."""

    name: ClassVar = "asam"
    summary: ClassVar = "like sam, with a step up that is longer where weights are larger"
    source: ClassVar = "https://arxiv.org/abs/2102.11600"
    layers: ClassVar = r"\.(kernel|embedding|scale)$"

    asam_rho: float = setting(0.5, "ASAM: length of the step up, relative to the weights", at_least(0))
    asam_eta: float = setting(0.01, "ASAM: added to the weights' magnitudes", at_least(0))

    def gradient(self, value_and_grad, params, batch, key):
        from pats_jax.companions import sam
        from pats_jax.methods.masks import layer_mask

        mask = layer_mask(params, self.layers, "layers of asam")
        return sam.asam(self.asam_rho, self.asam_eta, mask=mask)(value_and_grad, params, batch, key)
