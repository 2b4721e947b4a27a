"""SIFT: a few entries of each attention matrix. See `pats_jax.sift`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import FRACTION, setting
from pats_jax.methods.method import Method
from pats_jax.methods.paths import ATTENTION, HEAD

_WHY_NOT = "SIFT updates single entries; the other method needs whole tensors"


@dataclasses.dataclass(frozen=True)
class Sift(Method):
    """Wraps the optimizer, which then holds state only for the selected entries."""

    name: ClassVar = "sift"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "trains the head and the entries of each attention matrix with the largest first gradients"
    source: ClassVar = "https://arxiv.org/abs/2312.11875"
    layers: ClassVar = ATTENTION
    state_bytes: ClassVar = "12 per selected entry, instead of 8 per entry"
    trainable: ClassVar = rf"{ATTENTION}|pooler|{HEAD}"
    conflicts: ClassVar = {"pats": _WHY_NOT, "perturbed": _WHY_NOT, "mixout": _WHY_NOT}

    sift_rate: float = setting(0.008, "SIFT: fraction of each tensor's entries that are trained", FRACTION)

    def around(self, context, optimizer):
        from pats_jax.companions import sift
        from pats_jax.methods.masks import layer_mask
        from pats_jax.models.layout import layer_axis

        mask = layer_mask(context.params, self.layers, "layers of sift")
        return sift.sift(optimizer, self.sift_rate, mask=mask, layer_axis=layer_axis)

    def why_not_with(self, peft):
        return "both select the parameters to train"
