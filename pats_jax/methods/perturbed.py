"""Perturbed: the noise of PATS in the forward pass of each step only. See `pats_jax.perturbed`."""

import dataclasses
from typing import ClassVar

from pats_jax.methods.pats import Noise


@dataclasses.dataclass(frozen=True)
class Perturbed(Noise):
    """The noise is removed again after the step."""

    name: ClassVar = "perturbed"
    summary: ClassVar = "adds the noise of pats in the forward pass of each step only"
    source: ClassVar = "ours: a control for https://arxiv.org/abs/2210.12403"
    state_bytes: ClassVar = "8"
    conflicts: ClassVar = {
        "pats": "both read the settings of the noise; to keep the noise use pats, to remove it after each step "
        "perturbed"
    }

    def last(self, context):
        from pats_jax.companions import perturbed

        return perturbed.perturbed(**self.arguments(context))
