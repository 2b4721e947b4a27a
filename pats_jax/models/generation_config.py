"""Settings of generation, as ``generation_config.json`` holds them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pats_jax.core.files import JsonObject, read_json
from pats_jax.errors import InputError, shown
from pats_jax.models.config import is_number, is_whole, read_config
from pats_jax.models.seq2seq_config import Seq2SeqConfig, config_from_dict
from pats_jax.models.sources import checkpoint_folder

GENERATION_FILE = "generation_config.json"

# Fields of the file that change nothing here: they are about other things, or about sampling, which is refused.
_WITHOUT_EFFECT = {
    "_from_model_config",
    "_commit_hash",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "epsilon_cutoff",
    "eta_cutoff",
    "is_assistant",
    "is_encoder_decoder",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "min_p",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "target_lookbehind",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
}
# Those with an effect that we do not have, with the values that have none; null has none in any field.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "diversity_penalty": (0,),
    "do_sample": (False,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "speculation_type": (),
    "stop_strings": (),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "use_mtp": (False,),
    "watermarking_config": (),
}
_DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class GenerationConfig:
    """How texts are generated, by the rules and with the names of Transformers 5.

    Attributes:
      max_length: the longest output in tokens, including the start token.
      max_new_tokens: the same without it; takes precedence. With neither of the two, 20.
      min_length: no end before so many tokens, including the start token.
      min_new_tokens: the same without it; takes precedence.
      num_beams: 1 is greedy search, more is beam search.
      early_stopping: when a beam search ends for a text: True, as soon as there are ``num_beams`` candidates; False,
        when the best running beam scores below the worst candidate for its present length; ``"never"``, when it
        could not reach it at any length.
      length_penalty: a candidate's score is the sum of its log-probabilities over its length to this power.
      no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0: any may.
      forced_bos_token_id: the first token after the start token.
      forced_eos_token_id: the last token at the longest length.
      num_return_sequences: how many of the beams' candidates to return, the best first.
      decoder_start_token_id: what the decoder reads first; if absent ``bos_token_id``.
      bos_token_id: see there.
      eos_token_id: each of these ends a text; none if empty.
      pad_token_id: what follows the end; if absent the first of ``eos_token_id``.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    num_beams: int = 1
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    num_return_sequences: int = 1
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name, least in (("max_length", 2), ("max_new_tokens", 1), ("num_beams", 1), ("num_return_sequences", 1)):
            self._check_whole(name, least)
        for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size"):
            self._check_whole(name, 0)
        for name in ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "bos_token_id"):
            self._check_whole(name, 0)
        self._check_whole("pad_token_id", 0)
        if not isinstance(self.eos_token_id, tuple) or not all(is_whole(t) and t >= 0 for t in self.eos_token_id):
            raise InputError(f"eos_token_id must be a tuple of tokens, got {shown(self.eos_token_id)}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(f"early_stopping must be true, false or 'never', got {shown(self.early_stopping)}")
        if not is_number(self.length_penalty):
            raise InputError(f"length_penalty must be a number, got {shown(self.length_penalty)}")
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences {self.num_return_sequences} exceeds num_beams {self.num_beams}; lower it"
            )
        longest = self.longest(None)
        if self.shortest > longest:
            raise InputError(
                f"at least {self.shortest} tokens (min_length or min_new_tokens) are more than the longest output has, "
                f"{longest} (max_length or max_new_tokens)"
            )

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        optional = getattr(type(self), name) is None
        if not (optional and value is None) and not (is_whole(value) and value >= least):
            raise InputError(f"{name} must be a whole number, at least {least}, got {shown(value)}")

    @property
    def start(self) -> int:
        """What the decoder reads first.

        Raises:
          InputError: if nothing says it.
        """
        start = self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id
        if start is None:
            raise InputError(f"{GENERATION_FILE}: needs decoder_start_token_id or bos_token_id")
        return start

    @property
    def shortest(self) -> int:
        """The shortest output in tokens, including the start token."""
        return self.min_length if self.min_new_tokens is None else self.min_new_tokens + 1

    def longest(self, positions: int | None) -> int:
        """The longest output in tokens, including the start token, of a model with so many positions."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens + 1
        if self.max_length is not None:
            return self.max_length
        longest = _DEFAULT_NEW_TOKENS + 1
        return longest if positions is None else min(longest, positions)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = GENERATION_FILE) -> Self:
        """Reads the content of a ``generation_config.json``.

        Args:
          values: the parsed JSON object.
          source: what to call it in error messages.

        Raises:
          InputError: if an option that we do not have, or a value of a wrong type or out of range.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        own = {name: value for name, value in values.items() if name in names and value is not None}
        for name in sorted(values.keys() - names - _WITHOUT_EFFECT):
            if values[name] is not None and not any(values[name] == plain for plain in _NOT_SUPPORTED.get(name, ())):
                raise InputError(f"{source}: {shown(name, quoted=False)} {shown(values[name])} is not supported")
        for name in ("eos_token_id", "forced_eos_token_id"):
            if isinstance(own.get(name), list):
                own[name] = tuple(own[name])
        if is_whole(own.get("eos_token_id")):
            own["eos_token_id"] = (own["eos_token_id"],)
        if isinstance(own.get("forced_eos_token_id"), tuple) and len(own["forced_eos_token_id"]) == 1:
            own["forced_eos_token_id"] = own["forced_eos_token_id"][0]
        try:
            return cls(**own)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_config(cls, config: Seq2SeqConfig, source: str = "config.json") -> Self:
        """The settings that the checkpoint's ``config.json`` alone implies, as that of early checkpoints does."""
        names = {entry.name for entry in dataclasses.fields(cls)} | _NOT_SUPPORTED.keys()
        values = {**config.generation_defaults}
        values |= {name: value for name, value in config.extra.items() if name in names}
        if values.get("forced_bos_token_id") is None and config.extra.get("force_bos_token_to_be_generated"):
            values["forced_bos_token_id"] = values.get("bos_token_id")
        eos = values.get("eos_token_id")
        return cls.from_dict({**values, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos}, source)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, *, revision: str | None = None) -> Self:
        """Reads a checkpoint's ``generation_config.json``; without one, what its ``config.json`` implies.

        Args:
          name_or_dir: as for `pats_jax.models.from_pretrained_seq2seq`.
          revision: the branch, tag or commit of a hub repository.

        Raises:
          InputError: as from `from_dict`, or the checkpoint cannot be found or read.
        """
        folder = checkpoint_folder(name_or_dir, revision=revision, check_weights=False)
        path = folder / GENERATION_FILE
        if not path.exists():
            values, source = read_config(folder)
            return cls.from_config(config_from_dict(values, source), source)
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path}: not a JSON object")
        return cls.from_dict(values, str(path))

    def to_dict(self) -> JsonObject:
        """The content of a ``generation_config.json``; what is absent is left out."""
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        eos = self.eos_token_id
        own["eos_token_id"] = (eos[0] if len(eos) == 1 else list(eos)) if eos else None
        return {name: value for name, value in own.items() if value is not None}
