"""BERT and RoBERTa encoders with a sequence classification or regression head, in Flax Linen.

Module names are those of the Hugging Face tensor names, so a parameter's path reads like its tensor's name:
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
    """How the layers are held and run; see `SequenceClassifier`."""

    layers: str
    unroll: int
    gradient_checkpointing: bool
    attention: str


def _gelu(x: Array) -> Array:
    """The exact GELU by erf, as Transformers computes it (JAX's own takes erfc, which is slower on CPU)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _dense(config: EncoderConfig, features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(config.initializer_range), name=name)


class LayerNorm(nn.Module):
    """Normalises each token over its units, with learned scale and bias; statistics and result in float32.

    Flax's own multiplies scale and standard deviation first, an array of the hidden states' size that XLA writes to
    memory for the backward pass.
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

    Rows are looked up and summed in float32, so their gradients add up in float32 as well. As torch has it
    (``padding_idx``), the padding token's word embedding and RoBERTa's position embedding of padding get no gradient.
    """

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, attention_mask: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds tokens, ids (batch, length) or their word embeddings (batch, length, hidden), as the latter shape."""
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
        """BERT: 0, 1, ... (length, hidden). RoBERTa: padding has ``pad_token_id``, the others count on from it."""
        first, length = self.first_position(is_token.shape[1]), is_token.shape[1]
        if not self.config.is_roberta:
            return table[first : first + length]
        padding = self.config.pad_token_id
        return look_up(table, (jnp.cumsum(is_token, axis=1) + first) * is_token + padding, padding=padding)

    def first_position(self, length: int) -> int:
        """The position of the first of ``length`` tokens: 0, unless a prefix (`pats_jax.models.peft`) counts itself."""
        return 0


def look_up(table: Array, ids: Array, *, padding: int) -> Array:
    """Rows of a table (rows, hidden) by ids (...), as (..., hidden); NaN for an id that the table does not have.

    The row ``padding`` gets no gradient. Its adds are left out, not masked: a GPU adds the gradients of many tokens to
    one row one after the other.
    """
    is_padding = ids == padding
    rows = jnp.take(table, jnp.where(is_padding, len(table), ids), axis=0)
    return jnp.where(is_padding[..., None], jax.lax.stop_gradient(table[padding]), rows)


def choose_row(table: Array, ids: Array) -> Array:
    """Rows of a small table (rows, hidden) by ids (...), as (..., hidden); NaN for an id that the table does not have.

    Chosen one row after the other: the gradient is then a sum for each row, without a scatter into few of them.
    """
    chosen = jnp.full((*ids.shape, table.shape[1]), jnp.nan, table.dtype)
    for number, row in enumerate(table):
        chosen = jnp.where((ids == number)[..., None], row, chosen)
    return chosen


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention with dropout on the weights."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        """Attends from some tokens to all.

        Args:
          queries_from: the tokens that attend, (batch, queries, hidden).
          hidden: the tokens attended to, (batch, length, hidden).
          bias: float32 (batch, 1, 1, length), 0 or ``_MASKED``.
          deterministic: no dropout.

        Returns:
          (batch, queries, hidden)
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
        """The place of bottleneck adapters (`pats_jax.models.peft`); without them x, (batch, length, hidden)."""
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
        """Maps (batch, length, hidden) to the same, or to (batch, 1, hidden) for the first token only."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attended = Attention(self.config, self.dtype, self.attention, name="attention")(
            queries_from, hidden, bias, deterministic=deterministic
        )
        wide = Intermediate(self.config, self.dtype, name="intermediate")(attended)
        return ResidualOutput(self.config, self.dtype, name="output")(wide, attended, deterministic=deterministic)


class LayerStack(nn.Module):
    """The layers: each with a subtree of parameters of its own, "0", "1", ..., or one with a leading axis of layers.

    A layer's dropout key is folded from the layer's number, so both draw the same.
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
    ) -> tuple[Array, ...]:
        """Returns what goes into the layer of that number and what comes out of it and of each layer after it.

        Stacked layers without ``output_hidden_states`` return the first and the last of these.
        """
        if self.is_initializing():
            self._initialize(hidden, bias)
        numbers = jnp.arange(first_layer, self.config.num_hidden_layers)
        keys = None
        if not deterministic and self.has_rng("dropout"):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), numbers)
        run = functools.partial(self._stacked if self.form.layers == STACKED else self._separate, hidden, bias, keys)
        return run(first_layer, deterministic, first_token_only, output_hidden_states)

    def _layer(self, hidden, bias, variables, key, deterministic, first_token_only, in_loop=False):
        def apply(variables, key, hidden, bias):
            rngs = None if key is None else {"dropout": key}
            layer = Layer(self.config, self.dtype, self.form.attention, parent=None)
            return layer.apply(variables, hidden, bias, deterministic, first_token_only, rngs=rngs)

        if self.form.gradient_checkpointing:
            apply = jax.checkpoint(apply, prevent_cse=self.form.layers == SEPARATE)
        elif in_loop:
            # In a loop XLA cannot choose what to keep for the backward pass. Products alone are enough: on a TPU the
            # step's temporaries are then 1.4 GB in place of 3.3 (BERT-base, 32 x 128 a chip).
            apply = jax.checkpoint(apply, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        return apply(variables, key, hidden, bias)

    def _separate(self, hidden, bias, keys, first_layer, deterministic, first_token_only, output_hidden_states):
        last = self.config.num_hidden_layers - 1
        states = [hidden]
        for index in range(first_layer, last + 1):
            variables = {name: tree.get(str(index), {}) for name, tree in self.variables.items()}
            key, only = None if keys is None else keys[index - first_layer], first_token_only and index == last
            states.append(self._layer(states[-1], bias, variables, key, deterministic, only))
        return tuple(states)

    def _stacked(self, hidden, bias, keys, first_layer, deterministic, first_token_only, output_hidden_states):
        # Matrices are cast for all layers at once, so what the backward pass reads again is not kept a second time.
        stack = jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 2 else x, dict(self.variables))
        if first_layer:
            stack = jax.tree.map(lambda x: x[first_layer:], stack)
        xs = (stack, keys)
        scanned = jax.tree.map(lambda x: x[:-1], xs) if first_token_only else xs
        unroll = self.form.unroll or self.config.num_hidden_layers
        in_loop = unroll < self.config.num_hidden_layers - first_layer - first_token_only

        def body(hidden, layer):
            variables, key = layer
            hidden = self._layer(hidden, bias, variables, key, deterministic, False, in_loop)
            return hidden, hidden if output_hidden_states else None

        final, inner = jax.lax.scan(body, hidden, scanned, unroll=unroll)
        states = [hidden, *inner] if output_hidden_states else [hidden]
        if first_token_only:
            variables, key = jax.tree.map(lambda x: x[-1], xs)
            states.append(self._layer(final, bias, variables, key, deterministic, True))
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
    """Holds the layers under the name ``layer``."""

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
        **options: bool,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns BERT's pooled output or RoBERTa's first hidden state, (batch, hidden), and the hidden states.

        ``tokens`` are ids, word embeddings or, if it has a number, a hidden state.
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
    """RoBERTa's classification head, which has its own tanh layer in the pooler's place."""

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
      dtype: the dtype of computation; parameters are float32 always.
      first_token_only: in the last layer, compute only the first token's query, attention output and feed-forward:
        nothing else reaches the head. Logits and gradients are the same but for rounding; ``False`` is for
        comparison.
      gradient_checkpointing: keep only what goes from layer to layer for the backward pass, and compute the rest
        again: less memory, about a third more work. Logits and gradients are the same but for rounding.
      layers: ``"separate"`` gives each encoder layer a subtree of parameters, ``encoder.layer.0``, ...;
        ``"stacked"`` gives the leaves under ``encoder.layer`` a leading axis of layers, (layers, ...), and runs
        `jax.lax.scan` over it: one program for all layers, and few arrays for the optimizer.
        `pats_jax.models.stack_layers` and `unstack_layers` convert parameters; the meaning is the same but for
        rounding.
      unroll: layers in one iteration of that scan; 0: all of them, without a loop.
      attention: ``"einsum"``; ``"cudnn"``, the fused kernel for NVIDIA GPUs, which needs bfloat16 or float16, no
        attention dropout, heads of at most 128 units in multiples of 8, and even lengths; or ``"auto"``: cuDNN
        where it can do it and is faster, from 128 tokens on. For other platforms, and for the one query of
        ``first_token_only``, einsum is compiled always. cuDNN has neither second derivatives nor a rule for
        `jax.vmap`, and may refuse parameters that are sharded over devices.
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
        """The longest text in tokens."""
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
        deterministic: bool = True,
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """Computes float32 logits, (batch, num_labels), from one of input_ids, inputs_embeds and continue_from.

        Hidden state 0 is the output of the embeddings, hidden state k that of the k-th layer.

        Args:
          input_ids: token ids, (batch, length).
          attention_mask: 1 for tokens and 0 for padding, (batch, length); all tokens if absent.
          token_type_ids: 0 for the first sentence, 1 for the second, (batch, length); zeros if absent.
          inputs_embeds: word embeddings (see `embed`) in the ids' place, (batch, length, hidden); positions and token
            types are added to them as to the ids' own. RoBERTa then counts positions over the tokens of
            ``attention_mask``; without a mask over all, as Transformers does.
          continue_from: ``(k, states)``: the layers after the k-th are computed, 0 <= k < num_hidden_layers, from
            hidden state k, (batch, length, hidden); nothing below is. Given the same key, their dropout is that of
            a whole pass.
          output_hidden_states: also return the hidden states, from 0 (or k) to the last one, which is that of the
            first token alone under ``first_token_only``.
          deterministic: no dropout. Otherwise ``apply`` needs ``rngs={"dropout": key}``.

        Returns:
          The logits; with ``output_hidden_states`` logits and a tuple of (batch, length, hidden) in ``dtype``.

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

        ``model.apply({"params": params}, input_ids, method="embed")``; no positions, token types or dropout yet.
        """
        tables = self.variables["params"][self.config.base_prefix]["embeddings"]
        words, ids = jnp.asarray(tables["word_embeddings"]["embedding"]), jnp.asarray(input_ids)
        return look_up(words, ids, padding=self.config.pad_token_id)

    def _tokens(self, input_ids, inputs_embeds, continue_from) -> tuple[int | None, Array]:
        """The one input that is given, and the number of the hidden state if it is one."""
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
