"""Subject `text2text`: BART's training step and its generation, in turns with Transformers in torch."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import pats_jax
from benchmarks import against_torch, cases, report
from benchmarks.turns import Turns, take_turns
from pats_jax import methods, models
from pats_jax.models import BartConfig, GenerationConfig
from pats_jax.models.layers import LAYOUTS
from pats_jax.training import runners

HERE, TORCH = "here", "torch"


@dataclasses.dataclass(frozen=True)
class TextToText(report.Subject):
    """A training step and generation with BART here and in Transformers with torch: the same weights and batch.

    The weights are random, at BART-base's sizes; targets of generation all have the full length. Torch trains with SDPA
    and its fused AdamW, and generates with SDPA and its dynamic cache. Ratios are here / torch's seconds; also how long
    the programs take to compile, step in both layouts of layers.
    """

    rows: int = 8
    source_length: int = 128  # tokens, no padding
    target_length: int = 32  # tokens, of training targets and of generated texts
    beams: tuple[int, ...] = (1, 4)  # 1: greedy search
    layers: int = 6  # of the encoder, and of the decoder
    width: int = 768  # hidden units; a head has 64, and a feed-forward block 4 times as many
    vocab_size: int = 50265
    rounds: int = 7  # timed calls of each side

    def run(self) -> report.Results:
        import torch

        torch.set_num_threads(report.usable_cores())
        results = report.Results(versions={"torch": torch.__version__})
        config = self.config()
        model = models.Bart(config)
        ids = np.ones((1, 1), np.int32)
        shapes = jax.eval_shape(functools.partial(model.init, labels=ids), jax.random.key(0), ids)["params"]
        params = _drawn(shapes, config.init_std)
        with tempfile.TemporaryDirectory() as folder:
            models.save_pretrained(folder, params=params, config=config)
            load = functools.partial(_torch_model, folder)
            self._measure_step(load, params, results)
            self._measure_generation(load(), params, results)
        return results

    def config(self) -> BartConfig:
        """BART-base's, with the sizes of the flags."""
        heads = max(1, self.width // 64)
        sizes = {f"{side}_layers": self.layers for side in ("encoder", "decoder")}
        sizes |= {f"{side}_attention_heads": heads for side in ("encoder", "decoder")}
        sizes |= {f"{side}_ffn_dim": 4 * self.width for side in ("encoder", "decoder")}
        positions = max(self.source_length, self.target_length) + 2
        rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.1)
        return BartConfig(
            vocab_size=self.vocab_size, d_model=self.width, max_position_embeddings=positions, **sizes, **rates
        )

    def batch(self) -> dict[str, np.ndarray]:
        """Random sources and targets."""
        rng = np.random.default_rng(0)
        sizes = {"input_ids": self.source_length, "labels": self.target_length}
        ids = {name: rng.integers(4, self.vocab_size, (self.rows, size), np.int32) for name, size in sizes.items()}
        return ids | {"attention_mask": np.ones_like(ids["input_ids"])}

    def _measure_step(self, load: Callable[[], Any], params: Any, results: report.Results) -> None:
        settings, batch = cases.settings_of("finetune", max_steps=10_000), self.batch()
        way = against_torch.WAYS["eager"]
        sides: dict[str, Callable[[], Any]] = {TORCH: against_torch.torch_step(load(), way, settings, batch)}
        for layout in reversed(LAYOUTS):  # the last one, separate, is CPU's
            sides[HERE], seconds = self._step(layout, settings, params, batch)
            results.measured[f"compile step {layout}"] = {"seconds": seconds}
        name = f"step {self.rows}x({self.source_length}+{self.target_length})"
        self._report(name, take_turns(sides, self.rounds, untimed=1), results)

    def _step(self, layout, settings, params, batch):
        model = models.Bart(self.config(), layers=layout)
        params = models.stack_layers(params) if layout == "stacked" else params
        runner = runners.make_runner(num_devices=1)
        tx = methods.make_optimizer(settings.optimizer, settings.methods, 10_000, params, seed=settings.seed)
        create = functools.partial(pats_jax.TrainState.create, apply_fn=model.apply, tx=tx, key=0)
        state = runner.create_state(create, params)
        pure = pats_jax.make_train_step(pats_jax.make_seq2seq_loss_fn(model.apply))
        step, placed = runner.compile_step(pure, state), runner.put(batch)
        kept, started = {"state": state}, time.perf_counter()

        def call():
            kept["state"], metrics = step(kept["state"], placed)
            return metrics["loss"]

        jax.block_until_ready(call())
        return call, time.perf_counter() - started

    def _measure_generation(self, theirs: Any, params: Any, results: report.Results) -> None:
        import torch

        batch = {name: x for name, x in self.batch().items() if name != "labels"}
        inputs = {name: torch.from_numpy(x).long() for name, x in batch.items()}
        length = self.target_length
        model, placed = models.Bart(self.config()), jax.device_put(params)
        for beams in self.beams:
            options = {"num_beams": beams, "max_new_tokens": length, "min_new_tokens": length}
            settings = GenerationConfig.from_dict({**self.config().generation_defaults, **options})
            here = functools.partial(models.generate, model, placed, **batch, settings=settings)
            started = time.perf_counter()
            shape = here().shape
            name = f"generate {self.rows}x{self.source_length}, {beams} beams, {length} tokens"
            results.measured[f"compile {name}"] = {"seconds": time.perf_counter() - started}

            def there(options=options):
                with torch.no_grad():
                    return theirs.generate(**inputs, do_sample=False, **options)

            if there().shape != shape:
                raise AssertionError(f"torch wrote {tuple(there().shape)} tokens, we {shape}")
            turns = take_turns({TORCH: there, HERE: here}, self.rounds, untimed=1)
            self._report(name, turns, results, tokens=self.rows * length)

    def _report(self, name: str, turns: Turns, results: report.Results, tokens: int | None = None) -> None:
        table = report.table(f"{name}, {self.rounds} rounds", "side", "median, s", "tokens/s", "to torch")
        for side in turns.seconds:
            median, ratio = turns.median(side), turns.ratio(side, TORCH)
            results.measured[f"{name} {side}"] = {
                "median_seconds": median,
                "ratio": ratio,
                "seconds": turns.seconds[side],
            }
            rate = "" if tokens is None else f"{tokens / median:.0f}"
            table.add_row(side, f"{median:.3f}", rate, f"{ratio:.3f}")
        results.ratios[name] = turns.ratio(HERE, TORCH)
        results.tables.append(table)


def _drawn(shapes: Any, deviation: float) -> Any:
    """Random parameters, NumPy arrays: matrices normal, biases 0, norms' scales 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1 and path[0].key != "final_logits":
            return deviation * rng.standard_normal(leaf.shape, np.float32)
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _torch_model(folder: str) -> Any:
    """Transformers' BART of a folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = transformers.BartForConditionalGeneration
    return kind.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
