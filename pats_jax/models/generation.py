"""Generating texts with T5 and BART: greedy search and beam search, each one program for the device.

The rules are those of Transformers 5: the same tokens come out but for ties and rounding. The loop is
`jax.lax.while_loop`, and the cache has its full length from the start: there is one program for each shape of a batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from pats_jax.errors import InputError
from pats_jax.models.convert import Parameters
from pats_jax.models.encoder_decoder import Cache, EncoderDecoder
from pats_jax.models.generation_config import GenerationConfig
from pats_jax.models.layers import SEPARATE, STACKED
from pats_jax.models.layout import unstack_layers

_NEVER = -1e9  # the score of what is not to be chosen, as in Transformers


class Generated(NamedTuple):
    """Generated texts.

    Attributes:
      sequences: int32 (batch, num_return_sequences, longest): each from the start token on, then filled up.
      scores: float32 (batch, num_return_sequences): sums of log-probabilities over lengths, see
        `GenerationConfig.length_penalty`. Of greedy search 0.
      length: (), the tokens of the longest sequence, to which Transformers cuts them all.
    """

    sequences: Array
    scores: Array
    length: Array


def make_generate_step(
    model: EncoderDecoder, settings: GenerationConfig
) -> Callable[[Parameters, dict[str, Any]], Generated]:
    """A pure function that generates texts; wrap it in ``jax.jit``.

    Args:
      model: a T5 or BART with either layout of layers. With stacked ones, the decoder's are taken apart first.
      settings: how.

    Returns:
      ``generate(params, batch)``: batch a dict of ``input_ids`` (batch, source length) and, where some of it is
      padding, ``attention_mask``; other entries are not read. Under jit with a batch sharded over a mesh, so is the
      search.

    Raises:
      InputError: if the settings do not fit the model.
    """
    _check(model, settings)

    def generate(params, batch):
        ids = jnp.asarray(batch["input_ids"])
        mask = jnp.asarray(batch["attention_mask"]) if "attention_mask" in batch else jnp.ones(ids.shape, jnp.int32)
        states: Any = model.apply({"params": params}, ids, mask, method="encode")
        decoder = _Decoder(model, params, mask, settings)
        search = _greedy if settings.num_beams == 1 else _beam_search
        return search(decoder, decoder.start(states), settings)

    return generate


def generate(
    model: EncoderDecoder,
    params: Parameters,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    settings: GenerationConfig,
) -> np.ndarray:
    """Generates texts; a program is compiled for each model, settings and shape.

    Args:
      model: a T5 or BART.
      params: its parameters.
      input_ids: the sources' tokens, (batch, source length).
      attention_mask: 1 for tokens and 0 for padding, like input_ids; all tokens if absent.
      settings: how, such as `GenerationConfig.from_pretrained` gives them.

    Returns:
      int32 (batch * num_return_sequences, length): what ``generate`` of Transformers returns.

    Raises:
      InputError: if the settings do not fit the model.
    """
    batch = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    found = jax.device_get(_generate(model, settings, params, jax.tree.map(jnp.asarray, batch)))
    return found.sequences.reshape(-1, found.sequences.shape[-1])[:, : int(found.length)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model, settings, params, batch):
    return make_generate_step(model, settings)(params, batch)


def _check(model: EncoderDecoder, settings: GenerationConfig) -> None:
    positions, words = model.config.max_length, model.config.vocab_size
    longest = settings.longest(positions)
    if positions is not None and longest - 1 > positions:
        raise InputError(f"an output of {longest} tokens needs {longest - 1} positions, but the model has {positions}")
    tokens = {
        "decoder_start_token_id": settings.start,
        "forced_bos_token_id": settings.forced_bos_token_id,
        "forced_eos_token_id": settings.forced_eos_token_id,
    }
    for name, token in tokens.items():
        if token is not None and token >= words:
            raise InputError(f"{name} {token} is not a token of the model, which has {words}")


class _Decoder:
    """A model's decoder for one batch: what follows, and what the settings make of it."""

    def __init__(self, model: EncoderDecoder, params: Parameters, mask: Array, settings: GenerationConfig):
        if model.layers == STACKED:
            params, model = unstack_layers(params, model.config.num_layers_of), model.clone(layers=SEPARATE)
        self._params = jax.tree_util.tree_map_with_path(functools.partial(_cast, model.dtype), params)
        self._model, self._mask, self._settings = model, mask, settings
        self.longest = settings.longest(model.config.max_length)
        self.words = model.config.vocab_size

    def start(self, states: Array) -> Cache:
        """The cache before the first token."""
        beams, length = self._settings.num_beams, self.longest - 1
        return self._apply("start_cache", states, beams, length)

    def step(self, sequences: Array, length: Array, cache: Cache, slots: Array) -> tuple[Array, Cache]:
        """The logits of what follows sequences (batch, beams, longest) of a length, and the cache."""
        tokens = jax.lax.dynamic_index_in_dim(sequences, length - 1, axis=2, keepdims=False)
        places = jnp.arange(slots.shape[-1]) < length
        chosen = (slots[:, :, None] == jnp.arange(slots.shape[1])[:, None]) & places
        return self._apply("step", tokens, length - 1, cache, chosen, self._mask)

    def _apply(self, method: str, *arguments: Any) -> Any:
        return self._model.apply({"params": self._params}, *arguments, method=method)

    def processed(self, sequences: Array, length: Array, scores: Array) -> Array:
        """The scores (batch, beams, words) with -inf for what the settings forbid after sequences of a length."""
        settings = self._settings
        if settings.no_repeat_ngram_size:
            banned = _repeating(sequences, length, settings.no_repeat_ngram_size, self.words)
            scores = jnp.where(banned, -jnp.inf, scores)
        if settings.shortest and settings.eos_token_id:
            ends = jnp.zeros(self.words, bool).at[jnp.array(settings.eos_token_id)].set(True)
            scores = jnp.where(ends & (length < settings.shortest), -jnp.inf, scores)
        for token, when in ((settings.forced_bos_token_id, 1), (settings.forced_eos_token_id, self.longest - 1)):
            if token is not None:
                forced = jnp.where(jnp.arange(self.words) == token, 0.0, -jnp.inf)
                scores = jnp.where(length == when, forced, scores)
        return scores

    def ends(self, tokens: Array) -> Array:
        """Which tokens end a text."""
        return jnp.isin(tokens, jnp.array(self._settings.eos_token_id, jnp.int32))


def _cast(dtype: Any, path: tuple, value: Array) -> Array:
    """A matrix in the dtype of computation, so that no step casts it anew."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return value.astype(dtype) if name.endswith(("kernel", "shared.embedding")) else value


def _repeating(sequences: Array, length: Array, size: int, words: int) -> Array:
    """Which words (batch, beams, words) would end an n-gram that is in a sequence of a length already."""
    count = sequences.shape[-1] - size + 1
    if count < 1:
        return jnp.zeros((*sequences.shape[:2], words), bool)
    last = jax.lax.dynamic_slice_in_dim(sequences, jnp.maximum(length - size + 1, 0), size - 1, axis=2)
    same = jnp.arange(count) + size <= length
    for place in range(size - 1):
        same &= sequences[:, :, place : place + count] == last[:, :, place, None]
    ending = jnp.where(same, sequences[:, :, size - 1 :], words)  # beyond the last word: dropped
    rows, beams = jnp.ogrid[: sequences.shape[0], : sequences.shape[1]]
    return jnp.zeros((*sequences.shape[:2], words), bool).at[rows[..., None], beams[..., None], ending].set(True)


class _Greedy(NamedTuple):
    """Greedy search.

    Attributes:
      length: (), of the sequences so far.
      sequences: int32 (batch, 1, longest).
      is_finished: bool (batch,).
      cache: the decoder's.
    """

    length: Array
    sequences: Array
    is_finished: Array
    cache: Cache


def _greedy(decoder: _Decoder, cache: Cache, settings: GenerationConfig) -> Generated:
    padding = settings.pad_token_id if settings.pad_token_id is not None else (*settings.eos_token_id, 0)[0]
    batch = cache.own[0][0].shape[0]
    slots = jnp.zeros((batch, 1, decoder.longest - 1), jnp.int32)

    def goes_on(state):
        return (state.length < decoder.longest) & ~jnp.all(state.is_finished)

    def step(state):
        logits, cache = decoder.step(state.sequences, state.length, state.cache, slots)
        tokens = jnp.argmax(decoder.processed(state.sequences, state.length, logits)[:, 0], axis=-1)
        tokens = jnp.where(state.is_finished, padding, tokens).astype(jnp.int32)
        sequences = jax.lax.dynamic_update_index_in_dim(state.sequences, tokens[:, None], state.length, axis=2)
        return _Greedy(state.length + 1, sequences, state.is_finished | decoder.ends(tokens), cache)

    sequences = _empty(batch, 1, decoder.longest, padding, settings.start)
    found = jax.lax.while_loop(goes_on, step, _Greedy(jnp.int32(1), sequences, jnp.zeros(batch, bool), cache))
    return Generated(found.sequences, jnp.zeros((batch, 1)), found.length)


class _Beams(NamedTuple):
    """Beam search.

    Attributes:
      length: (), of the running sequences.
      running: int32 (batch, beams, longest).
      scores: float32 (batch, beams), their sums of log-probabilities, the highest first.
      slots: int32 (batch, beams, longest - 1): for each token of a running sequence, the beam that wrote its keys
        and values to the cache.
      finished: int32 (batch, beams, longest): the candidates.
      finished_scores: float32 (batch, beams), the highest first.
      finished_lengths: int32 (batch, beams), tokens after the start token.
      is_finished: bool (batch, beams): whether there is a candidate.
      is_open: bool (batch,): whether a running sequence may still become one of the candidates.
      all_ended: bool (), whether all continuations of the last step ended.
      cache: the decoder's.
    """

    length: Array
    running: Array
    scores: Array
    slots: Array
    finished: Array
    finished_scores: Array
    finished_lengths: Array
    is_finished: Array
    is_open: Array
    all_ended: Array
    cache: Cache


class _Continuations(NamedTuple):
    """The best continuations of a step, the best first.

    Attributes:
      sequences: int32 (batch, continuations, longest).
      scores: float32 (batch, continuations), sums of log-probabilities.
      parents: int32 (batch, continuations), the beams that they continue.
      ended: bool (batch, continuations).
    """

    sequences: Array
    scores: Array
    parents: Array
    ended: Array


def _beam_search(decoder: _Decoder, cache: Cache, settings: GenerationConfig) -> Generated:
    beams, longest = settings.num_beams, decoder.longest
    # Candidates are divided by a power of their length: taken from a table, rounded once from float64.
    penalties = jnp.array(np.arange(1, longest + 1, dtype=np.float64) ** settings.length_penalty, jnp.float32)

    def goes_on(state):
        is_open = jnp.any(state.is_open) & ~state.all_ended
        return is_open & ~jnp.all(state.is_finished) if settings.early_stopping is True else is_open

    def step(state):
        logits, cache = decoder.step(state.running, state.length, state.cache, state.slots)
        log_probs = decoder.processed(state.running, state.length, jax.nn.log_softmax(logits))
        best = _continue(decoder, state, log_probs, max(2, 1 + len(settings.eos_token_id)) * beams)
        penalty = penalties[state.length - 1]
        finished = _finish(state, best, penalty, early=settings.early_stopping is True)
        scores, kept = jax.lax.top_k(best.scores + best.ended * _NEVER, beams)
        parents = _take(best.parents, kept)
        reached = penalties[longest - 2] if _hopes(settings) else penalty
        worst = jnp.where(finished.is_finished, finished.finished_scores.min(axis=1, keepdims=True), _NEVER)
        return finished._replace(
            length=state.length + 1,
            running=_take(best.sequences, kept),
            scores=scores,
            slots=_written(_take(state.slots, parents), state.length),
            is_open=state.is_open & jnp.any(scores[:, :1] / reached > worst, axis=1),
            all_ended=jnp.all(best.ended),
            cache=cache,
        )

    state = _start_beams(decoder, cache, settings)
    found = jax.lax.while_loop(goes_on, step, state)
    count = settings.num_return_sequences
    length = 1 + found.finished_lengths[:, :count].max()
    return Generated(found.finished[:, :count], found.finished_scores[:, :count], length)


def _hopes(settings: GenerationConfig) -> bool:
    """Whether a running sequence is judged by the longest length, at which it may score best."""
    return settings.early_stopping == "never" and settings.length_penalty > 0


def _start_beams(decoder: _Decoder, cache: Cache, settings: GenerationConfig) -> _Beams:
    beams, longest, batch = settings.num_beams, decoder.longest, cache.own[0][0].shape[0]
    ends = settings.eos_token_id
    filler = (settings.pad_token_id or ends[0]) if ends else -1  # Transformers takes padding of 0 for none
    sequences = _empty(batch, beams, longest, filler, settings.start)
    only_first = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)  # all beams are the same yet
    return _Beams(
        length=jnp.int32(1),
        running=sequences,
        scores=jnp.broadcast_to(only_first, (batch, beams)),
        slots=jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[:, None], (batch, beams, longest - 1)),
        finished=sequences,
        finished_scores=jnp.full((batch, beams), _NEVER),
        finished_lengths=jnp.zeros((batch, beams), jnp.int32),
        is_finished=jnp.zeros((batch, beams), bool),
        is_open=jnp.ones(batch, bool),
        all_ended=jnp.asarray(False),
        cache=cache,
    )


def _continue(decoder: _Decoder, state: _Beams, log_probs: Array, count: int) -> _Continuations:
    """The best continuations of the running sequences by log-probabilities (batch, beams, words) of the next."""
    batch, beams, words = log_probs.shape
    sums = (state.scores[:, :, None] + log_probs).reshape(batch, beams * words)
    scores, places = jax.lax.top_k(sums, count)
    parents, tokens = places // words, (places % words).astype(jnp.int32)
    sequences = _take(state.running, parents)
    sequences = jax.lax.dynamic_update_index_in_dim(sequences, tokens, state.length, axis=2)
    return _Continuations(sequences, scores, parents, decoder.ends(tokens) | (state.length + 1 >= decoder.longest))


def _finish(state: _Beams, best: _Continuations, penalty: Array, *, early: bool) -> _Beams:
    """The state with the candidates that a step has brought: those that ended among the first ``num_beams``."""
    beams = state.scores.shape[1]
    just_ended = best.ended & (jnp.arange(best.ended.shape[1]) < beams)
    scores = best.scores / penalty
    if early:
        scores += jnp.all(state.is_finished, axis=1, keepdims=True) * _NEVER
    scores += ~state.is_open[:, None] * _NEVER
    scores += ~just_ended * _NEVER
    merged = jnp.concatenate([state.finished_scores, scores], axis=1)
    finished_scores, kept = jax.lax.top_k(merged, beams)

    def merge(old, new):
        return _take(jnp.concatenate([old, new], axis=1), kept)

    return state._replace(
        finished=merge(state.finished, best.sequences),
        finished_scores=finished_scores,
        finished_lengths=merge(state.finished_lengths, jnp.full_like(best.parents, state.length)),
        is_finished=merge(state.is_finished, just_ended),
    )


def _written(slots: Array, place: Array) -> Array:
    """Slots (batch, beams, length) after each beam has the next token's place to itself."""
    own = jnp.arange(slots.shape[1], dtype=slots.dtype)[:, None]
    return jnp.where(jnp.arange(slots.shape[2]) == place, own, slots)


def _take(values: Array, chosen: Array) -> Array:
    """Values (batch, beams, ...) of the beams (batch, count) chosen."""
    return jnp.take_along_axis(values, chosen.reshape(*chosen.shape, *[1] * (values.ndim - 2)), axis=1)


def _empty(batch: int, beams: int, longest: int, filler: int, start: int) -> Array:
    return jnp.full((batch, beams, longest), filler, jnp.int32).at[:, :, 0].set(start)
