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
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import tyro

from benchmarks import pretraining_texts, report
from benchmarks.span_corruption import PackedRows, lengths_for
from pats_jax import models, random, train_state
from pats_jax.core import files
from pats_jax.data.prefetch import prefetch
from pats_jax.errors import InputError, Preempted
from pats_jax.models import T5Config
from pats_jax.run import run_folder, xla_flags
from pats_jax.training import preemption, runners
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.loop import Hooks, Progress, Record, Rhythm, fit

HIDDEN_SHARE, MEAN_SPAN = 0.15, 3.0
ROOT = pathlib.Path(__file__).resolve().parent.parent
_RECIPE, _CURVE, _PICTURE = "recipe.json", "loss_curve.json", "loss_curve.png"


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
        for name in ("steps", "batch_size", "d_model", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.warmup_steps <= self.steps:
            raise InputError(f"--warmup_steps {self.warmup_steps}: must be at least 0 and at most --steps {self.steps}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning_rate {self.learning_rate}: must be greater than 0")
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
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup_steps, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(schedule))


@dataclasses.dataclass(frozen=True)
class Flags:
    """Pretrain a small T5 by span corruption."""

    data_dir: pathlib.Path  # folder of glue/, ood_nli/, text_classification/ and gym/
    output_dir: pathlib.Path  # folder for model, tokenizer, checkpoints and loss curve
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)
    minutes: float | None = None  # stop after so many, save, and write the model as it is; none: after all steps
    resume: bool = False  # go on from the last checkpoint in output_dir
    save_steps: int = 100  # steps between checkpoints
    eval_steps: int = 100  # steps between measurements on the held-out texts
    results: pathlib.Path | None = None  # another copy of the loss curve's JSON
    plot: pathlib.Path | None = None  # another copy of the picture

    def check(self) -> None:
        """Raises InputError if a flag has a wrong value, or output_dir does not fit the flags."""
        self.recipe.check()
        for name in ("save_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"--minutes {self.minutes}: must be greater than 0")
        path = self.output_dir / _RECIPE
        if not self.resume:
            if path.exists():
                raise InputError(f"{self.output_dir}: holds a run; add --resume, or name another --output_dir")
            return
        saved = files.read_record(path, Recipe)
        for field in dataclasses.fields(Recipe):
            ours, theirs = getattr(self.recipe, field.name), getattr(saved, field.name)
            if ours != theirs:
                raise InputError(f"--{field.name} {ours}: the run in {self.output_dir} has {theirs}")


class Deadline(preemption.Preemption):
    """Asks a run to stop at a time, or when a signal does."""

    def __init__(self, asked: preemption.Preemption, minutes: float | None):
        super().__init__()
        self._asked = asked
        self._end = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def arrived(self, step: int) -> bool:
        signalled = self._asked.arrived(step)
        self.signal_number = self._asked.signal_number
        return signalled or time.monotonic() >= self._end


class PretrainingHooks(Hooks):
    """Prints lines, measures the loss of held-out texts, saves checkpoints and the curve."""

    metric, evaluates = "loss", True

    def __init__(
        self,
        measure: Callable[[Any], float],
        checkpoints: Checkpoints,
        write_curve: Callable[[list[Record]], None],
        console: rich.console.Console,
    ):
        self._measure, self._checkpoints, self._write_curve = measure, checkpoints, write_curve
        self._console = console

    def on_record(self, record):
        if "eval" in record:
            self._console.print(f"step {record['step']}: held-out loss {record['eval']['loss']:.4f}")
        else:
            rate = record["timing"]["tokens_per_second"]
            self._console.print(f"step {record['step']}: loss {record['loss']:.4f}, {rate:.0f} tokens/s")
        self._checkpoints.check()

    def evaluate(self, state):
        return {"loss": self._measure(state.all_params)}

    def save(self, state, progress):
        self._checkpoints.save(progress.step, state, dataclasses.asdict(progress))
        self._write_curve(progress.records)


@dataclasses.dataclass(frozen=True)
class Data:
    """What the model learns from, and is measured on.

    Attributes:
      tokenizer: Transformers' T5TokenizerFast.
      train: the rows to learn from.
      held_out: those to measure the loss on.
      facts: what the results file says of the texts.
    """

    tokenizer: Any
    train: PackedRows
    held_out: PackedRows
    facts: dict[str, int]


def load_data(flags: Flags) -> Data:
    """Reads the texts, learns the vocabulary or reads that of the resumed run, and holds one text in fifty out."""
    import transformers

    recipe = flags.recipe
    texts = [text for own in pretraining_texts.read_texts(flags.data_dir).values() for text in own]
    order = np.random.default_rng(recipe.seed).permutation(len(texts))
    if flags.resume:
        tokenizer = transformers.T5TokenizerFast.from_pretrained(flags.output_dir)
    else:
        tokenizer = pretraining_texts.train_tokenizer(texts, recipe.vocab_size)
        tokenizer.save_pretrained(flags.output_dir)
        files.write_json(flags.output_dir / _RECIPE, dataclasses.asdict(recipe))
    tokens = [np.array(ids, np.int32) for ids in tokenizer(texts)["input_ids"]]
    held_out = [tokens[number] for number in order[: len(order) // 50]]
    train = [tokens[number] for number in order[len(order) // 50 :]]
    lengths = lengths_for(recipe.source_length, HIDDEN_SHARE, MEAN_SPAN)
    pack = functools.partial(
        PackedRows,
        lengths=lengths,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        first_sentinel=tokenizer.convert_tokens_to_ids("<extra_id_0>"),
        end=tokenizer.eos_token_id,
    )
    facts = {"texts": len(texts), "tokens": sum(map(len, tokens)), "row_tokens": lengths.tokens}
    facts |= {"source_length": lengths.source, "target_length": lengths.target}
    return Data(tokenizer, pack(train), pack(held_out), facts)


def make_measure(model: Any, held_out: PackedRows, runner: runners.MeshRunner) -> Callable[..., float]:
    """Makes ``measure(params)``: the mean loss of the held-out texts, at most eight batches, always hidden alike.

    With ``other_sources=True``, each target has the source of the row before it: what is lost tells how much the model
    reads out of a source.
    """
    loss_fn = train_state.make_seq2seq_loss_fn(model.apply, deterministic=True)
    compiled = jax.jit(lambda params, batch: loss_fn(params, batch, None)[0])
    count = min(held_out.steps_per_epoch, 8)
    batches = [batch for batch, _ in itertools.islice(held_out.batches(0), count)]

    def measure(params: Any, other_sources: bool = False) -> float:
        shift = 1 if other_sources else 0
        rolled = [batch | {"input_ids": np.roll(batch["input_ids"], shift, axis=0)} for batch in batches]
        return float(np.mean([compiled(params, runner.put(batch)) for batch in rolled]))

    return measure


def pretrain(flags: Flags, console: rich.console.Console) -> None:
    """Trains, and writes the folder."""
    flags.check()
    recipe, data, runner = flags.recipe, load_data(flags), runners.make_runner()
    config = recipe.config(len(data.tokenizer))
    layers, unroll = runners.default_form(runner.platform)
    without_dropout = dataclasses.replace(config, dropout_rate=0.0)
    model = models.T5(without_dropout, dtype=jnp.dtype(recipe.dtype), layers=layers, unroll=unroll)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(random.fast_key(recipe.seed), ids, labels=ids)["params"]
    facts = data.facts | {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    console.print(", ".join(f"{value} {name}" for name, value in facts.items()))

    tx = recipe.optimizer()
    create = functools.partial(train_state.TrainState.create, apply_fn=model.apply, tx=tx, key=recipe.seed)
    state = runner.create_state(create, params)
    loss_fn = train_state.make_seq2seq_loss_fn(model.apply, deterministic=True)
    step = runner.compile_step(train_state.make_train_step(loss_fn, skip_nonfinite=True, norms=False), state)
    rhythm = Rhythm(
        recipe.steps, 10, flags.eval_steps, save_steps=min(flags.save_steps, recipe.steps), max_nonfinite_steps=5
    )
    write_curve = functools.partial(write_results, flags, facts)
    with Checkpoints(flags.output_dir / "checkpoints", 2) as checkpoints, preemption.watch() as asked:
        progress = Progress()
        if flags.resume and (restored := checkpoints.restore(state, Progress)):
            state, progress = restored
        measure = make_measure(model, data.held_out, runner)
        hooks = PretrainingHooks(measure, checkpoints, write_curve, console)
        try:
            with prefetch(data.train.batches(progress.step)) as batches:
                state, progress = fit(
                    state, step, batches, rhythm, hooks, progress=progress, preemption=Deadline(asked, flags.minutes)
                )
        except Preempted:
            checkpoints.wait()
            state, progress = checkpoints.restore(state, Progress) or (state, progress)
            console.print(f"stopped after step {progress.step} of {recipe.steps}; --resume goes on")
    models.save_pretrained(flags.output_dir, params=state.all_params, config=config, tokenizer=data.tokenizer)
    end = {"held_out": measure(state.all_params), "other_sources": measure(state.all_params, True)}
    console.print(f"held-out loss {end['held_out']:.4f}, with the sources of other rows {end['other_sources']:.4f}")
    write_results(flags, facts, progress.records, {name: round(loss, 4) for name, loss in end.items()})
    draw(progress.records, config, [flags.output_dir / _PICTURE, *([flags.plot] if flags.plot else [])])
    console.print(f"written to {flags.output_dir}")


def write_results(
    flags: Flags, facts: dict[str, int], records: list[Record], end: dict[str, float] | None = None
) -> None:
    """Writes the recipe, the machine and the losses, to the output folder and where ``--results`` says."""
    losses = [line for line in records if "loss" in line]
    written = {
        "recipe": dataclasses.asdict(flags.recipe),
        "data": facts,
        "loss": [[line["step"], round(line["loss"], 4)] for line in losses],
        "held_out_loss": [[line["step"], round(line["eval"]["loss"], 4)] for line in records if "eval" in line],
        "loss_at_the_end": end,
        "minutes": round(sum(line["timing"]["seconds"] for line in losses) / 60, 1),
        "machine": report.machine(),
        "versions": run_folder.versions(),
    }
    for path in (flags.output_dir / _CURVE, *([flags.results] if flags.results else [])):
        files.make_folder(path.parent)
        files.write_text(path, json.dumps(written) + "\n")


def draw(records: list[Record], config: T5Config, paths: list[pathlib.Path]) -> None:
    """Draws the training loss, and the held-out one above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in records if "loss" in line]
    held_out = [(line["step"], line["eval"]["loss"]) for line in records if "eval" in line]
    if losses:
        axes.plot(*zip(*losses, strict=True), color="#9aa5b1", linewidth=1, label="training texts")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#0b6e99", marker=".", label="held-out texts")
    layers = f"{config.num_layers} + {config.num_decoder_layers} layers of {config.d_model}"
    axes.set(title=f"Span corruption, T5 with {layers}", xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if losses:
        axes.legend()
    for path in paths:
        files.make_folder(path.parent)
        figure.savefig(path, dpi=120)


def main(args: list[str] | None = None) -> None:
    """Runs the program; exits with code 2 and one line on stderr when the input is wrong."""
    flags = tyro.cli(Flags, args=args, use_underscores=True)
    console = rich.console.Console(highlight=False, soft_wrap=True)
    try:
        xla_flags.set_defaults()
        pretrain(flags, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
