"""SAGE: Adam's step scaled by the uncertainty of sensitivity. See `pats_jax.scale_by_sage`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import Range, setting
from pats_jax.methods.method import Method
from pats_jax.methods.paths import LAYERS


@dataclasses.dataclass(frozen=True)
class Sage(Method):
    """Scales between Adam and weight decay."""

    name: ClassVar = "sage"
    kind: ClassVar = "scaling"
    summary: ClassVar = "scales steps by the uncertainty of sensitivity; use 2 to 5 times the usual learning rate"
    source: ClassVar = "https://arxiv.org/abs/2202.02664"
    layers: ClassVar = rf"{LAYERS}(?!.*(LayerNorm|layer_norm)).*\.(kernel|bias)$"
    state_bytes: ClassVar = "4"

    sage_decay: float = setting(
        0.75, "SAGE: decay rate of the moving average of sensitivity", Range(lambda x: 0 < x < 1, "in (0, 1)")
    )

    def scaling(self, context):
        from pats_jax.companions import sage
        from pats_jax.methods.masks import layer_mask

        return sage.scale_by_sage(self.sage_decay, mask=layer_mask(context.params, self.layers, "layers of sage"))
