"""METHODS: name -> what a method adds to plain fine-tuning, and to which layers; which methods can be combined."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.markup
import rich.table

from pats_jax import objectives, transforms, trees
from pats_jax.companions import child_tuning, dps, l2_sp, mixout, noisy_tune, perturbed, sage, sift
from pats_jax.companions.freeze_unselected import freeze_unselected
from pats_jax.errors import InputError, shown
from pats_jax.models.layout import layer_axis, separate_names
from pats_jax.models.patterns import compile_pattern
from pats_jax.run.settings import Settings, TrainingSettings


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method is built from.

    Attributes:
      settings: the settings of the run, its flags among them.
      total_steps: number of optimizer steps.
      schedule: the learning rate by step.
      params: the parameters that are trained.
      fisher: ``fisher(keep_fraction, mask)``: the mask of Child-Tuning D, measured on the training data.
      response: how noise depends on sensitivity, where the settings do not say.
    """

    settings: TrainingSettings
    total_steps: int
    schedule: optax.Schedule
    params: Any
    fisher: Callable[[float, Any], Any] | None = None
    response: transforms.Response | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A fine-tuning method: what it adds, and where.

    Attributes:
      kind: methods of one kind exclude each other, except "noise" and "objective".
      summary: what it does, in one line.
      source: the paper.
      flags: the settings it reads.
      layers: regex of the paths of the parameters it acts on.
      state_bytes: optimizer state beyond AdamW's 8 bytes, in bytes per parameter it acts on.
      passes: forward and backward passes beyond one each.
      first: makes a transform that runs before clipping and AdamW.
      scaling: makes a transform that runs between Adam and weight decay.
      last: makes a transform that runs after AdamW.
      around: wraps the whole optimizer.
      trainable: regex of the trained parameters; the others have no gradient and no state.
      start: changes the parameters before training.
      objective: makes a term of the loss.
      without_dropout: whether the authors turn dropout off, given the number of steps.
      statistics: scalars that describe the last step, for the log.
    """

    kind: str
    summary: str
    source: str
    flags: tuple[str, ...] = ()
    layers: str = ""
    state_bytes: str = "0"
    passes: str = "none"
    first: Callable[[Context], optax.GradientTransformation] | None = None
    scaling: Callable[[Context], optax.GradientTransformation] | None = None
    last: Callable[[Context], optax.GradientTransformation] | None = None
    around: Callable[[Context, optax.GradientTransformation], optax.GradientTransformation] | None = None
    trainable: str | None = None
    start: Callable[[Any, TrainingSettings], Any] | None = None
    objective: Callable[[TrainingSettings], objectives.Objective] | None = None
    without_dropout: Callable[[int], bool] = lambda total_steps: False
    statistics: Callable[[Any, optax.Schedule, TrainingSettings], dict[str, jax.Array]] | None = None


def get_methods(names: str) -> list[Method]:
    """The methods of ``--method``: one name, or several joined by ``+``.

    Raises:
      InputError: no such method, or two that cannot be combined; the message says why.
    """
    chosen = names.split("+")
    for name in chosen:
        if name not in METHODS:
            what = f"--method {shown(name, quoted=False)}"
            raise InputError(f"{what}: no such method; choose one of {', '.join(METHODS)}, or join several with +")
    for position, name in enumerate(chosen):
        for other in chosen[:position]:
            reason = _conflict(name, other)
            if reason:
                raise InputError(f"--method {names}: {other} and {name} cannot be combined: {reason}")
    return [METHODS[name] for name in chosen]


def check_layers(settings: TrainingSettings, num_layers: int) -> None:
    """Raises InputError if ``settings.method`` needs a layer that a model with ``num_layers`` lacks."""
    if "lnsr" in settings.method.split("+") and settings.lnsr_layer >= num_layers:
        raise InputError(f"--lnsr_layer {settings.lnsr_layer}: must be less than the model's {num_layers} layers")


def _conflict(name, other):
    """Why two methods exclude each other, or None."""
    kinds = {METHODS[name].kind, METHODS[other].kind}
    if name == other:
        return "they are the same"
    if "plain" in kinds:
        return "finetune adds nothing; omit it"
    if len(kinds) == 1 and not kinds & {"noise", "objective"}:
        return _WHY_ONE[METHODS[name].kind]
    if {name, other} == {"mixout", "dps-mix"}:
        return "both replace the weights of the forward pass"
    if {name, other} == {"pats", "perturbed"}:
        return "both read the settings of the noise; to keep the noise use pats, to remove it after each step perturbed"
    if {name, other} in ({"sift", "pats"}, {"sift", "perturbed"}, {"sift", "mixout"}):
        return "SIFT updates single entries; the other method needs whole tensors"
    return None


_WHY_ONE = {
    "subnetwork": "both select the parameters to update",
    "anchor": "both pull weights back to their pretrained values",
    "scaling": "both rescale Adam's step",
}


def learning_rate_schedule(settings: TrainingSettings, total_steps: int) -> optax.Schedule:
    """Linear warmup from 0 over ``warmup_ratio`` of the steps, rounded up, then linear decay to 0 at the end."""
    warmup_steps = math.ceil(total_steps * settings.warmup_ratio)  # as Transformers' TrainingArguments count them
    peak = settings.learning_rate
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    decay = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps]) if warmup_steps else decay


def make_optimizer(
    settings: TrainingSettings,
    total_steps: int,
    params: Any,
    fisher: Callable[[float, Any], Any] | None = None,
    *,
    schedule: optax.Schedule | None = None,
    response: transforms.Response | None = None,
) -> optax.GradientTransformation:
    """AdamW with clipping and the linear schedule, and what ``settings.method`` adds to it.

    Weight decay is applied to the weight matrices only, not to biases and LayerNorm.

    Args:
      settings: see `TrainingSettings`; numbers may be traced, ``seed`` may be a typed key.
      total_steps: number of optimizer steps.
      params: the parameters that are trained.
      fisher: see `Context`; required by Child-Tuning D.
      schedule: the learning rate by step; None: `learning_rate_schedule`.
      response: takes the place of ``settings.response``.

    Raises:
      InputError: on an unknown method, a regex that matches no parameter, or a stage of less than one step.
    """
    methods = get_methods(settings.method)
    schedule = learning_rate_schedule(settings, total_steps) if schedule is None else schedule
    context = Context(settings, total_steps, schedule, params, fisher, response)
    optimizer = optax.chain(
        *(method.first(context) for method in methods if method.first),
        optax.chain(
            _clip_by_global_norm(settings.max_grad_norm),
            optax.chain(
                optax.scale_by_adam(settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon),
                *(method.scaling(context) for method in methods if method.scaling),
                optax.add_decayed_weights(settings.weight_decay, _is_matrix(params)),
                optax.scale_by_learning_rate(schedule),
            ),
        ),
        *(method.last(context) for method in methods if method.last),
    )
    for method in methods:
        if method.around:
            optimizer = method.around(context, optimizer)
    if settings.freeze_unselected:
        optimizer = _freeze_unselected(optimizer, settings)
    return transforms.with_raw_gradient(optimizer)


def _is_matrix(params):
    """A tree of bools like params; the layer axis of stacked layers is no dimension of a tensor."""
    return jax.tree.map(lambda p, axis: p.ndim - (axis >= 0) > 1, params, layer_axis(params))


def _clip_by_global_norm(max_norm):
    """Like `optax.clip_by_global_norm` up to rounding: one factor for all entries, which XLA fuses into what follows.

    Optax divides every entry, and XLA writes the result to memory first: a copy of the gradient.
    """

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(updates), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def trainable_mask(settings: TrainingSettings, params: Any) -> Any:
    """A tree of bools like params: which parameters ``settings.method`` trains; None if it trains all."""
    patterns = [method.trainable for method in get_methods(settings.method) if method.trainable]
    mask = layer_mask(params, patterns[0], "--method") if patterns else None
    if any(isinstance(keep, np.ndarray) for keep in jax.tree.leaves(mask)):
        raise InputError(f"--method {settings.method}: trains some layers only; set --layers separate")
    return mask


def starting_params(settings: TrainingSettings, params: Any) -> Any:
    """The parameters that training starts from."""
    for method in get_methods(settings.method):
        if method.start:
            params = method.start(params, settings)
    return params


def chosen_objectives(settings: TrainingSettings) -> list[objectives.Objective]:
    """The terms that ``settings.method`` adds to the loss."""
    return [method.objective(settings) for method in get_methods(settings.method) if method.objective]


SENSITIVITY_BATCHES = 8


def sensitivity_batches(settings: Settings) -> int:
    """On how many batches sensitivity is measured before and after training; where it is unset, with PATS only."""
    if settings.sensitivity_batches is not None:
        return settings.sensitivity_batches
    return SENSITIVITY_BATCHES if "pats" in settings.method.split("+") else 0


def turns_dropout_off(settings: TrainingSettings, total_steps: int) -> bool:
    """Whether the authors of ``settings.method`` train without dropout."""
    return any(method.without_dropout(total_steps) for method in get_methods(settings.method))


class DropoutRates(TypedDict):
    """Arguments of `models.from_pretrained`; None: the checkpoint's rate."""

    hidden_dropout: float | None
    attention_dropout: float | None
    classifier_dropout: float | None


def dropout_rates(settings: TrainingSettings, total_steps: int | None) -> DropoutRates:
    """The rates that were set, else 0 if the method's authors train without dropout, else None.

    Args:
      settings: see `TrainingSettings`.
      total_steps: number of optimizer steps; None: nothing is trained.
    """
    authors = 0.0 if total_steps is not None and turns_dropout_off(settings, total_steps) else None
    hidden, attention = settings.hidden_dropout, settings.attention_dropout
    return DropoutRates(
        hidden_dropout=authors if hidden is None else hidden,
        attention_dropout=authors if attention is None else attention,
        classifier_dropout=authors if hidden is None else None,
    )


def statistics(settings: TrainingSettings, schedule: optax.Schedule, opt_state: Any) -> dict[str, jax.Array]:
    """Scalars that describe what the methods did in the last step."""
    found = [m.statistics(opt_state, schedule, settings) for m in get_methods(settings.method) if m.statistics]
    return {name: value for figures in found for name, value in figures.items()}


def layer_mask(params: Any, pattern: str, flag: str = "--noise_layers") -> Any:
    """A tree of bools like params: whether the parameter's path, its names joined by dots, matches the regex.

    Of stacked layers each layer's own path is matched, as if they were separate; where only some match, the answer is
    an array of bools (layers,).

    Raises:
      InputError: if the pattern is not a valid regex, takes too long to match, or matches no parameter.
    """
    matches = compile_pattern(pattern, flag)
    names: list[str] = []

    def matched(path, param):
        names.extend(own := separate_names(path, param))
        return trees.as_kept([matches(name) for name in own])

    mask = jax.tree_util.tree_map_with_path(matched, params)
    if not any(np.any(keep) for keep in jax.tree.leaves(mask)):
        raise InputError(f"{flag} {shown(pattern)}: matches no parameter; one path is {names[-1]}")
    return mask


def as_table() -> rich.table.Table:
    """A table of all methods: what each does, its settings with defaults, its costs and its source."""
    table = rich.table.Table(show_lines=True)
    for title in ("method", "what it does", "settings", "beyond AdamW"):
        table.add_column(title, overflow="fold")
    defaults = TrainingSettings()
    for name, method in METHODS.items():
        what = f"{method.summary}\n{method.layers or 'all parameters'}\n{method.source}"
        flags = "\n".join(f"--{flag} {getattr(defaults, flag)}" for flag in method.flags)
        costs = f"{method.state_bytes} bytes of state per parameter\nextra passes: {method.passes}"
        table.add_row(*map(rich.markup.escape, (name, what, flags, costs)))
    return table


# what the methods add


def _layers(name):
    """A function from trained parameters to the mask of those that a method acts on."""
    return lambda params: layer_mask(params, METHODS[name].layers, f"--method {name}")


def _noise_scale(schedule, settings):
    """The noise scale follows the learning rate, so noise vanishes at the end of training."""
    return lambda count: settings.noise_scale * schedule(count) / settings.learning_rate


def _pats(context, transform=transforms.pats_noise):
    settings = context.settings
    return transform(
        0.0 if trees.is_plainly(settings.noise_scale, 0) else _noise_scale(context.schedule, settings),
        key=settings.seed,
        decay=settings.decay,
        response=settings.response if context.response is None else context.response,
        distribution=settings.distribution,
        mask=layer_mask(context.params, settings.noise_layers),
        sensitivity_dtype=settings.sensitivity_dtype,
        layer_axis=layer_axis,
    )


def _perturbed(context):
    return _pats(context, perturbed.perturbed)


def _noise_statistics(opt_state, schedule, settings):
    scale = _noise_scale(schedule, settings)
    return transforms.noise_statistics(opt_state, scale, settings.response, layer_axis=layer_axis)


def _stage_steps(context):
    """us = int(total steps * update ratio), the length of a stage of DPS."""
    steps = int(context.total_steps * context.settings.update_ratio)
    if steps < 1:
        raise InputError(f"--update_ratio {context.settings.update_ratio}: gives stages of 0 steps; increase it")
    return steps


def _keep_fraction(context, authors):
    return authors if context.settings.keep_fraction is None else context.settings.keep_fraction


def _dps_dense(context):
    mask = _layers("dps-dense")(context.params)
    return dps.dps_dense(_keep_fraction(context, 0.7), _stage_steps(context), mask=mask, layer_axis=layer_axis)


def _dps_mix(context):
    mask = _layers("dps-mix")(context.params)
    keep, key = _keep_fraction(context, 0.7), context.settings.seed
    return dps.dps_mix(keep, _stage_steps(context), key=key, mask=mask, layer_axis=layer_axis)


def _child_tuning_f(context):
    keep, key = _keep_fraction(context, 0.3), context.settings.seed
    return child_tuning.child_tuning_f(keep, key=key, layer_axis=layer_axis)


def _child_tuning_d(context):
    if context.fisher is None:
        raise InputError("--method child-d: needs training data to measure the Fisher information")
    return child_tuning.child_tuning_d(context.fisher(_keep_fraction(context, 0.3), _layers("child-d")(context.params)))


def _mixout(context):
    settings, mask = context.settings, _layers("mixout")(context.params)
    return mixout.mixout(settings.drop_fraction, key=settings.seed, mask=mask, layer_axis=layer_axis)


def _l2_sp(context):
    settings = context.settings
    head = layer_mask(context.params, _HEAD, "--method l2-sp")
    return l2_sp.l2_sp(settings.pretrained_strength, settings.head_strength, head_mask=head)


def _sage(context):
    return sage.scale_by_sage(context.settings.sage_decay, mask=_layers("sage")(context.params))


def _sift(context, optimizer):
    mask = _layers("sift")(context.params)
    return sift.sift(optimizer, context.settings.sift_rate, mask=mask, layer_axis=layer_axis)


def _noisy_tune(params, settings):
    return noisy_tune.noisy_tune(params, settings.noise_intensity, key=settings.seed, layer_axis=layer_axis)


def _r3f(settings):
    return objectives.r3f(settings.r3f_lambda, settings.r3f_eps)


def _r_drop(settings):
    return objectives.r_drop(settings.r_drop_alpha)


def _smart(settings):
    return objectives.smart(settings.smart_alpha, settings.smart_step_size, settings.smart_noise_std)


def _lnsr(settings):
    return objectives.lnsr(settings.lnsr_layer, settings.lnsr_lambda, settings.lnsr_noise_std)


def _freeze_unselected(optimizer, settings):
    try:
        frozen = freeze_unselected(optimizer)
    except ValueError as error:
        raise InputError(f"--freeze_unselected: {error}") from None
    if not any(name in settings.method.split("+") for name in ("dps-dense", "dps-mix", "child-d")):
        raise InputError(f"--freeze_unselected: --method {settings.method} has no lasting selection; omit the flag")
    return frozen


_HEAD = r"^classifier\."
_MATRICES = r"encoder\.layer\..*\.kernel$"
_WITH_POOLER_AND_HEAD = r"(encoder\.layer|pooler|^classifier).*\.kernel$"
_ATTENTION = r"attention\.(self\.(query|key|value)|output\.dense)\.kernel$"

METHODS = {
    "finetune": Method("plain", "AdamW on every parameter", "https://arxiv.org/abs/1810.04805"),
    "pats": Method(
        "noise",
        "adds noise to the weights, more to those with low sensitivity",
        "https://arxiv.org/abs/2210.12403",
        ("noise_scale", "decay", "response", "distribution", "noise_layers", "sensitivity_dtype"),
        layers=_MATRICES,
        state_bytes="4",
        last=_pats,
        statistics=_noise_statistics,
    ),
    "perturbed": Method(
        "noise",
        "adds the noise of pats in the forward pass of each step only",
        "ours: a control for https://arxiv.org/abs/2210.12403",
        ("noise_scale", "decay", "response", "distribution", "noise_layers", "sensitivity_dtype"),
        layers=_MATRICES,
        state_bytes="8",
        last=_perturbed,
        statistics=_noise_statistics,
    ),
    "dps-dense": Method(
        "subnetwork",
        "trains the weights with the largest gradients, selected anew every other stage",
        "https://arxiv.org/abs/2211.01642",
        ("keep_fraction", "update_ratio", "freeze_unselected"),
        layers=_WITH_POOLER_AND_HEAD,
        state_bytes="4",
        first=_dps_dense,
        without_dropout=lambda total_steps: total_steps < 2000,
    ),
    "dps-mix": Method(
        "subnetwork",
        "like dps-dense, with older weights mixed into the forward pass",
        "https://arxiv.org/abs/2211.01642",
        ("keep_fraction", "update_ratio", "freeze_unselected"),
        layers=_WITH_POOLER_AND_HEAD,
        state_bytes="13",
        first=_dps_mix,
        without_dropout=lambda total_steps: True,
    ),
    "sage": Method(
        "scaling",
        "scales steps by the uncertainty of sensitivity; use 2 to 5 times the usual learning rate",
        "https://arxiv.org/abs/2202.02664",
        ("sage_decay",),
        layers=r"encoder\.layer\.(?!.*LayerNorm).*\.(kernel|bias)$",
        state_bytes="4",
        scaling=_sage,
    ),
    "noisytune": Method(
        "noise",
        "adds a little noise to every tensor once, before training",
        "https://arxiv.org/abs/2202.12024",
        ("noise_intensity",),
        start=_noisy_tune,
    ),
    "child-f": Method(
        "subnetwork",
        "keeps a random fraction of the gradient at each step",
        "https://arxiv.org/abs/2109.05687",
        ("keep_fraction",),
        first=_child_tuning_f,
    ),
    "child-d": Method(
        "subnetwork",
        "keeps a fixed fraction of the encoder's gradient, selected by Fisher information",
        "https://arxiv.org/abs/2109.05687",
        ("keep_fraction", "freeze_unselected"),
        layers=r"encoder\.layer\.",
        state_bytes="1",
        passes="one epoch before training",
        first=_child_tuning_d,
    ),
    "mixout": Method(
        "anchor",
        "mixes pretrained weights into the forward pass",
        "https://arxiv.org/abs/1909.11299",
        ("drop_fraction",),
        layers=r"(encoder\.layer|pooler).*\.kernel$",
        state_bytes="4",
        first=_mixout,
        without_dropout=lambda total_steps: True,
    ),
    "l2-sp": Method(
        "anchor",
        "decays weights towards their pretrained values; use it with --weight_decay 0",
        "https://arxiv.org/abs/1802.01483",
        ("pretrained_strength", "head_strength"),
        state_bytes="4",
        first=_l2_sp,
    ),
    "r3f": Method(
        "objective",
        "penalizes changes of the output under small random noise on the word embeddings",
        "https://arxiv.org/abs/2008.03156",
        ("r3f_lambda", "r3f_eps"),
        layers="none",
        passes="one forward and backward",
        objective=_r3f,
    ),
    "r-drop": Method(
        "objective",
        "penalizes disagreement between two passes with different dropout",
        "https://arxiv.org/abs/2106.14448",
        ("r_drop_alpha",),
        layers="none",
        passes="one forward and backward",
        objective=_r_drop,
    ),
    "smart": Method(
        "objective",
        "penalizes changes of the output under a small adversarial step on the word embeddings",
        "https://arxiv.org/abs/1911.03437",
        ("smart_alpha", "smart_step_size", "smart_noise_std"),
        layers="none",
        passes="two forward, one backward, one to the embeddings",
        objective=_smart,
    ),
    "lnsr": Method(
        "objective",
        "penalizes how far noise on one layer's output changes the layers above it",
        "https://arxiv.org/abs/2206.05658",
        ("lnsr_layer", "lnsr_lambda", "lnsr_noise_std"),
        layers="none",
        passes="one forward and backward above the layer",
        objective=_lnsr,
    ),
    "sift": Method(
        "subnetwork",
        "trains the head and the entries of each attention matrix with the largest first gradients",
        "https://arxiv.org/abs/2312.11875",
        ("sift_rate",),
        layers=_ATTENTION,
        state_bytes="12 per selected entry, instead of 8 per entry",
        around=_sift,
        trainable=f"{_ATTENTION}|pooler|{_HEAD}",
    ),
    "bitfit": Method(
        "subnetwork",
        "trains only the biases and the head; use a learning rate near 1e-3",
        "https://arxiv.org/abs/2106.10199",
        layers=rf"bias$|{_HEAD}",
        state_bytes="-8 for all others",
        passes="no gradients of weights",
        trainable=rf"bias$|{_HEAD}",
    ),
}
