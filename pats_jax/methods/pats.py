"""PATS: noise on the weights, more on those with low sensitivity. See `pats_jax.pats_noise`."""

import dataclasses
from typing import Any, ClassVar, Literal

from pats_jax.core.settings import PROBABILITY, at_least, setting
from pats_jax.methods.method import Context, Method
from pats_jax.methods.paths import MATRICES

NoiseResponse = Literal["linear", "reciprocal", "exponential", "constant", "reversed"]


@dataclasses.dataclass(frozen=True)
class Noise(Method):
    """Settings of the noise, of PATS and its control."""

    kind: ClassVar = "noise"
    layers: ClassVar = MATRICES

    noise_scale: float = setting(
        1e-2,
        "PATS: noise at zero sensitivity, in tensor standard deviations",
        at_least(0),
        is_basic=True,
    )
    noise_schedule: Literal["learning_rate", "constant"] = setting(
        "learning_rate", "PATS: noise in proportion to the learning rate, or the same noise at every step"
    )
    decay: float = setting(0.9, "PATS: decay rate of the moving average of sensitivity", PROBABILITY)
    response: NoiseResponse = setting(
        "linear", "PATS: how noise depends on sensitivity; constant and reversed are controls"
    )
    distribution: Literal["uniform", "normal"] = setting("uniform", "PATS: distribution of the noise")
    noise_layers: str = setting(MATRICES, "PATS: regex of the parameter paths that get noise")
    sensitivity_dtype: Literal["float32", "bfloat16"] = setting("float32", "PATS: type in which sensitivity is stored")

    def arguments(self, context: Context) -> dict[str, Any]:
        """The arguments of `pats_jax.pats_noise`; by default, the noise decays with the learning rate."""
        from pats_jax import trees
        from pats_jax.methods.masks import layer_mask
        from pats_jax.models.layout import layer_axis

        return {
            "noise_scale": 0.0 if trees.is_plainly(self.noise_scale, 0) else self._scale(context),
            "key": context.seed,
            "decay": self.decay,
            "response": self.response if context.response is None else context.response,
            "distribution": self.distribution,
            "mask": layer_mask(context.params, self.noise_layers),
            "sensitivity_dtype": self.sensitivity_dtype,
            "layer_axis": layer_axis,
        }

    def statistics(self, opt_state, context):
        from pats_jax import transforms
        from pats_jax.models.layout import layer_axis

        return transforms.noise_statistics(opt_state, self._scale(context), self.response, layer_axis=layer_axis)

    def matched_paths(self):
        return self.noise_layers

    def _scale(self, context):
        if self.noise_schedule == "constant":
            return lambda count: self.noise_scale
        return lambda count: self.noise_scale * context.schedule(count) / context.learning_rate


@dataclasses.dataclass(frozen=True)
class Pats(Noise):
    """The noise stays in the weights."""

    name: ClassVar = "pats"
    summary: ClassVar = "adds noise to the weights, more to those with low sensitivity"
    source: ClassVar = "https://arxiv.org/abs/2210.12403"
    state_bytes: ClassVar = "4"
    reports_sensitivity: ClassVar = True

    def last(self, context):
        from pats_jax import transforms

        return transforms.pats_noise(**self.arguments(context))
