"""A classifier with an adapter: adds, merges and removes the adapter."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax import trees
from pats_jax.errors import InputError
from pats_jax.models.bert import STACKED, SequenceClassifier
from pats_jax.models.convert import Parameters
from pats_jax.models.layout import stack_layers, unstack_layers
from pats_jax.models.peft.adapters import AdapterConfig
from pats_jax.models.peft.bitfit import BitFitConfig
from pats_jax.models.peft.config import COLLECTION, FlatTree, PeftConfig
from pats_jax.models.peft.ia3 import Ia3Config
from pats_jax.models.peft.lora import LoraConfig
from pats_jax.models.peft.prefix import PrefixConfig
from pats_jax.models.peft.prompt import PromptConfig

_ADVICE = 'load the model with separate layers (layers="separate")'

KINDS: dict[str, type[PeftConfig]] = {
    config.kind: config for config in (LoraConfig, BitFitConfig, Ia3Config, AdapterConfig, PromptConfig, PrefixConfig)
}


class PeftClassifier(SequenceClassifier):
    """A `SequenceClassifier` with an adapter, whose parameters are ``params["peft"]``; create it with `add_peft`.

    Everything else is as in the plain model: arguments, ``embed``, gradient checkpointing, ``first_token_only``.

    Attributes:
      peft: the method and its settings.
      merged: whether the adapter is merged into the weights, so that the forward pass omits it.
    """

    peft: PeftConfig | None = None
    merged: bool = False

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
        assert self.peft is not None
        params = dict(self.variables["params"])
        tree = self.peft.variables(params.pop("peft"), self.config, self.layers == STACKED)
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else None
        plain = SequenceClassifier(**_fields(self), parent=None)
        with nn.intercept_methods(self.peft.interceptor(self.config, deterministic)):
            return plain.apply(
                {"params": params, COLLECTION: tree}, *inputs, deterministic=deterministic, rngs=rngs, **options
            )


def add_peft(
    model: SequenceClassifier, params: Parameters, config: PeftConfig, key: int | jax.Array
) -> tuple[PeftClassifier, Parameters]:
    """Adds an adapter to a classifier.

    Args:
      model: a plain classifier.
      params: its parameters; the result shares them.
      config: the method and its settings.
      key: an int or a typed key, for the adapter's initialization.

    Returns:
      The classifier with the adapter, and its parameters, including ``"peft"``.

    Raises:
      InputError: if the settings do not fit the model.
      ValueError: if the model already has an adapter.

    Examples:
      >>> import jax, pats_jax
      >>> from pats_jax import models
      >>> from pats_jax.models import peft
      >>> config = models.EncoderConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
      >>> model = models.SequenceClassifier(config)
      >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 3), int))["params"]
      >>> model, params = peft.add_peft(model, params, peft.LoraConfig(rank=2), key=0)
      >>> peft.count_parameters(model, params)
      (42, 29910)
    """
    if "peft" in params:
        raise ValueError("the model already has an adapter; merge or disable it first")
    if config.train_pooler and model.config.is_roberta:
        raise InputError("train_pooler: RoBERTa has no pooler; the corresponding layer is part of the head; omit it")
    drawn = draw(model, params, config, trees.own_key(key, f"peft.{config.kind}"))
    return _with_modules(model, config), {**params, "peft": in_layout(model, drawn)}


def draw(model: SequenceClassifier, params: Parameters, config: PeftConfig, key: jax.Array) -> FlatTree:
    """The parameters of a new adapter, flat, with separate layers."""
    held = flatten_dict(params)
    shapes = own_shapes(model, params)  # of stacked layers they are all that is needed
    base = {path: held.get(path, shape) for path, shape in shapes.items() if not config.trains_whole(path)}
    return config.draw(base, model.config, key)


def in_layout(model: SequenceClassifier, tree: FlatTree) -> Parameters:
    """Converts a flat tree with separate layers to the model's own layout.

    Raises:
      InputError: if the model's layers are stacked, and the adapter changes only some of them, or some differently.
    """
    if model.layers != STACKED:
        return unflatten_dict(tree)
    changed = {path[path.index("layer") + 1] for path in tree if "layer" in path}
    if len(changed) not in (0, model.config.num_hidden_layers):
        raise InputError(f"the adapter changes {len(changed)} of {model.config.num_hidden_layers} layers: {_ADVICE}")
    try:
        return stack_layers(unflatten_dict(tree))
    except ValueError:
        raise InputError(f"the adapter changes some layers differently from others: {_ADVICE}") from None


def trainable_mask(model: PeftClassifier, params: Parameters) -> Parameters:
    """A tree of bools like params: True at the adapter, the head and, if the config says so, the pooler."""
    config = config_of(model)

    def is_trained(path, _):
        names = tuple(entry.key for entry in path)
        return names[0] == "peft" or config.trains_whole(names)

    return jax.tree_util.tree_map_with_path(is_trained, params)


def count_parameters(model: PeftClassifier, params: Parameters) -> tuple[int, int]:
    """The number of trained parameters, and the number of all parameters."""
    sizes = jax.tree.map(lambda p: p.size, params)
    trained = jax.tree.map(lambda size, keep: size * keep, sizes, trainable_mask(model, params))
    return sum(jax.tree.leaves(trained)), sum(jax.tree.leaves(sizes))


def merge(model: PeftClassifier, params: Parameters) -> tuple[PeftClassifier, Parameters]:
    """Merges the adapter into the weights; logits stay the same up to rounding.

    The adapter's own parameters are kept for `unmerge`; `merge_and_unload` drops them.

    Raises:
      ValueError: if the adapter is already merged, or the method cannot be merged.
    """
    config = config_of(model)
    if model.merged:
        raise ValueError(f"the {config.kind} adapter is already merged")
    if not config.merges:
        raise ValueError(f"{config.kind} cannot be merged: it does not change the weights")
    return model.clone(merged=True), _merged(model, params, config.merge)


def unmerge(model: PeftClassifier, params: Parameters) -> tuple[PeftClassifier, Parameters]:
    """The inverse of `merge`; restores the weights up to rounding.

    Raises:
      ValueError: if the adapter is not merged, or a scale of IA3 is zero.
    """
    config = config_of(model)
    if not model.merged:
        raise ValueError(f"the {config.kind} adapter is not merged")
    return model.clone(merged=False), _merged(model, params, config.unmerge)


def disable(model: PeftClassifier, params: Parameters) -> tuple[SequenceClassifier, Parameters]:
    """The plain model without the adapter, but with the trained head (and pooler); its other weights are unchanged.

    Raises:
      ValueError: if the adapter is merged.
    """
    config = config_of(model)
    if model.merged:
        raise ValueError(f"the {config.kind} adapter is merged; unmerge it first")
    return _plain(model, params)


def merge_and_unload(model: PeftClassifier, params: Parameters) -> tuple[SequenceClassifier, Parameters]:
    """A plain classifier with the adapter merged into its weights, for `pats_jax.models.save_pretrained`.

    Raises:
      ValueError: if the method cannot be merged.
    """
    config_of(model)
    return _plain(*((model, params) if model.merged else merge(model, params)))


def _with_modules(model: SequenceClassifier, config: PeftConfig) -> PeftClassifier:
    return PeftClassifier(**_fields(model), peft=config, merged=False)


def _fields(model: SequenceClassifier) -> dict[str, Any]:
    """The attributes of a plain classifier, as arguments."""
    names = (field.name for field in dataclasses.fields(SequenceClassifier))
    return {name: getattr(model, name) for name in names if name not in ("parent", "name")}


def _plain(model, params):
    plain = SequenceClassifier(**_fields(model))
    return plain, {name: tree for name, tree in params.items() if name != "peft"}


def config_of(model: SequenceClassifier) -> PeftConfig:
    """The config of a model's adapter.

    Raises:
      ValueError: if the model has no adapter.
    """
    if not isinstance(model, PeftClassifier) or model.peft is None:
        raise ValueError("the model has no adapter; add one with add_peft or load_peft")
    return model.peft


def own_parameters(model: SequenceClassifier, params: Parameters) -> FlatTree:
    """The parameters of the model itself, flat, with separate layers."""
    own = {name: tree for name, tree in params.items() if name != "peft"}
    return flatten_dict(unstack_layers(own, model.config.num_hidden_layers))


def own_shapes(model: SequenceClassifier, params: Parameters) -> FlatTree:
    """The shapes of `own_parameters`; computes nothing."""
    return jax.eval_shape(lambda params: own_parameters(model, params), params)


def small_tree(model: SequenceClassifier, params: Parameters) -> FlatTree:
    """The adapter's parameters, flat, with separate layers."""
    return flatten_dict(unstack_layers(params["peft"], model.config.num_hidden_layers))


def _merged(model, params, operation):
    """The parameters with the model's own changed by ``operation(base, small tree)``."""
    base = operation(own_parameters(model, params), small_tree(model, params))
    return in_layout(model, base) | {"peft": params["peft"]}
