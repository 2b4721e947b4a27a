"""What encoders share: layouts of their layers, the stack that runs them, norms, activations and look-ups."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pats_jax.models.attention import EINSUM, by_platform, is_fused, softmax_weights, weighted_sum
from pats_jax.models.config import EncoderConfig

# Added to the score of a masked token. Its exponential is exactly 0 in float32, and unlike -inf it leaves a row
# without any token finite: such filler rows must not give NaN.
MASKED = -1e30

Layout = Literal["separate", "stacked"]
SEPARATE, STACKED = LAYOUTS = get_args(Layout)


class Form(NamedTuple):
    """How layers are stored and run; see `pats_jax.models.SequenceClassifier`."""

    layers: str
    unroll: int
    gradient_checkpointing: bool
    attention: str


def _gelu(x: Array) -> Array:
    """The exact GELU, x Phi(x), with erf as in Transformers (JAX's own uses erfc, which is slower on CPU)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def dense(config: EncoderConfig, features: int, dtype: DTypeLike, name: str, *, use_bias: bool = True) -> nn.Dense:
    """A linear layer, its kernel normal with the config's ``initializer_range`` at the start."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=init, name=name)


def project_to_heads(config: EncoderConfig, tokens: Array, dtype: DTypeLike, name: str) -> Array:
    """Projects tokens (batch, length, hidden) to the heads, (batch, length, heads, width), by a layer of that name."""
    projected = dense(config, config.hidden_size, dtype, name)(tokens)
    return projected.reshape(*projected.shape[:2], config.num_attention_heads, -1)


class LayerNorm(nn.Module):
    """Normalises each token over its units: ``(x - mean) / sqrt(variance + eps) * scale + bias``.

    Computed in float32, returned in ``dtype``. Flax's own multiplies scale and 1 / sqrt(variance + eps) first; XLA
    writes that product, an array of the hidden states' size, to memory for the backward pass.
    """

    config: EncoderConfig
    dtype: DTypeLike
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.config.layer_norm_eps) * scale
        if self.use_bias:
            normal += self.param("bias", nn.initializers.zeros, shape)
        return normal.astype(self.dtype)


def embedding_table(config: EncoderConfig, rows: int, width: int, name: str) -> Array:
    """The table of an embedding, (rows, width), under ``name`` in the module that calls."""
    init = nn.initializers.normal(config.initializer_range)
    return jnp.asarray(nn.Embed(rows, width, embedding_init=init, name=name).embedding)


def look_up(table: Array, ids: Array, *, padding: int) -> Array:
    """Rows of a table (rows, hidden) by ids (...), as (..., hidden); NaN for an id that the table does not have.

    The row ``padding`` gets no gradient. Its additions are omitted rather than masked, because a GPU adds the gradients
    of many tokens to one row one after another.
    """
    is_padding = ids == padding
    rows = jnp.take(table, jnp.where(is_padding, len(table), ids), axis=0)
    return jnp.where(is_padding[..., None], jax.lax.stop_gradient(table[padding]), rows)


def choose_row(table: Array, ids: Array) -> Array:
    """Rows of a small table (rows, hidden) by ids (...), as (..., hidden); NaN for an id that the table does not have.

    Selects one row after another, so the gradient is one sum per row instead of a scatter into a few rows.
    """
    chosen = jnp.full((*ids.shape, table.shape[1]), jnp.nan, table.dtype)
    for number, row in enumerate(table):
        chosen = jnp.where((ids == number)[..., None], row, chosen)
    return chosen


def positions_after_padding(is_token: Array, *, padding: int, first: int) -> Array:
    """RoBERTa's positions, int (batch, length): ``padding`` for padding, and tokens are counted from the next on.

    Args:
      is_token: bools (batch, length).
      padding: the position of padding.
      first: how many positions to leave out before the first token.
    """
    return (jnp.cumsum(is_token, axis=1) + first) * is_token + padding


def tied_logits(hidden: Array, word_embeddings: Array) -> Array:
    """Products of states (..., size) with word embeddings (vocab_size, size), summed in float32: (..., vocab_size)."""
    words = word_embeddings.astype(hidden.dtype)
    return jnp.einsum("...h,vh->...v", hidden, words, preferred_element_type=jnp.float32)


def padding_bias(attention_mask: Array) -> Array:
    """What masks padding in scores: float32 (batch, 1, 1, length), from a mask (batch, length)."""
    return jnp.where(attention_mask[:, None, None, :] != 0, 0.0, MASKED)


def pad_front(bias: Array, surplus: int) -> Array:
    """A bias of scores (..., length) for keys that have ``surplus`` more before them, a prefix, to which it adds 0."""
    return jnp.pad(bias, (*((0, 0),) * (bias.ndim - 1), (surplus, 0))) if surplus else bias


def attend(
    config: EncoderConfig,
    attention: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    *,
    deterministic: bool,
) -> Array:
    """Scaled dot-product attention with dropout on the weights, inside of a module's call.

    Args:
      config: the encoder's config.
      attention: "auto", "einsum" or "cudnn", see `pats_jax.models.attention.is_fused`.
      query: (batch, queries, heads, width).
      key: (batch, length, heads, width).
      value: (batch, length, heads, width).
      bias: float32 (batch, 1, 1, length), 0 for tokens and `MASKED` for padding; with "einsum" alone, any that fits
        (batch, heads, queries, length).
      deterministic: whether dropout is off.

    Returns:
      The attended values, (batch, queries, heads * width).
    """
    rate = config.attention_probs_dropout_prob
    if is_fused(attention, query, key, dropout=0.0 if deterministic else rate):
        attended = by_platform(query, key, value, bias)
    else:
        weights = nn.Dropout(rate)(softmax_weights(query, key, bias), deterministic=deterministic)
        attended = weighted_sum(weights, value)
    return attended.reshape(*query.shape[:2], -1)


# ``perturb(number, hidden)``: what layer ``number``, () int32, reads in place of its input (batch, length, hidden)
Perturb = Callable[[Array, Array], Array]


class _LayerInputs(NamedTuple):
    """What layers get besides hidden states and parameters, each (layers, ...), or None if they need none."""

    dropout_keys: Array | None
    numbers: Array | None


def traced_once(
    run: Callable[..., Any], hidden: Array, static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """A function that runs a layer, so that calls for alike layers share their trace.

    XLA inlines the calls, so what is compiled is the same. Outside of a trace the function is as it was: there an
    interceptor may want the values of each layer.

    Args:
      run: the function.
      hidden: what the first layer gets, by which a trace is known.
      static_argnums: as for `jax.jit`.
    """
    return jax.jit(run, static_argnums=static_argnums) if isinstance(hidden, jax.core.Tracer) else run


class LayerStack(nn.Module):
    """All layers: a subtree of parameters for each, "0", "1", ..., or one subtree with a leading axis of layers.

    A layer's dropout key is folded from its number, so dropout is the same in both layouts. The stack may be called
    several times for consecutive layers.

    Attributes:
      layer: the module of a layer, ``layer(config, dtype, attention)``, called as ``layer(hidden, *constants,
        deterministic=..., first_token_only=...)``, and with ``kind=...`` if there are kinds.
      config: the encoder's config.
      dtype: the dtype of computation.
      form: how layers are stored and run.
      kinds: what distinguishes layers that compute differently, one value for each, for example whether its attention
        is local; None if all compute the same. A loop over stacked layers runs one period of the kinds per iteration.
    """

    layer: Callable[..., nn.Module]
    config: EncoderConfig
    dtype: DTypeLike
    form: Form
    kinds: tuple[Hashable, ...] | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        *constants: Any,
        first_layer: int = 0,
        end: int | None = None,
        deterministic: bool,
        first_token_only: bool,
        output_hidden_states: bool,
        perturb: Perturb | None,
    ) -> tuple[Array, ...]:
        """Returns the input of layer ``first_layer``, its output and the output of each later layer before ``end``.

        Without ``output_hidden_states``, stacked layers return only the first and the last of these.

        Args:
          hidden: (batch, length, hidden).
          *constants: what every layer gets besides, such as the bias of scores.
          first_layer: the number of the first layer to run.
          end: one more than the number of the last; None: all.
          deterministic: whether dropout is off.
          first_token_only: whether the model's last layer, if it is run, computes the first token alone.
          output_hidden_states: see above.
          perturb: changes what a layer reads, not what is returned.
        """
        if self.is_initializing() and not first_layer:
            self._initialize(hidden, constants)
        numbers = jnp.arange(first_layer, self.config.num_hidden_layers if end is None else end)
        keys = None
        if not deterministic and self.has_rng("dropout"):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), numbers)
        own = _LayerInputs(keys, None if perturb is None else numbers)
        apply = functools.partial(self._apply, constants, perturb, deterministic)
        only = first_token_only and end in (None, self.config.num_hidden_layers)
        places = range(first_layer, first_layer + len(numbers))
        if self.form.layers == STACKED:
            return self._stacked(apply, hidden, own, places, only, output_hidden_states)
        return self._separate(apply, hidden, own, places, only)

    def _apply(
        self, constants, perturb, deterministic, hidden, variables, own, *, kind, only_first=False, in_loop=False
    ):
        """Runs one layer."""

        def apply(variables, own, hidden, constants):
            key, number = own
            if perturb is not None:
                hidden = perturb(number, hidden)
            rngs = None if key is None else {"dropout": key}
            layer = self.layer(self.config, self.dtype, self.form.attention, parent=None)
            options = {"deterministic": deterministic, "first_token_only": only_first, **kind}
            return layer.apply(variables, hidden, *constants, **options, rngs=rngs)

        if self.form.gradient_checkpointing:
            apply = jax.checkpoint(apply, prevent_cse=self.form.layers == SEPARATE)
        elif in_loop:
            # In a loop XLA cannot choose what to keep for the backward pass. Products alone are enough: on a TPU the
            # step's temporaries are then 1.4 GB in place of 3.3 (BERT-base, 32 x 128 a chip).
            apply = jax.checkpoint(apply, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        return apply(variables, own, hidden, constants)

    def _kind(self, number: int) -> dict[str, Hashable]:
        """The argument that tells a layer its kind, if there are kinds."""
        return {} if self.kinds is None else {"kind": self.kinds[number]}

    def _separate(self, apply, hidden, own, places, first_token_only):
        def run(kind, only_first, *inputs):
            return apply(*inputs, kind=dict(kind), only_first=only_first)

        run = traced_once(run, hidden, static_argnums=(0, 1))
        states = [hidden]
        for index in places:
            variables = {name: tree.get(str(index), {}) for name, tree in self.variables.items()}
            of_layer = jax.tree.map(lambda x, place=index - places.start: x[place], own)
            only = first_token_only and index == places[-1]
            states.append(run(tuple(self._kind(index).items()), only, states[-1], variables, of_layer))
        return tuple(states)

    def _stacked(self, apply, hidden, own, places, first_token_only, output_hidden_states):
        # Matrices are cast for all layers at once, so what the backward pass reads again is not kept a second time.
        stack = jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 2 else x, dict(self.variables))
        if len(places) < self.config.num_hidden_layers:
            stack = jax.tree.map(lambda x: x[places.start : places.stop], stack)
        xs = (stack, own)
        kinds = [self._kind(number) for number in places]
        in_scan = len(places) - first_token_only
        alone, period = _period(kinds[:in_scan])
        states = [hidden]

        def run_one(place, **options):
            variables, inputs = jax.tree.map(lambda x: x[place], xs)
            states.append(apply(states[-1], variables, inputs, kind=kinds[place], **options))

        for place in range(alone):
            run_one(place)
        states += self._scan(apply, states[-1], xs, kinds, range(alone, in_scan), period, output_hidden_states)
        if first_token_only:
            run_one(in_scan, only_first=True)
        return tuple(states) if output_hidden_states else (hidden, states[-1])

    def _scan(self, apply, hidden, xs, kinds, places, period, output_hidden_states):
        """The output of each of some layers, or of the last of them; nothing if there are none."""
        count = len(places) // period
        if not count:
            return []
        unroll = max(1, self.form.unroll // period) if self.form.unroll else count
        scanned = xs
        if len(places) < len(kinds):
            scanned = jax.tree.map(lambda x: x[places.start : places.stop], xs)
        if period > 1:
            scanned = jax.tree.map(lambda x: x.reshape(count, period, *x.shape[1:]), scanned)

        def body(hidden, group):
            outputs = []
            for place in range(period):
                variables, own = jax.tree.map(lambda x, n=place: x[n], group) if period > 1 else group
                kind = kinds[places.start + place]
                hidden = apply(hidden, variables, own, kind=kind, in_loop=unroll < count)
                outputs.append(hidden)
            return hidden, outputs if output_hidden_states else None

        final, inner = jax.lax.scan(body, hidden, scanned, unroll=unroll)
        if not output_hidden_states:
            return [final]
        return [outputs[number] for number in range(count) for outputs in inner]

    def _initialize(self, hidden, constants):
        key = self.make_rng("params")
        layer = self.layer(self.config, self.dtype, EINSUM, parent=None)
        numbers = range(self.config.num_hidden_layers)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(numbers)))

        def draw(kind, key, *inputs):
            options = {"deterministic": True, "first_token_only": False, **dict(kind)}
            return layer.init(key, *inputs, **options)["params"]

        draw = traced_once(draw, hidden, static_argnums=0)
        drawn = [draw(tuple(self._kind(n).items()), keys[n], hidden, *constants) for n in numbers]
        trees = {str(index): tree for index, tree in enumerate(drawn)}
        if self.form.layers == STACKED:
            trees = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
        for name, tree in trees.items():
            self.put_variable("params", name, tree)


def _period(kinds: Sequence[Any]) -> tuple[int, int]:
    """How many layers to run one by one before a loop, and how many in each of its iterations.

    From the first number on, the kinds repeat with the second as their period, in whole periods; the sum of the two is
    the least.

    Examples:
      >>> _period(["global", "local", "local", "global", "local", "local", "global"])
      (1, 3)
      >>> _period([None, None])
      (0, 1)
    """
    found = [
        (alone + period, alone, period)
        for period in range(1, max(2, len(kinds)))
        for alone in range(len(kinds) + 1)
        if (len(kinds) - alone) % period == 0
        and all(kinds[place] == kinds[place - period] for place in range(alone + period, len(kinds)))
    ]
    _, alone, period = min(found)
    return alone, period
