"""SAM: the gradient a short step up the loss. See `pats_jax.sam`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.method import Method

_WHY_NOT = "the step up starts from all weights, of which the other method's forward pass uses only some"


@dataclasses.dataclass(frozen=True)
class Ascent(Method):
    """A method that takes the gradient at other weights than those that the optimizer moves."""

    kind: ClassVar = "ascent"
    passes: ClassVar = "one forward and backward"
    conflicts: ClassVar = {"mixout": _WHY_NOT, "dps-mix": _WHY_NOT}


@dataclasses.dataclass(frozen=True)
class Sam(Ascent):
    """Two gradients a step."""

    name: ClassVar = "sam"
    summary: ClassVar = "takes the gradient a short step up the loss, to find flat minima"
    source: ClassVar = "https://arxiv.org/abs/2010.01412"

    sam_rho: float = setting(0.05, "SAM: length of the step up, over all trained parameters", at_least(0))

    def gradient(self, value_and_grad, params, batch, key):
        from pats_jax.companions import sam

        return sam.sam(self.sam_rho)(value_and_grad, params, batch, key)
