"""ROSE: AdamW without the tensors whose gradient's norm fits the first moment's least. See `pats_jax.rose`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import FRACTION, setting
from pats_jax.methods.method import Method
from pats_jax.methods.paths import LAYERS


@dataclasses.dataclass(frozen=True)
class Rose(Method):
    """Wraps AdamW; selects anew at each step after warmup."""

    name: ClassVar = "rose"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "updates only the weight tensors whose gradient's norm fits that of Adam's first moment best"
    source: ClassVar = "https://arxiv.org/abs/2210.09658"
    layers: ClassVar = rf"{LAYERS}.*\.(kernel|scale)$"

    rose_quantile: float = setting(
        0.6, "ROSE: fraction of the tensors that are updated; the authors use 0.3 to 0.9", FRACTION
    )

    def adamw(self, context, optimizer):
        from pats_jax.companions import rose
        from pats_jax.methods.masks import layer_mask
        from pats_jax.models.layout import layer_axis

        mask = layer_mask(context.params, self.layers, "layers of rose")
        warmup_steps = context.warmup_steps
        return rose.rose(optimizer, self.rose_quantile, warmup_steps=warmup_steps, mask=mask, layer_axis=layer_axis)
