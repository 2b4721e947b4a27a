"""Pretrains a T5 of about ten million parameters by span corruption, to try methods on where no checkpoint is at hand.

::

    python -m benchmarks.pretrain_tiny_t5 --data_dir ../shared/data --output_dir tiny_t5

It learns a vocabulary of 8,192 tokens from the same texts (`benchmarks.pretraining_texts` says which), and writes a
folder for `pats_jax.models.from_pretrained_seq2seq` and Transformers, checkpoints, and the loss curve as JSON and as a
picture. ``--minutes`` stops earlier; the same command with ``--resume`` goes on, to the same bits on the same machine.
Two runs from the start differ a little: learning the vocabulary is not deterministic.

The model is T5 1.0: at this size the table of words is a fifth of all parameters, and 1.1 would have it twice. As in
1.1 there is no dropout in pretraining; the config has 0.1 for what follows. As in both, the optimizer is Adafactor with
steps relative to the size of a parameter, which suits T5's table of words, whose entries begin at a deviation of 1.

References:
  Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer
    (arXiv:1910.10683); Shazeer and Stern 2018, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    (arXiv:1804.04235).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import rich.console
import tyro

from benchmarks import pretraining, pretraining_texts
from benchmarks.pretraining import Pretraining
from benchmarks.span_corruption import PackedRows, corrupt, lengths_for
from pats_jax import models, random
from pats_jax.errors import InputError
from pats_jax.models import T5Config
from pats_jax.training import runners

HIDDEN_SHARE, MEAN_SPAN = 0.15, 3.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the numbers; a resumed run must have the same."""

    steps: int = 2000  # optimizer steps; the learning rate falls to 0 over them
    batch_size: int = 16  # rows of a step, over all devices
    source_length: int = 128  # tokens of a source; the target's length follows
    learning_rate: float = 0.02  # peak, relative to the size of a parameter
    warmup_steps: int = 100  # over which the learning rate rises
    vocab_size: int = 8192  # tokens, 100 sentinels among them
    d_model: int = 256  # width
    d_ff: int = 1024  # width of feed-forward blocks
    num_layers: int = 4  # of the encoder, and of the decoder
    num_heads: int = 8  # of attention
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation
    seed: int = 42  # of parameters, order and spans

    def check(self) -> None:
        """Raises InputError if a number makes no sense."""
        pretraining.check_schedule(self, ("d_model", "d_ff", "num_layers", "num_heads"))
        if self.d_model % self.num_heads:
            raise InputError(f"--d_model {self.d_model}: not a multiple of --num_heads {self.num_heads}")
        if self.vocab_size < 512:
            raise InputError(f"--vocab_size {self.vocab_size}: must be at least 512")

    def config(self, vocab_size: int) -> T5Config:
        """The model's config."""
        return T5Config(
            vocab_size=vocab_size,
            d_model=self.d_model,
            d_kv=self.d_model // self.num_heads,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_decoder_layers=self.num_layers,
            num_heads=self.num_heads,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """Adafactor; the learning rate rises linearly and falls as a cosine."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(pretraining.schedule(self)))


@dataclasses.dataclass(frozen=True)
class Flags(pretraining.RunFlags):
    """Pretrain a small T5 by span corruption."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)


def load_data(flags: Flags) -> tuple[Any, PackedRows, PackedRows, dict[str, int]]:
    """Reads the texts, and learns the vocabulary or reads that of the resumed run.

    Returns:
      Transformers' T5TokenizerFast, the rows to learn from, the held-out rows, and what the results say of the texts.
    """
    import transformers

    recipe = flags.recipe
    texts = [text for own in pretraining_texts.read_texts(flags.data_dir).values() for text in own]
    if flags.resume:
        tokenizer = transformers.T5TokenizerFast.from_pretrained(flags.output_dir)
    else:
        tokenizer = pretraining_texts.train_tokenizer(texts, recipe.vocab_size)
        flags.begin(recipe, tokenizer)
    train, held_out = pretraining.split_texts(texts, tokenizer, recipe.seed)
    lengths = lengths_for(recipe.source_length, HIDDEN_SHARE, MEAN_SPAN)
    numbers = {
        "first_sentinel": tokenizer.convert_tokens_to_ids("<extra_id_0>"),
        "end": tokenizer.eos_token_id,
    }
    pack = functools.partial(
        PackedRows,
        tokens=lengths.tokens,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        corrupt=functools.partial(corrupt, lengths=lengths, **numbers),
    )
    facts = {"texts": len(texts), "tokens": sum(map(len, (*train, *held_out))), "row_tokens": lengths.tokens}
    facts |= {"source_length": lengths.source, "target_length": lengths.target}
    return tokenizer, pack(train), pack(held_out), facts


def pretrain(flags: Flags, console: rich.console.Console) -> None:
    """Trains, and writes the folder."""
    recipe = flags.recipe
    flags.check(recipe)
    tokenizer, train, held_out, facts = load_data(flags)
    config, runner = recipe.config(len(tokenizer)), runners.make_runner()
    layers, unroll = runners.default_form(runner.platform)
    without_dropout = dataclasses.replace(config, dropout_rate=0.0)
    model = models.T5(without_dropout, dtype=jnp.dtype(recipe.dtype), layers=layers, unroll=unroll)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(random.fast_key(recipe.seed), ids, labels=ids)["params"]
    title = f"Span corruption, T5 with {config.num_layers} + {config.num_decoder_layers} layers of {config.d_model}"
    tx = recipe.optimizer()
    job = Pretraining(title, recipe, model, params, config, tx, tokenizer, train, held_out, facts)
    pretraining.carry_out(flags, job, runner, console)


def main(args: list[str] | None = None) -> None:
    """Runs the program; see `pretraining.main`."""
    pretraining.main(Flags, pretrain, args)


if __name__ == "__main__":
    main()
