"""What BART and T5 have in common: attention with a cache, stacks of layers in both layouts, the steps of decoding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from pats_jax.models.layers import LAYOUTS, SEPARATE, STACKED, traced_once
from pats_jax.models.seq2seq_config import Seq2SeqConfig
from pats_jax.train_state import IGNORED

# Added to the score of a masked token. Its exponential is exactly 0 in float32, and unlike -inf it leaves a row
# without any token finite.
_MASKED = -1e30

KeysValues = tuple[Array, Array]  # (batch, heads, length, width) each


class Form(NamedTuple):
    """How the layers are held and run; see `EncoderDecoder`."""

    layers: str
    unroll: int
    gradient_checkpointing: bool


class Cache(NamedTuple):
    """What the decoder keeps from token to token; each field holds one pair of keys and values per layer.

    Attributes:
      own: of the tokens before: (batch, heads, beams, length, width) each. A beam writes to the slot of its number,
        and what was written never moves: `Chosen` says whose slots a beam continues.
      cross: of the encoder's states, (batch, heads, source length, width) each, the same for all beams.
    """

    own: tuple[KeysValues, ...]
    cross: tuple[KeysValues, ...]


Chosen = Array  # bool (batch, beams, beams, length): whether a beam attends to the token in that slot and place


@jax.custom_vjp
def embed(table: Array, ids: Array, felt: Array) -> Array:
    """Rows of a table (rows, hidden) by ids (...), as (..., hidden); NaN for an id that the table does not have.

    Rows get no gradient from where ``felt`` (...), bool, is false. Those additions are omitted, not masked: a GPU adds
    the gradients of many tokens to one row, that of padding, one after the other.
    """
    return jnp.take(table, ids, axis=0)


def _gradient_of_table(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, None, None]:
    """Adds the rows of a gradient (..., hidden) to the rows of the table that they come from.

    On CPU the rows are sorted before. XLA (jaxlib 0.10.2) otherwise computes each of them, dropout mask included,
    inside the scatter, and did not finish compiling two of these, of source and target, in ten minutes.
    """
    table, ids, felt = kept
    rows, flat = jnp.where(felt, ids, len(table)).reshape(-1), gradient.reshape(-1, gradient.shape[-1])

    def add(rows, flat, is_sorted=False):
        return jnp.zeros(table.shape, flat.dtype).at[rows].add(flat, mode="drop", indices_are_sorted=is_sorted)

    def add_sorted(rows, flat):
        order = jnp.argsort(rows, stable=True)
        return add(rows[order], flat[order], is_sorted=True)

    return jax.lax.platform_dependent(rows, flat, cpu=add_sorted, default=add).astype(table.dtype), None, None


embed.defvjp(lambda table, ids, felt: (jnp.take(table, ids, axis=0), (table, ids, felt)), _gradient_of_table)


def shift_right(labels: Array, start: int, padding: int) -> Array:
    """What the decoder reads to predict labels (batch, length): the start token, then all labels but the last.

    Ignored labels become padding.
    """
    shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return jnp.where(shifted == IGNORED, padding, shifted)


def padding_bias(mask: Array) -> Array:
    """What masks padding in scores: float32 (batch, 1, 1, length) from a mask (batch, length)."""
    return jnp.where(mask[:, None, None, :] != 0, 0.0, _MASKED)


def causal_bias(length: int) -> Array:
    """What masks the tokens to come: float32 (1, 1, length, length)."""
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, _MASKED)[None, None]


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be kept.

    Attributes:
      names: of the projections to queries, keys, values and output.
      heads: their number.
      width: units of a head.
      features: units of the output.
      deviations: of the kernels' normal distributions, in the order of the names.
      use_bias: whether the projections have biases.
      scale: what the scores are multiplied by.
      dropout: the rate on the weights.
      dtype: the dtype of computation.
    """

    names: tuple[str, str, str, str]
    heads: int
    width: int
    features: int
    deviations: tuple[float, float, float, float]
    use_bias: bool
    scale: float
    dropout: float
    dtype: DTypeLike

    def setup(self):
        sizes = (*(self.heads * self.width,) * 3, self.features)
        for name, size, deviation in zip(self.names, sizes, self.deviations, strict=True):
            init = nn.initializers.normal(deviation)
            setattr(self, name, nn.Dense(size, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init))
        self.drop = nn.Dropout(self.dropout)

    def keys_values(self, hidden: Array) -> KeysValues:
        """The keys and values of tokens (batch, length, hidden)."""
        key, value = (self._project(name, hidden).swapaxes(1, 2) for name in self.names[1:3])
        return key, value

    def __call__(self, hidden: Array, kept: KeysValues, biases: tuple[Array, ...], *, deterministic: bool) -> Array:
        """Attends from tokens to others.

        Args:
          hidden: the tokens that attend, (batch, queries, hidden).
          kept: the keys and values of those attended to.
          biases: added to the scores (batch, heads, queries, length), float32.
          deterministic: no dropout.

        Returns:
          (batch, queries, features)
        """
        key, value = kept
        query = self._project(self.names[0], hidden) * self.scale
        scores = jnp.einsum("bqhd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(sum(biases, scores)).astype(self.dtype)
        weights = self.drop(weights, deterministic=deterministic)
        return self._output(jnp.einsum("bhqk,bhkd->bqhd", weights, value))

    def step(
        self, hidden: Array, kept: KeysValues, position: Array, chosen: Chosen, bias: Array | None
    ) -> tuple[Array, KeysValues]:
        """Attends from one new token of each beam to that beam's tokens so far.

        Args:
          hidden: (batch, beams, hidden).
          kept: (batch, heads, beams, length, width) each, from earlier steps.
          position: the place of the new tokens, ().
          chosen: see `Chosen`.
          bias: added to the scores, (heads, length).

        Returns:
          (batch, beams, features), and what is kept from now on.
        """
        query = self._project(self.names[0], hidden) * self.scale
        place = (0, 0, 0, position, 0)
        new = (x[:, :, :, None] for x in self.keys_values(hidden))
        key, value = (jax.lax.dynamic_update_slice(old, x, place) for old, x in zip(kept, new, strict=True))
        scores = jnp.einsum("bqhd,bhjtd->bhqjt", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            scores += bias[None, :, None, None]
        scores = jnp.where(chosen[:, None], scores, _MASKED)
        weights = jax.nn.softmax(scores, axis=(-2, -1)).astype(self.dtype)
        return self._output(jnp.einsum("bhqjt,bhjtd->bqhd", weights, value)), (key, value)

    def _project(self, name: str, hidden: Array) -> Array:
        return getattr(self, name)(hidden).reshape(*hidden.shape[:-1], self.heads, self.width)

    def _output(self, attended: Array) -> Array:
        return getattr(self, self.names[3])(attended.reshape(*attended.shape[:2], self.heads * self.width))


class LayerStack(nn.Module):
    """The layers of an encoder or decoder, each with a subtree "0", "1", ..., or one with a leading axis of layers.

    A layer's dropout key is folded from the layer's number, so both layouts draw the same.

    Attributes:
      make_layer: makes a layer, a module ``layer(hidden, *constants, deterministic=...)``.
      count: how many layers there are.
      form: how they are held and run.
      dtype: the dtype of computation.
    """

    make_layer: Callable[..., nn.Module]
    count: int
    form: Form
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, constants: tuple[Any, ...], *, deterministic: bool) -> Array:
        """What comes out of the last layer; every layer also gets the constants."""
        if self.is_initializing():
            self._initialize(hidden, constants)
        keys = None
        if not deterministic and self.has_rng("dropout"):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), jnp.arange(self.count))
        run = self._stacked if self.form.layers == STACKED else self._separate
        return run(hidden, constants, keys, deterministic)

    def of_layers(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        """What a method of every layer gives for some arguments; the layers must be separate."""
        return tuple(self.of_layer(number, method, *arguments) for number in range(self.count))

    def of_layer(self, number: int, method: str, *arguments: Any) -> Any:
        """What a method of one layer gives; the layers must be separate."""
        return self.make_layer(parent=None).apply(self._own(number), *arguments, method=method)

    def _own(self, number):
        return {name: tree.get(str(number), {}) for name, tree in self.variables.items()}

    def _layer(self, hidden, constants, variables, key, deterministic, in_loop=False):
        def apply(variables, key, hidden, constants):
            rngs = None if key is None else {"dropout": key}
            layer = self.make_layer(parent=None)
            return layer.apply(variables, hidden, *constants, deterministic=deterministic, rngs=rngs)

        if self.form.gradient_checkpointing:
            apply = jax.checkpoint(apply, prevent_cse=self.form.layers == SEPARATE)
        elif in_loop:  # what XLA would choose outside of a loop; see `pats_jax.models.layers`
            apply = jax.checkpoint(apply, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        return apply(variables, key, hidden, constants)

    def _separate(self, hidden, constants, keys, deterministic):
        def run(hidden, constants, variables, key):
            return self._layer(hidden, constants, variables, key, deterministic)

        run = traced_once(run, hidden)
        for number in range(self.count):
            hidden = run(hidden, constants, self._own(number), None if keys is None else keys[number])
        return hidden

    def _stacked(self, hidden, constants, keys, deterministic):
        # Matrices are cast for all layers at once, so what the backward pass reads again is not kept a second time.
        stack = jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 2 else x, dict(self.variables))
        unroll = self.form.unroll or self.count

        def body(hidden, layer):
            variables, key = layer
            return self._layer(hidden, constants, variables, key, deterministic, unroll < self.count), None

        return jax.lax.scan(body, hidden, (stack, keys), unroll=unroll)[0]

    def _initialize(self, hidden, constants):
        layer, key = self.make_layer(parent=None), self.make_rng("params")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.count))

        def draw(key, hidden, constants):
            return layer.init(key, hidden, *constants, deterministic=True)["params"]

        draw = traced_once(draw, hidden)
        drawn = [draw(key, hidden, constants) for key in keys]
        trees = {str(number): tree for number, tree in enumerate(drawn)}
        if self.form.layers == STACKED:
            trees = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
        for name, tree in trees.items():
            self.put_variable("params", name, tree)


class EncoderDecoder(nn.Module):
    """An encoder-decoder that gives the logits of every word at every place of a target.

    `T5` and `Bart` are the two.

    Attributes:
      config: sizes and rates.
      dtype: the dtype of computation, float32 or bfloat16; parameters are float32 always.
      gradient_checkpointing: keep only what goes from layer to layer for the backward pass, and compute the rest
        again: less memory, about a third more work. Logits and gradients are the same but for rounding.
      layers: ``"separate"`` or ``"stacked"``, see `pats_jax.models.SequenceClassifier`; for both stacks.
      unroll: layers in one iteration of the loop over stacked layers; 0: all of them, without a loop.
    """

    config: Seq2SeqConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False
    layers: str = SEPARATE
    unroll: int = 1

    def __post_init__(self):
        if self.layers not in LAYOUTS:
            raise ValueError(f"layers={self.layers!r} is not one of {', '.join(map(repr, LAYOUTS))}")
        if self.unroll < 0:
            raise ValueError(f"unroll={self.unroll} must be at least 0")
        if jnp.dtype(self.dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"dtype={jnp.dtype(self.dtype).name} is not float32 or bfloat16; float16 overflows in T5")
        super().__post_init__()

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        decoder_input_ids: ArrayLike | None = None,
        decoder_attention_mask: ArrayLike | None = None,
        *,
        labels: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Computes float32 logits, (batch, target length, vocab_size).

        Args:
          input_ids: the source's tokens, (batch, source length).
          attention_mask: 1 for tokens and 0 for padding, like input_ids; all tokens if absent.
          decoder_input_ids: what the decoder reads, (batch, target length).
          decoder_attention_mask: like decoder_input_ids; all tokens if absent, as in Transformers: padding after the
            last token is not seen anyway.
          labels: what the decoder is to predict, (batch, target length), -100 where nothing is: in the place of
            decoder_input_ids, which are then the labels, shifted to the right by one.
          deterministic: no dropout. Otherwise ``apply`` needs ``rngs={"dropout": key}``.

        Raises:
          ValueError: if none or both of labels and decoder_input_ids are given, or a sequence is longer than the model
            has positions.
        """
        if (labels is None) == (decoder_input_ids is None):
            raise ValueError("pass exactly one of labels and decoder_input_ids")
        source, mask = _with_mask(input_ids, attention_mask)
        if labels is not None:
            labels = jnp.asarray(labels)
            target = shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)
            # no label comes after these, so nothing they do is felt
            felt = jnp.flip(jnp.cumsum(jnp.flip(labels != IGNORED, axis=1), axis=1), axis=1) > 0
        else:
            target = jnp.asarray(decoder_input_ids)
            felt = jnp.ones(target.shape, bool)
        self._check_length(target.shape[1])
        states = self.encode(source, mask, deterministic=deterministic)
        masks = (None if decoder_attention_mask is None else jnp.asarray(decoder_attention_mask), mask)
        return self.logits(self.decode(target, felt, states, masks, deterministic))

    def encode(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, deterministic: bool = True):
        """The encoder's states, (batch, source length, hidden)."""
        source, mask = _with_mask(input_ids, attention_mask)
        self._check_length(source.shape[1])
        return self.encoded(source, mask, deterministic)

    def start_cache(self, states: Array, beams: int, length: int) -> Cache:
        """What decoding starts from, for targets of at most ``length`` tokens; the layers must be separate."""
        config = self.config
        shape = (states.shape[0], config.heads_of["decoder"], beams, length, config.head_width)
        empty = jnp.zeros(shape, self.dtype)
        return Cache(((empty, empty),) * config.num_layers_of["decoder"], self.stack.of_layers("cross", states))

    def step(
        self, tokens: Array, position: Array, cache: Cache, chosen: Chosen, attention_mask: Array
    ) -> tuple[Array, Cache]:
        """The logits of what follows one new token of each beam; the layers must be separate.

        Args:
          tokens: (batch, beams).
          position: their place, (): 0 for the start token.
          cache: from `start_cache` or the step before.
          chosen: see `Chosen`.
          attention_mask: the source's, (batch, source length).

        Returns:
          float32 (batch, beams, vocab_size), and the cache.
        """
        hidden, bias = self.started(tokens, position, cache.own[0][0].shape[3])
        masked, own = padding_bias(attention_mask), []
        for number, (kept, cross) in enumerate(zip(cache.own, cache.cross, strict=True)):
            hidden, kept = self.stack.of_layer(number, "step", hidden, kept, cross, position, chosen, bias, masked)
            own.append(kept)
        return self.logits(self.ended(hidden)), Cache(tuple(own), cache.cross)

    def _check_length(self, length: int) -> None:
        longest = self.config.max_length
        if longest is not None and length > longest:
            raise ValueError(f"sequences have {length} tokens, but the model has {longest} positions")

    # what a model defines

    @property
    def stack(self) -> LayerStack:
        """The decoder's layers."""
        raise NotImplementedError

    def encoded(self, source: Array, mask: Array, deterministic: bool) -> Array:
        """As `encode`, of arrays."""
        raise NotImplementedError

    def decode(
        self, target: Array, felt: Array, states: Array, masks: tuple[Array | None, Array], deterministic: bool
    ) -> Array:
        """The decoder's states, (batch, target length, hidden), from its input, where that is felt, and masks."""
        raise NotImplementedError

    def started(self, tokens: Array, position: Array, length: int) -> tuple[Array, Array | None]:
        """What goes into the first layer, (batch, beams, hidden), and what biases scores, (heads, length)."""
        raise NotImplementedError

    def ended(self, hidden: Array) -> Array:
        """What the states of the last layer become before the head."""
        raise NotImplementedError

    def logits(self, hidden: Array) -> Array:
        """float32 (..., vocab_size) from states (..., hidden)."""
        raise NotImplementedError


def _with_mask(input_ids: ArrayLike, attention_mask: ArrayLike | None) -> tuple[Array, Array]:
    ids = jnp.asarray(input_ids)
    return ids, jnp.ones(ids.shape, jnp.int32) if attention_mask is None else jnp.asarray(attention_mask)
