"""BitFit: trains only the biases and the head."""

import dataclasses
from typing import ClassVar

from pats_jax.methods.method import Method
from pats_jax.methods.paths import HEAD


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Freezes all other parameters."""

    name: ClassVar = "bitfit"
    kind: ClassVar = "subnetwork"
    summary: ClassVar = "trains only the biases and the head; use a learning rate near 1e-3"
    source: ClassVar = "https://arxiv.org/abs/2106.10199"
    layers: ClassVar = rf"bias$|{HEAD}"
    state_bytes: ClassVar = "-8 for all others"
    passes: ClassVar = "no gradients of weights"
    trainable: ClassVar = rf"bias$|{HEAD}"

    def why_not_with(self, peft):
        return "both select the parameters to train"
