"""Adds, merges and removes the adapter of a model."""

from typing import overload

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax import trees
from pats_jax.errors import InputError
from pats_jax.models.bart import Bart
from pats_jax.models.convert import Parameters
from pats_jax.models.layers import STACKED
from pats_jax.models.layout import side_and_layer, stack_layers, unstack_layers
from pats_jax.models.peft.adalora import AdaLoraConfig
from pats_jax.models.peft.adapted import (
    PeftBart,
    PeftClassifier,
    PeftModel,
    PeftT5,
    PlainModel,
    with_adapter,
    without_adapter,
)
from pats_jax.models.peft.adapters import AdapterConfig
from pats_jax.models.peft.bitfit import BitFitConfig
from pats_jax.models.peft.config import FlatTree, PeftConfig
from pats_jax.models.peft.ia3 import Ia3Config
from pats_jax.models.peft.lora import LoraConfig
from pats_jax.models.peft.prefix import PrefixConfig
from pats_jax.models.peft.prompt import PromptConfig
from pats_jax.models.peft.saved import has_pooler
from pats_jax.models.seq2seq_config import Seq2SeqConfig
from pats_jax.models.sequence_classifier import SequenceClassifier
from pats_jax.models.t5 import T5

_ADVICE = 'load the model with separate layers (layers="separate")'

KINDS: dict[str, type[PeftConfig]] = {
    config.kind: config
    for config in (LoraConfig, AdaLoraConfig, BitFitConfig, Ia3Config, AdapterConfig, PromptConfig, PrefixConfig)
}


@overload
def add_peft(
    model: SequenceClassifier, params: Parameters, config: PeftConfig, key: int | jax.Array
) -> tuple[PeftClassifier, Parameters]:
    """For a classifier; see below."""


@overload
def add_peft(
    model: T5 | Bart, params: Parameters, config: PeftConfig, key: int | jax.Array
) -> tuple[PeftT5 | PeftBart, Parameters]:
    """For an encoder-decoder; see below."""


def add_peft(
    model: PlainModel, params: Parameters, config: PeftConfig, key: int | jax.Array
) -> tuple[PeftModel, Parameters]:
    """Adds an adapter to a model.

    Args:
      model: a plain classifier, T5 or BART.
      params: its parameters; the result shares them.
      config: the method and its settings.
      key: an int or a typed key, for the adapter's initialization.

    Returns:
      The model with the adapter, and its parameters, including ``"peft"``.

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
    if config.train_pooler and not has_pooler(model.config):
        raise InputError(f"train_pooler: a {model.config.model_type} model has no pooler outside of its head; omit it")
    drawn = draw(model, params, config, trees.own_key(key, f"peft.{config.kind}"))
    return with_adapter(model, config), {**params, "peft": in_layout(model, drawn)}


def draw(model: PlainModel, params: Parameters, config: PeftConfig, key: jax.Array) -> FlatTree:
    """The parameters of a new adapter, flat, with separate layers."""
    held = flatten_dict(params)
    separate = (own_parameters if config.reads_weights else own_shapes)(model, params)  # no copies of stacked layers
    base = {path: held.get(path, leaf) for path, leaf in separate.items() if not config.trains_whole(path)}
    return config.draw(base, model.config, key)


def in_layout(model: PlainModel, tree: FlatTree) -> Parameters:
    """Converts a flat tree with separate layers to the model's own layout.

    Raises:
      InputError: if the model's layers are stacked, and the adapter changes only some of them, or some differently.
    """
    if model.layers != STACKED:
        return unflatten_dict(tree)
    layers = [layer for path in tree if (layer := side_and_layer(path))]
    for side, count in _depths(model).items():
        changed = {number for own_side, number in layers if own_side == side}
        if len(changed) not in (0, count):
            kind = f"{side} layers" if isinstance(model.config, Seq2SeqConfig) else "layers"
            raise InputError(f"the adapter changes {len(changed)} of {count} {kind}: {_ADVICE}")
    try:
        return stack_layers(unflatten_dict(tree))
    except ValueError:
        raise InputError(f"the adapter changes some layers differently from others: {_ADVICE}") from None


def trainable_mask(model: PeftModel, params: Parameters) -> Parameters:
    """A tree of bools like params: True at the adapter, the head and, if the config says so, the pooler."""
    config = config_of(model)

    def is_trained(path, _):
        names = tuple(entry.key for entry in path)
        return names[0] == "peft" or config.trains_whole(names)

    return jax.tree_util.tree_map_with_path(is_trained, params)


def count_parameters(model: PeftModel, params: Parameters) -> tuple[int, int]:
    """The number of trained parameters, and the number of all parameters."""
    sizes = jax.tree.map(lambda p: p.size, params)
    trained = jax.tree.map(lambda size, keep: size * keep, sizes, trainable_mask(model, params))
    return sum(jax.tree.leaves(trained)), sum(jax.tree.leaves(sizes))


def merge(model: PeftModel, params: Parameters) -> tuple[PeftModel, Parameters]:
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
    base, tree = own_parameters(model, params), small_tree(model, params)
    kept = config.kept_while_merged(base, tree)
    small = in_layout(model, tree | kept) if kept else params["peft"]
    return model.clone(merged=True), in_layout(model, config.merge(base, tree)) | {"peft": small}


def unmerge(model: PeftModel, params: Parameters) -> tuple[PeftModel, Parameters]:
    """The inverse of `merge`; restores the weights up to rounding.

    Raises:
      ValueError: if the adapter is not merged, or a scale of IA3 or a magnitude of DoRA is zero.
    """
    config = config_of(model)
    if not model.merged:
        raise ValueError(f"the {config.kind} adapter is not merged")
    base, tree = own_parameters(model, params), small_tree(model, params)
    before = {path: leaf for path, leaf in tree.items() if path[-1] != config.kept_leaf}
    small = in_layout(model, before) if len(before) < len(tree) else params["peft"]
    return model.clone(merged=False), in_layout(model, config.unmerge(base, tree)) | {"peft": small}


@overload
def disable(model: PeftClassifier, params: Parameters) -> tuple[SequenceClassifier, Parameters]:
    """For a classifier; see below."""


@overload
def disable(model: PeftT5 | PeftBart, params: Parameters) -> tuple[T5 | Bart, Parameters]:
    """For an encoder-decoder; see below."""


def disable(model: PeftModel, params: Parameters) -> tuple[PlainModel, Parameters]:
    """The plain model without the adapter, but with the trained head (and pooler); its other weights are unchanged.

    Raises:
      ValueError: if the adapter is merged.
    """
    config = config_of(model)
    if model.merged:
        raise ValueError(f"the {config.kind} adapter is merged; unmerge it first")
    return _plain(model, params)


@overload
def merge_and_unload(model: PeftClassifier, params: Parameters) -> tuple[SequenceClassifier, Parameters]:
    """For a classifier; see below."""


@overload
def merge_and_unload(model: PeftT5 | PeftBart, params: Parameters) -> tuple[T5 | Bart, Parameters]:
    """For an encoder-decoder; see below."""


def merge_and_unload(model: PeftModel, params: Parameters) -> tuple[PlainModel, Parameters]:
    """A plain model with the adapter merged into its weights, for `pats_jax.models.save_pretrained`.

    Raises:
      ValueError: if the method cannot be merged.
    """
    config_of(model)
    return _plain(*((model, params) if model.merged else merge(model, params)))


def _plain(model, params):
    return without_adapter(model), {name: tree for name, tree in params.items() if name != "peft"}


def config_of(model: PlainModel) -> PeftConfig:
    """The config of a model's adapter.

    Raises:
      ValueError: if the model has no adapter.
    """
    if not isinstance(model, PeftModel) or model.peft is None:
        raise ValueError("the model has no adapter; add one with add_peft or load_peft")
    return model.peft


def own_parameters(model: PlainModel, params: Parameters) -> FlatTree:
    """The parameters of the model itself, flat, with separate layers."""
    own = {name: tree for name, tree in params.items() if name != "peft"}
    return flatten_dict(unstack_layers(own, _depths(model)))


def own_shapes(model: PlainModel, params: Parameters) -> FlatTree:
    """The shapes of `own_parameters`; computes nothing."""
    return jax.eval_shape(lambda params: own_parameters(model, params), params)


def small_tree(model: PlainModel, params: Parameters) -> FlatTree:
    """The adapter's parameters, flat, with separate layers."""
    return flatten_dict(unstack_layers(params["peft"], _depths(model)))


def _depths(model: PlainModel) -> dict[str, int]:
    """How many layers each side of a model has."""
    if isinstance(model.config, Seq2SeqConfig):
        return model.config.num_layers_of
    return {"encoder": model.config.num_hidden_layers}
