"""A classifier with an adapter: adding, training, merging and removing the adapter."""

from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax import trees
from pats_jax.errors import InputError
from pats_jax.models.bert import SequenceClassifier
from pats_jax.models.peft.adapters import AdapterConfig
from pats_jax.models.peft.bitfit import BitFitConfig
from pats_jax.models.peft.config import FlatTree, PeftConfig
from pats_jax.models.peft.ia3 import Ia3Config
from pats_jax.models.peft.lora import LoraConfig
from pats_jax.models.peft.prefix import PrefixConfig
from pats_jax.models.peft.prompt import PromptConfig

Parameters = dict[str, Any]

KINDS: dict[str, type[PeftConfig]] = {
    config.kind: config for config in (LoraConfig, BitFitConfig, Ia3Config, AdapterConfig, PromptConfig, PrefixConfig)
}


class PeftClassifier(SequenceClassifier):
    """A `SequenceClassifier` with an adapter, whose parameters are ``params["peft"]``; create it with `add_peft`.

    Everything else is the plain model's: arguments, ``embed``, gradient checkpointing, ``first_token_only``.

    Attributes:
        peft: The kind and its settings.
        merged: Whether the adapter is merged into the weights, so that the forward pass omits it.
    """

    peft: PeftConfig | None = None
    merged: bool = False

    @property
    def max_length(self) -> int:
        assert self.peft is not None
        return self.config.max_length - self.peft.virtual_tokens

    def __call__(self, *inputs: Any, deterministic: bool = True, **options: Any) -> Any:
        """As the plain model; see there.

        Raises:
            ValueError: As there; and ``continue_from`` with a prompt, or a text that leaves no room for a prefix.
        """
        if self.merged:
            return super().__call__(*inputs, deterministic=deterministic, **options)
        assert self.peft is not None
        tree = flatten_dict(self.variables["params"]["peft"])
        with nn.intercept_methods(self.peft.interceptor(tree, self.config, deterministic)):
            return super().__call__(*inputs, deterministic=deterministic, **options)


def add_peft(
    model: SequenceClassifier, params: Parameters, config: PeftConfig, key: int | jax.Array
) -> tuple[PeftClassifier, Parameters]:
    """Adds an adapter to a classifier.

    Args:
        model: A plain classifier.
        params: Its parameters; the result shares them.
        config: The kind and its settings.
        key: An int or a typed key, for the adapter's initialization.

    Returns:
        The classifier with the adapter, and its parameters, including ``"peft"``.

    Raises:
        InputError: The settings do not fit the model.
        ValueError: It already has an adapter.

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
        raise InputError(
            "--peft_pooler: RoBERTa has no pooler; the corresponding layer is part of the head; omit the flag"
        )
    tree = draw(model, params, config, trees.own_key(key, f"peft.{config.kind}"))
    return _with_modules(model, config), {**params, "peft": unflatten_dict(tree)}


def draw(model: SequenceClassifier, params: Parameters, config: PeftConfig, key: jax.Array) -> FlatTree:
    """The parameters of a new adapter, flat."""
    held = {path: x for path, x in flatten_dict(params).items() if not config.trains_whole(path)}
    return config.draw(held, model.config, key)


def trainable_mask(model: PeftClassifier, params: Parameters) -> Parameters:
    """A tree of bools like params: True for the adapter, the head and, if the config says so, the pooler."""
    config = config_of(model)

    def is_trained(path, _):
        names = tuple(entry.key for entry in path)
        return names[0] == "peft" or config.trains_whole(names)

    return jax.tree_util.tree_map_with_path(is_trained, params)


def count_parameters(model: PeftClassifier, params: Parameters) -> tuple[int, int]:
    """The number of trained parameters, and of all parameters."""
    sizes = jax.tree.map(lambda p: p.size, params)
    trained = jax.tree.map(lambda size, keep: size * keep, sizes, trainable_mask(model, params))
    return sum(jax.tree.leaves(trained)), sum(jax.tree.leaves(sizes))


def merge(model: PeftClassifier, params: Parameters) -> tuple[PeftClassifier, Parameters]:
    """Merges the adapter into the weights; logits stay the same up to rounding.

    The adapter's own parameters are kept for `unmerge`; `merge_and_unload` drops them.

    Raises:
        ValueError: It is already merged, or the method cannot be merged.
    """
    config = config_of(model)
    if model.merged:
        raise ValueError(f"the {config.kind} adapter is already merged")
    if not config.merges:
        raise ValueError(f"{config.kind} cannot be merged: it does not change the weights")
    return model.clone(merged=True), _replace_base(params, config.merge(*_parts(params)))


def unmerge(model: PeftClassifier, params: Parameters) -> tuple[PeftClassifier, Parameters]:
    """The inverse of `merge`; restores the weights up to rounding.

    Raises:
        ValueError: It is not merged, or a scale of IA3 is zero.
    """
    config = config_of(model)
    if not model.merged:
        raise ValueError(f"the {config.kind} adapter is not merged")
    return model.clone(merged=False), _replace_base(params, config.unmerge(*_parts(params)))


def disable(model: PeftClassifier, params: Parameters) -> tuple[SequenceClassifier, Parameters]:
    """The base model without the adapter, with the trained head (and pooler); its weights are unchanged.

    Raises:
        ValueError: The adapter is merged.
    """
    config = config_of(model)
    if model.merged:
        raise ValueError(f"the {config.kind} adapter is merged; unmerge it first")
    return _plain(model, params)


def merge_and_unload(model: PeftClassifier, params: Parameters) -> tuple[SequenceClassifier, Parameters]:
    """A plain classifier with the adapter merged into its weights, for `pats_jax.models.save_pretrained`.

    Raises:
        ValueError: The method cannot be merged.
    """
    config_of(model)
    return _plain(*((model, params) if model.merged else merge(model, params)))


def _with_modules(model: SequenceClassifier, config: PeftConfig) -> PeftClassifier:
    return PeftClassifier(
        model.config, model.dtype, model.first_token_only, model.gradient_checkpointing, peft=config, merged=False
    )


def _plain(model, params):
    plain = SequenceClassifier(model.config, model.dtype, model.first_token_only, model.gradient_checkpointing)
    return plain, {name: tree for name, tree in params.items() if name != "peft"}


def config_of(model: SequenceClassifier) -> PeftConfig:
    """The config of a model's adapter; raises ValueError if it has none."""
    if not isinstance(model, PeftClassifier) or model.peft is None:
        raise ValueError("the model has no adapter; add one with add_peft or load_peft")
    return model.peft


def own_parameters(params: Parameters) -> FlatTree:
    """The parameters of the model itself, flat."""
    return flatten_dict({name: tree for name, tree in params.items() if name != "peft"})


def _parts(params: Parameters) -> tuple[FlatTree, FlatTree]:
    """The model's own parameters and the adapter's, both flat."""
    return own_parameters(params), flatten_dict(params["peft"])


def _replace_base(params: Parameters, base: FlatTree) -> Parameters:
    return unflatten_dict(base) | {"peft": params["peft"]}
