"""Models with an adapter: the plain model under an interceptor, with the small tree as a Flax collection."""

import contextlib
import dataclasses
from typing import Any, ClassVar, TypeAlias

import flax.linen as nn

from pats_jax.models.bart import Bart
from pats_jax.models.encoder_decoder import EncoderDecoder
from pats_jax.models.layers import STACKED
from pats_jax.models.peft.config import COLLECTION, PeftConfig
from pats_jax.models.sequence_classifier import SequenceClassifier
from pats_jax.models.t5 import T5


class PeftClassifier(SequenceClassifier):
    """A `SequenceClassifier` with an adapter, whose parameters are ``params["peft"]``; create it with `add_peft`.

    Everything else is as in the plain model: arguments, ``embed``, gradient checkpointing, ``first_token_only``.

    Attributes:
      peft: the method and its settings.
      merged: whether the adapter is merged into the weights, so that the forward pass omits it.
    """

    peft: PeftConfig | None = None
    merged: bool = False
    plain: ClassVar[type[SequenceClassifier]] = SequenceClassifier

    @property
    def max_length(self) -> int:
        assert self.peft is not None
        return self.config.max_length - self.peft.virtual_tokens

    def __call__(self, *inputs: Any, deterministic: bool = True, **options: Any) -> Any:
        """Computes logits as `SequenceClassifier` does, with the adapter.

        Raises:
          ValueError: as from `SequenceClassifier`; or if ``continue_from`` is used with a prompt, or a text leaves no
            room for a prefix.
        """
        if self.merged:
            return super().__call__(*inputs, deterministic=deterministic, **options)
        return _adapted(self, "__call__", *inputs, deterministic=deterministic, **options)


class _PeftEncoderDecoder(EncoderDecoder):
    """What `PeftT5` and `PeftBart` have in common."""

    peft: PeftConfig | None = None
    merged: bool = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Computes logits as the plain model does, with the adapter.

        Raises:
          ValueError: as from the plain model; or if a text leaves no room for virtual tokens.
        """
        return _adapted(self, "__call__", *inputs, **options)

    def encode(self, *inputs: Any, **options: Any) -> Any:
        """The encoder's states, those of a prompt included."""
        return _adapted(self, "encode", *inputs, **options)

    def start_cache(self, *inputs: Any) -> Any:
        """As of the plain model, with the adapter."""
        return _adapted(self, "start_cache", *inputs)

    def step(self, *inputs: Any) -> Any:
        """As of the plain model, with the adapter."""
        return _adapted(self, "step", *inputs)


class PeftT5(_PeftEncoderDecoder, T5):
    """A `T5` with an adapter, whose parameters are ``params["peft"]``; create it with `add_peft`.

    Attributes:
      peft: the method and its settings.
      merged: whether the adapter is merged into the weights.
    """

    plain: ClassVar[type[T5]] = T5


class PeftBart(_PeftEncoderDecoder, Bart):
    """A `Bart` with an adapter, whose parameters are ``params["peft"]``; create it with `add_peft`.

    Attributes:
      peft: the method and its settings.
      merged: whether the adapter is merged into the weights.
    """

    plain: ClassVar[type[Bart]] = Bart


PlainModel: TypeAlias = SequenceClassifier | T5 | Bart
PeftModel: TypeAlias = PeftClassifier | PeftT5 | PeftBart

_ADAPTED: tuple[type[PeftModel], ...] = (PeftClassifier, PeftT5, PeftBart)


def with_adapter(model: PlainModel, config: PeftConfig) -> PeftModel:
    """The model of a plain model's attributes that has an adapter."""
    kind = next(kind for kind in _ADAPTED if isinstance(model, kind.plain))
    return kind(**_fields(model, kind.plain), peft=config, merged=False)


def without_adapter(model: PeftModel) -> PlainModel:
    """The plain model of a model's attributes."""
    return model.plain(**_fields(model, model.plain))


def _fields(model: PlainModel, kind: type[PlainModel]) -> dict[str, Any]:
    """The attributes of a plain model of a kind, as arguments."""
    names = (field.name for field in dataclasses.fields(kind))
    return {name: getattr(model, name) for name in names if name not in ("parent", "name")}


def _adapted(model: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """What a method of the plain model gives under the adapter's interceptor."""
    params = dict(model.variables["params"])
    small = params.pop("peft")
    variables = {"params": params}
    with contextlib.ExitStack() as stack:
        if not model.merged:
            variables[COLLECTION] = model.peft.variables(small, model.config, model.layers == STACKED)
            interceptor = model.peft.interceptor(model.config, options.get("deterministic", True))
            stack.enter_context(nn.intercept_methods(interceptor))
        rngs = {"dropout": model.make_rng("dropout")} if model.has_rng("dropout") else None
        plain = model.plain(**_fields(model, model.plain), parent=None)
        return plain.apply(variables, *inputs, rngs=rngs, method=method, **options)
