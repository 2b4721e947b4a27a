"""L2-SP: decay towards the pretrained weights. See `pats_jax.l2_sp`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.method import Method
from pats_jax.methods.paths import HEAD


@dataclasses.dataclass(frozen=True)
class L2Sp(Method):
    """Replaces weight decay."""

    name: ClassVar = "l2-sp"
    kind: ClassVar = "anchor"
    summary: ClassVar = "decays weights towards their pretrained values; use it with --weight_decay 0"
    source: ClassVar = "https://arxiv.org/abs/1802.01483"
    state_bytes: ClassVar = "4"

    pretrained_strength: float = setting(
        0.1, "L2-SP: strength of the decay towards the pretrained weights", at_least(0)
    )
    head_strength: float = setting(0.01, "L2-SP: strength of the decay of the head towards 0", at_least(0))

    def first(self, context):
        from pats_jax.companions import l2_sp
        from pats_jax.methods.masks import layer_mask

        has_head = "classifier" in context.params  # that of an encoder-decoder is pretrained
        head = has_head and layer_mask(context.params, HEAD, "head of l2-sp")
        return l2_sp.l2_sp(self.pretrained_strength, self.head_strength, head_mask=head)
