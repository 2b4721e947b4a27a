"""BERT and RoBERTa encoders with a sequence classification or regression head, in Flax Linen.

Modules are named after the Hugging Face tensors, so a parameter's path reads like its tensor's name:
``params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]``.

References:
  Devlin et al. 2019, BERT (arXiv:1810.04805); Liu et al. 2019, RoBERTa (arXiv:1907.11692).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from pats_jax.models.attention import ATTENTIONS, EINSUM, by_platform, is_fused, softmax_weights, weighted_sum
from pats_jax.models.config import EncoderConfig

# Added to the score of a masked token. Its exponential is exactly 0 in float32, and unlike -inf it leaves a row
# without any token finite: such filler rows must not give NaN.
_MASKED = -1e30

Layout = Literal["separate", "stacked"]
SEPARATE, STACKED = LAYOUTS = get_args(Layout)


class Form(NamedTuple):
    """How layers are stored and run; see `SequenceClassifier`."""

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


def _dense(config: EncoderConfig, features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(config.initializer_range), name=name)


class LayerNorm(nn.Module):
    """Normalises each token over its units: ``(x - mean) / sqrt(variance + eps) * scale + bias``.

    Computed in float32, returned in ``dtype``. Flax's own multiplies scale and 1 / sqrt(variance + eps) first; XLA
    writes that product, an array of the hidden states' size, to memory for the backward pass.
    """

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.config.hidden_size,)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.config.layer_norm_eps)
        return (normal * scale + bias).astype(self.dtype)


def _layer_norm(config: EncoderConfig, dtype: DTypeLike) -> LayerNorm:
    return LayerNorm(config, dtype, name="LayerNorm")


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised.

    Rows are looked up and summed in float32, so their gradients are summed in float32 too. As in torch
    (``padding_idx``), the word embedding of the padding token and RoBERTa's position embedding of padding get no
    gradient.
    """

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, attention_mask: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds ids (batch, length), or word embeddings (batch, length, hidden), as (batch, length, hidden)."""
        config = self.config

        def table(count: int, name: str) -> Array:
            init = nn.initializers.normal(config.initializer_range)
            return nn.Embed(count, config.hidden_size, embedding_init=init, name=name).embedding

        if tokens.ndim == 2:
            words, is_token = table(config.vocab_size, "word_embeddings"), tokens != config.pad_token_id
            hidden = look_up(words, tokens, padding=config.pad_token_id)
        else:
            hidden, is_token = tokens.astype(jnp.float32), attention_mask != 0
        hidden += choose_row(table(config.type_vocab_size, "token_type_embeddings"), token_type_ids)
        hidden += self._positions(table(config.max_position_embeddings, "position_embeddings"), is_token)
        hidden = _layer_norm(config, self.dtype)(hidden)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def _positions(self, table: Array, is_token: Array) -> Array:
        """Position embeddings, (length, hidden) for BERT, (batch, length, hidden) for RoBERTa.

        BERT counts positions from 0. RoBERTa gives padding position ``pad_token_id`` and counts tokens from the next.
        """
        first, length = self.first_position(is_token.shape[1]), is_token.shape[1]
        if not self.config.is_roberta:
            return table[first : first + length]
        padding = self.config.pad_token_id
        return look_up(table, (jnp.cumsum(is_token, axis=1) + first) * is_token + padding, padding=padding)

    def first_position(self, length: int) -> int:
        """The position of the first of ``length`` tokens: 0, unless a prefix comes before it."""
        return 0


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


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention, softmax(Q K^T / sqrt(width)) V, with dropout on the weights."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        """Attends from the query tokens to all tokens.

        Args:
          queries_from: the tokens that attend, (batch, queries, hidden).
          hidden: the tokens attended to, (batch, length, hidden).
          bias: float32 (batch, 1, 1, length): 0 for tokens, ``_MASKED`` for padding.
          deterministic: whether dropout is off.

        Returns:
          The attended values, (batch, queries, hidden).
        """
        config = self.config
        heads = config.num_attention_heads
        width = config.hidden_size // heads

        def project(tokens: Array, name: str) -> Array:
            projected = _dense(config, config.hidden_size, self.dtype, name)(tokens)
            return projected.reshape(*projected.shape[:2], heads, width)

        query = project(queries_from, "query")
        key = project(hidden, "key")
        value = project(hidden, "value")
        dropout = 0.0 if deterministic else config.attention_probs_dropout_prob
        if is_fused(self.attention, query, key, dropout=dropout):
            return by_platform(query, key, value, bias).reshape(queries_from.shape)
        weights = softmax_weights(query, key, bias)
        weights = nn.Dropout(config.attention_probs_dropout_prob)(weights, deterministic=deterministic)
        return weighted_sum(weights, value).reshape(queries_from.shape)


class ResidualOutput(nn.Module):
    """Projects back to the hidden size and adds the residual: ``LayerNorm(residual + dropout(dense(x)))``."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        x = _dense(self.config, self.config.hidden_size, self.dtype, "dense")(x)
        x = nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        norm = _layer_norm(self.config, self.dtype)
        return norm(residual + self.adapt(x, residual, norm))

    def adapt(self, x: Array, residual: Array, norm: LayerNorm) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x


class Attention(nn.Module):
    """Self-attention and its output projection."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        attended = SelfAttention(self.config, self.dtype, self.attention, name="self")(
            queries_from, hidden, bias, deterministic=deterministic
        )
        output = ResidualOutput(self.config, self.dtype, name="output")
        return output(attended, queries_from, deterministic=deterministic)


class Intermediate(nn.Module):
    """The wide half of the feed-forward block."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        wide = _dense(self.config, self.config.intermediate_size, self.dtype, "dense")(hidden)
        return ACTIVATION_FUNCTIONS[self.config.hidden_act](wide)


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, deterministic: bool, first_token_only: bool) -> Array:
        """Maps (batch, length, hidden) to the same shape, or to (batch, 1, hidden) with ``first_token_only``."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attended = Attention(self.config, self.dtype, self.attention, name="attention")(
            queries_from, hidden, bias, deterministic=deterministic
        )
        wide = Intermediate(self.config, self.dtype, name="intermediate")(attended)
        return ResidualOutput(self.config, self.dtype, name="output")(wide, attended, deterministic=deterministic)


# ``perturb(number, hidden)``: what layer ``number``, () int32, reads in place of its input (batch, length, hidden)
Perturb = Callable[[Array, Array], Array]


class _LayerInputs(NamedTuple):
    """What layers get besides hidden states and parameters, each (layers, ...), or None if they need none."""

    dropout_keys: Array | None
    numbers: Array | None


class LayerStack(nn.Module):
    """All layers: a subtree of parameters for each, "0", "1", ..., or one subtree with a leading axis of layers.

    A layer's dropout key is folded from its number, so dropout is the same in both layouts.
    """

    config: EncoderConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        bias: Array,
        *,
        first_layer: int,
        deterministic: bool,
        first_token_only: bool,
        output_hidden_states: bool,
        perturb: Perturb | None,
    ) -> tuple[Array, ...]:
        """Returns the input of layer ``first_layer``, its output and the output of each later layer.

        Without ``output_hidden_states``, stacked layers return only the first and the last of these. ``perturb``
        changes what a layer reads, not what is returned.
        """
        if self.is_initializing():
            self._initialize(hidden, bias)
        numbers = jnp.arange(first_layer, self.config.num_hidden_layers)
        keys = None
        if not deterministic and self.has_rng("dropout"):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), numbers)
        own = _LayerInputs(keys, None if perturb is None else numbers)
        run = functools.partial(self._stacked if self.form.layers == STACKED else self._separate, hidden, bias, own)
        return run(perturb, first_layer, deterministic, first_token_only, output_hidden_states)

    def _layer(self, hidden, bias, variables, own, perturb, deterministic, first_token_only, in_loop=False):
        def apply(variables, own, hidden, bias):
            key, number = own
            if perturb is not None:
                hidden = perturb(number, hidden)
            rngs = None if key is None else {"dropout": key}
            layer = Layer(self.config, self.dtype, self.form.attention, parent=None)
            return layer.apply(variables, hidden, bias, deterministic, first_token_only, rngs=rngs)

        if self.form.gradient_checkpointing:
            apply = jax.checkpoint(apply, prevent_cse=self.form.layers == SEPARATE)
        elif in_loop:
            # In a loop XLA cannot choose what to keep for the backward pass. Products alone are enough: on a TPU the
            # step's temporaries are then 1.4 GB in place of 3.3 (BERT-base, 32 x 128 a chip).
            apply = jax.checkpoint(apply, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        return apply(variables, own, hidden, bias)

    def _separate(self, hidden, bias, own, perturb, first_layer, deterministic, first_token_only, output_hidden_states):
        last = self.config.num_hidden_layers - 1
        states = [hidden]
        for index in range(first_layer, last + 1):
            variables = {name: tree.get(str(index), {}) for name, tree in self.variables.items()}
            of_layer = jax.tree.map(lambda x, place=index - first_layer: x[place], own)
            only = first_token_only and index == last
            states.append(self._layer(states[-1], bias, variables, of_layer, perturb, deterministic, only))
        return tuple(states)

    def _stacked(self, hidden, bias, own, perturb, first_layer, deterministic, first_token_only, output_hidden_states):
        # Matrices are cast for all layers at once, so what the backward pass reads again is not kept a second time.
        stack = jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 2 else x, dict(self.variables))
        if first_layer:
            stack = jax.tree.map(lambda x: x[first_layer:], stack)
        xs = (stack, own)
        scanned = jax.tree.map(lambda x: x[:-1], xs) if first_token_only else xs
        unroll = self.form.unroll or self.config.num_hidden_layers
        in_loop = unroll < self.config.num_hidden_layers - first_layer - first_token_only

        def body(hidden, layer):
            variables, own = layer
            hidden = self._layer(hidden, bias, variables, own, perturb, deterministic, False, in_loop)
            return hidden, hidden if output_hidden_states else None

        final, inner = jax.lax.scan(body, hidden, scanned, unroll=unroll)
        states = [hidden, *inner] if output_hidden_states else [hidden]
        if first_token_only:
            variables, own = jax.tree.map(lambda x: x[-1], xs)
            states.append(self._layer(final, bias, variables, own, perturb, deterministic, True))
        elif not output_hidden_states:
            states.append(final)
        return tuple(states)

    def _initialize(self, hidden, bias):
        layer, key = Layer(self.config, self.dtype, EINSUM, parent=None), self.make_rng("params")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.config.num_hidden_layers))
        drawn = [layer.init(key, hidden, bias, True, False)["params"] for key in keys]
        trees = {str(index): tree for index, tree in enumerate(drawn)}
        if self.form.layers == STACKED:
            trees = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
        for name, tree in trees.items():
            self.put_variable("params", name, tree)


class Encoder(nn.Module):
    """The encoder layers, with parameters under ``layer``."""

    config: EncoderConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, **options: Any) -> tuple[Array, ...]:
        return LayerStack(self.config, self.dtype, self.form, name="layer")(hidden, bias, **options)


class Pooler(nn.Module):
    """BERT's pooler: a tanh layer on the first token."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        return jnp.tanh(_dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden[:, 0]))


class EncoderModel(nn.Module):
    """Embeddings, encoder and, for BERT, the pooler."""

    config: EncoderConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        attention_mask: Array,
        token_type_ids: Array,
        *,
        hidden_state: int | None,
        deterministic: bool,
        **options: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns BERT's pooled output or RoBERTa's first hidden state, (batch, hidden), and the hidden states.

        ``tokens`` are ids, word embeddings or, if ``hidden_state`` is a number, the hidden state of that number.
        """
        bias = jnp.where(attention_mask[:, None, None, :] != 0, 0.0, _MASKED)
        if hidden_state is None:
            tokens = Embeddings(self.config, self.dtype, name="embeddings")(
                tokens, attention_mask, token_type_ids, deterministic=deterministic
            )
        states = Encoder(self.config, self.dtype, self.form, name="encoder")(
            tokens, bias, first_layer=hidden_state or 0, deterministic=deterministic, **options
        )
        if self.config.is_roberta:
            return states[-1][:, 0], states
        return Pooler(self.config, self.dtype, name="pooler")(states[-1]), states


class RobertaHead(nn.Module):
    """RoBERTa's classification head, which has a tanh layer instead of BERT's pooler."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Array, *, deterministic: bool) -> Array:
        dropout = nn.Dropout(self.config.head_dropout, deterministic=deterministic)
        features = _dense(self.config, self.config.hidden_size, self.dtype, "dense")(dropout(features))
        return _dense(self.config, self.config.num_labels, self.dtype, "out_proj")(dropout(jnp.tanh(features)))


class SequenceClassifier(nn.Module):
    """A BERT or RoBERTa encoder with a classification or regression head.

    Attributes:
      config: sizes, rates and labels.
      dtype: the dtype of computation; parameters are always float32.
      first_token_only: whether the last layer computes only the first token's query, attention output and feed-forward,
        because nothing else reaches the head. Logits and gradients are the same up to rounding; ``False`` is for
        comparison.
      gradient_checkpointing: whether to keep only the inputs of the layers for the backward pass and recompute the
        rest: less memory, about a third more work. Logits and gradients are the same up to rounding.
      layers: ``"separate"`` gives each encoder layer a subtree of parameters, ``encoder.layer.0``, ...; ``"stacked"``
        gives the leaves under ``encoder.layer`` a leading axis of layers, (layers, ...), and runs `jax.lax.scan` over
        it: one program for all layers, and few arrays for the optimizer. `pats_jax.models.stack_layers` and
        `unstack_layers` convert parameters; outputs are the same up to rounding.
      unroll: number of layers per iteration of that scan; 0 means all of them, without a loop.
      attention: ``"einsum"``; ``"cudnn"``, the fused kernel for NVIDIA GPUs, which needs bfloat16 or float16, no
        attention dropout, heads of at most 128 units in multiples of 8, and even lengths; or ``"auto"``: cuDNN where it
        works and is faster, for at least 128 tokens. Other platforms, and the single query of ``first_token_only``,
        always use einsum. cuDNN supports neither second derivatives nor `jax.vmap`, and may refuse parameters that are
        sharded over devices.
    """

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32
    first_token_only: bool = True
    gradient_checkpointing: bool = False
    layers: str = SEPARATE
    unroll: int = 1
    attention: str = EINSUM

    def __post_init__(self):
        if self.layers not in LAYOUTS:
            raise ValueError(f"layers={self.layers!r} is not one of {', '.join(map(repr, LAYOUTS))}")
        if self.unroll < 0:
            raise ValueError(f"unroll={self.unroll} must be at least 0")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention={self.attention!r} is not one of {', '.join(map(repr, ATTENTIONS))}")
        super().__post_init__()

    @property
    def max_length(self) -> int:
        """The length of the longest text, in tokens."""
        return self.config.max_length

    @nn.compact
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        inputs_embeds: ArrayLike | None = None,
        continue_from: tuple[int, ArrayLike] | None = None,
        output_hidden_states: bool = False,
        perturb: Perturb | None = None,
        deterministic: bool = True,
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """Computes float32 logits, (batch, num_labels), from one of input_ids, inputs_embeds and continue_from.

        Hidden state 0 is the output of the embeddings, hidden state k the output of the k-th layer.

        Args:
          input_ids: token ids, (batch, length).
          attention_mask: 1 for tokens and 0 for padding, (batch, length); None means 1 everywhere.
          token_type_ids: 0 for the first sentence, 1 for the second, (batch, length); None means 0 everywhere.
          inputs_embeds: word embeddings (see `embed`) in place of ids, (batch, length, hidden); positions and token
            types are added as usual. RoBERTa then counts positions over the tokens of ``attention_mask``, or over all
            tokens without a mask, as Transformers does.
          continue_from: ``(k, states)`` computes only the layers after the k-th, 0 <= k < num_hidden_layers, from
            hidden state k, (batch, length, hidden). With the same key, their dropout is that of a whole pass.
          output_hidden_states: whether to return the hidden states too, from 0 (or k) to the last; with
            ``first_token_only`` the last one has the first token alone.
          perturb: ``perturb(number, hidden)`` returns what a layer reads in place of its input ``hidden``, (batch,
            length, hidden), by the layer's number from 0, () int32; hidden states are returned as they were.
          deterministic: whether dropout is off. If it is on, ``apply`` needs ``rngs={"dropout": key}``.

        Returns:
          The logits; with ``output_hidden_states``, the logits and a tuple of hidden states, (batch, length, hidden)
          each in ``dtype``.

        Raises:
          ValueError: if none or several of the three inputs are given, k is out of range, or the sequences are longer
            than the model has positions.
        """
        config = self.config
        hidden_state, tokens = self._tokens(input_ids, inputs_embeds, continue_from)
        shape = tokens.shape[:2]
        if shape[1] > config.max_length:
            raise ValueError(f"sequences have {shape[1]} tokens, but the model has {config.max_length} positions")
        if attention_mask is None:
            attention_mask = jnp.ones(shape, jnp.int32)
        if token_type_ids is None:
            token_type_ids = jnp.zeros(shape, jnp.int32)
        form = Form(self.layers, self.unroll, self.gradient_checkpointing, self.attention)
        features, states = EncoderModel(config, self.dtype, form, name=config.base_prefix)(
            tokens,
            jnp.asarray(attention_mask),
            jnp.asarray(token_type_ids),
            hidden_state=hidden_state,
            deterministic=deterministic,
            first_token_only=self.first_token_only,
            output_hidden_states=output_hidden_states,
            perturb=perturb,
        )
        if config.is_roberta:
            logits = RobertaHead(config, self.dtype, name="classifier")(features, deterministic=deterministic)
        else:
            features = nn.Dropout(config.head_dropout)(features, deterministic=deterministic)
            logits = _dense(config, config.num_labels, self.dtype, "classifier")(features)
        logits = logits.astype(jnp.float32)
        return (logits, states) if output_hidden_states else logits

    def embed(self, input_ids: ArrayLike) -> Array:
        """The word embeddings of ids (batch, length): float32 (batch, length, hidden), as ``inputs_embeds`` takes them.

        Positions, token types and dropout are not yet applied. Call it by
        ``model.apply({"params": params}, input_ids, method="embed")``.
        """
        tables = self.variables["params"][self.config.base_prefix]["embeddings"]
        words, ids = jnp.asarray(tables["word_embeddings"]["embedding"]), jnp.asarray(input_ids)
        return look_up(words, ids, padding=self.config.pad_token_id)

    def _tokens(self, input_ids, inputs_embeds, continue_from) -> tuple[int | None, Array]:
        """The number of the hidden state that is given, else None; and the one input that is given.

        Raises:
          ValueError: if none or several inputs are given, or there is no such hidden state.
        """
        if sum(x is not None for x in (input_ids, inputs_embeds, continue_from)) != 1:
            raise ValueError("pass exactly one of input_ids, inputs_embeds and continue_from")
        if input_ids is not None:
            return None, jnp.asarray(input_ids)
        if inputs_embeds is not None:
            return None, jnp.asarray(inputs_embeds, jnp.float32)
        number, layers = continue_from[0], self.config.num_hidden_layers
        if not 0 <= number < layers:
            raise ValueError(f"hidden state {number}: must be 0 to {layers - 1}, which have a layer above")
        return number, jnp.asarray(continue_from[1], self.dtype)
