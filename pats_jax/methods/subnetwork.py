"""Settings shared by the methods that train a part of the weights; each class adds one to the class before."""

import dataclasses
from typing import TYPE_CHECKING

from pats_jax.core.settings import FRACTION, setting
from pats_jax.errors import InputError
from pats_jax.methods.method import Context, Method

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Selecting(Method):
    """A method that trains a fraction of the weights."""

    keep_fraction: float | None = setting(
        None, "DPS, Child-Tuning: fraction trained; if unset, the papers' 0.7 and 0.3", FRACTION
    )

    def fraction(self, authors: float) -> float:
        """The fraction that the user set, else the authors'."""
        return authors if self.keep_fraction is None else self.keep_fraction


@dataclasses.dataclass(frozen=True)
class Freezing(Selecting):
    """A method whose selection lasts, so that the other weights can be frozen."""

    freeze_unselected: bool = setting(False, "DPS, Child-Tuning D: freeze unselected weights (no momentum, no decay)")

    def finish(self, optimizer: "optax.GradientTransformation") -> "optax.GradientTransformation":
        if not self.freeze_unselected:
            return optimizer
        from pats_jax.companions.freeze_unselected import freeze_unselected

        try:
            return freeze_unselected(optimizer)
        except ValueError as error:
            raise InputError(f"freeze_unselected: {error}") from None


@dataclasses.dataclass(frozen=True)
class Staged(Freezing):
    """A method that selects anew every other stage."""

    update_ratio: float = setting(0.05, "DPS: length of a stage, as a fraction of all steps", FRACTION)

    def stage_steps(self, context: Context) -> int:
        """The number of steps in a stage, us = int(total steps * update ratio).

        Raises:
          InputError: if it is 0.
        """
        steps = int(context.total_steps * self.update_ratio)
        if steps < 1:
            raise InputError(f"update_ratio {self.update_ratio}: gives stages of 0 steps; increase it")
        return steps
