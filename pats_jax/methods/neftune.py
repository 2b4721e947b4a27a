"""NEFTune: random noise on the word embeddings. See `pats_jax.neftune`."""

import dataclasses
from typing import ClassVar

from pats_jax.core.settings import at_least, setting
from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class NefTune(Method):
    """Changes what the model reads in training."""

    name: ClassVar = "neftune"
    kind: ClassVar = "objective"
    summary: ClassVar = "adds random noise to the word embeddings in training, less in long texts"
    source: ClassVar = "https://arxiv.org/abs/2310.05914"
    layers: ClassVar = "none"

    neftune_alpha: float = setting(
        5.0, "NEFTune: size of the noise; each entry gets at most alpha / sqrt(L d)", at_least(0)
    )

    def objective(self):
        from pats_jax import objectives

        return objectives.neftune(self.neftune_alpha)
