"""The interface of methods: their settings, and what they add to plain fine-tuning."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pats_jax.core.settings import Group

if TYPE_CHECKING:  # settings are read, and `--help` answers, without JAX
    import jax
    import optax

    from pats_jax import objectives, train_state, transforms


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method is built from, besides its own settings.

    Attributes:
      total_steps: number of optimizer steps.
      schedule: the learning rate by step.
      learning_rate: its peak.
      params: the trained parameters.
      seed: an int or a typed key, for the method's random numbers.
      fisher: ``fisher(keep_fraction, mask)``, which returns the mask of Child-Tuning D, measured on the training data.
      response: replaces a method's ``response``.
      warmup_steps: number of steps over which the learning rate rises.
    """

    total_steps: int
    schedule: "optax.Schedule"
    learning_rate: Any
    params: Any
    seed: Any
    fisher: Callable[[float, Any], Any] | None = None
    response: "transforms.Response | None" = None
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Method(Group):
    """A fine-tuning method: its fields are its settings, its functions what it adds to plain fine-tuning.

    A subclass is a frozen dataclass that overrides what it needs. Its place in `table.BUILTIN` adds it to METHODS; in
    another package, an entry point in the group ``pats_jax.methods`` does.

    Attributes:
      name: its name in ``--method``.
      kind: methods of one kind exclude each other, except "noise" and "objective".
      summary: what the method does, in one line.
      source: the address of the paper.
      layers: regex of the paths of the parameters that it acts on.
      state_bytes: optimizer state beyond AdamW's 8 bytes, in bytes per parameter that it acts on.
      passes: additional forward and backward passes.
      trainable: regex of the trained parameters; the others have no gradient and no state.
      conflicts: name of another method -> why the two exclude each other.
      reports_sensitivity: whether sensitivity is measured before and after training unless the user says otherwise.
      works_in_lanes: whether trainings side by side, under `jax.vmap`, can use it.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    layers: ClassVar[str] = ""
    state_bytes: ClassVar[str] = "0"
    passes: ClassVar[str] = "none"
    trainable: ClassVar[str | None] = None
    conflicts: ClassVar[dict[str, str]] = {}
    reports_sensitivity: ClassVar[bool] = False
    works_in_lanes: ClassVar[bool] = True

    @classmethod
    def has(cls, part: str) -> bool:
        """Whether the method overrides a part: "first", "around", "start", "objective", ..."""
        return getattr(cls, part) is not getattr(Method, part)

    def first(self, context: Context) -> "optax.GradientTransformation":
        """A transform that runs before clipping and AdamW."""
        raise NotImplementedError

    def scaling(self, context: Context) -> "optax.GradientTransformation":
        """A transform that runs between Adam and weight decay."""
        raise NotImplementedError

    def adamw(self, context: Context, optimizer: "optax.GradientTransformation") -> "optax.GradientTransformation":
        """Wraps AdamW, which runs after clipping."""
        return optimizer

    def last(self, context: Context) -> "optax.GradientTransformation":
        """A transform that runs after AdamW."""
        raise NotImplementedError

    def around(self, context: Context, optimizer: "optax.GradientTransformation") -> "optax.GradientTransformation":
        """Wraps the whole optimizer."""
        return optimizer

    def finish(self, optimizer: "optax.GradientTransformation") -> "optax.GradientTransformation":
        """Wraps the whole optimizer after all methods have added their parts."""
        return optimizer

    def start(self, params: Any, seed: Any) -> Any:
        """The parameters that training starts from."""
        return params

    def objective(self) -> "objectives.Objective | objectives.View":
        """A term of the loss, or noise on what the model reads in training."""
        raise NotImplementedError

    def gradient(
        self, value_and_grad: "train_state.ValueAndGrad", params: Any, batch: "train_state.Batch", key: "jax.Array"
    ) -> "tuple[tuple[jax.Array, train_state.Metrics], Any]":
        """The loss, the metrics and the gradient of a step; see `pats_jax.make_train_step`."""
        return value_and_grad(params, batch, key)

    def without_dropout(self, total_steps: int) -> bool:
        """Whether the authors turn dropout off in a training of ``total_steps`` steps."""
        return False

    def statistics(self, opt_state: Any, context: Context) -> "dict[str, jax.Array]":
        """Scalars that describe the last step, for the log; the context has only the learning rate."""
        return {}

    def check_model(self, num_layers: int) -> None:
        """Raises InputError if the method needs a layer that a model with ``num_layers`` lacks."""

    def why_not_with(self, peft: str) -> str | None:
        """Why the method cannot train an adapter of this kind; None if it can."""
        return None

    def matched_paths(self) -> str:
        """The regex of the parameters that it acts on with its settings."""
        return self.layers
