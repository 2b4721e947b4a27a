"""Subject `long`: ModernBERT on long texts, forward and backward, in turns with Transformers in torch."""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks import against_torch, cases, report
from benchmarks.cases import Case, Dtype
from benchmarks.turns import take_turns
from pats_jax import models
from pats_jax.models.encoders.modernbert_config import GLOBAL, LOCAL, ModernBertConfig
from pats_jax.training import runners

HERE, TORCH = "here", "torch"
ALONE = {"local": LOCAL, "global": GLOBAL}  # models whose layers are all of one type


@dataclasses.dataclass(frozen=True)
class Long(report.Subject):
    """ModernBERT's loss and gradients here and in torch with SDPA, and what local layers cost against global ones.

    The model has the sizes of ModernBERT-base but for its number of layers, random weights, and as its config says the
    mean of all tokens as what the classifier reads: all layers compute all tokens. Rows have no padding, which is
    torch's fast way. There is no optimizer.
    """

    cases: tuple[str, ...] = ("4x512", "1x2048")  # ROWSxLENGTH
    layers: int = 4  # of ModernBERT-base's 22; the first and the fourth are global
    width: int = 768  # hidden units; a head has 64, and a feed-forward block 1.5 times as many
    dtype: Dtype = "float32"  # of computation; torch under autocast
    rounds: int = 5  # timed calls of each variant

    def run(self) -> report.Results:
        import torch

        torch.set_num_threads(report.usable_cores())
        results = report.Results(versions={"torch": torch.__version__})
        for text in self.cases:
            self._measure(Case.parse(f"modernbert:{text}"), results)
        return results

    def _measure(self, case: Case, results: report.Results) -> None:
        config = self.config()
        batch = cases.random_batch(config.vocab_size, case.rows, case.length)
        model = models.SequenceClassifier(config)
        params = cases.random_params(model, config)
        with tempfile.TemporaryDirectory() as folder:
            models.save_pretrained(folder, params=params, config=config)
            theirs = torch_gradients(against_torch.load_torch_model(folder, "sdpa"), batch, self.dtype)
        variants: dict[str, Callable[[], Any]] = {TORCH: theirs, HERE: self._gradients(config, params, batch)}
        for name, kind in ALONE.items():
            variants[name] = self._gradients(self.config(kind), params, batch)
        turns = take_turns(variants, self.rounds, untimed=1)
        title = f"Loss and gradients of {case}, {self.layers} layers, {self.dtype}, {self.rounds} rounds"
        table = report.table(title, "variant", "median, s", "tokens/s", "to torch")
        for name in variants:
            median, ratio = turns.median(name), turns.ratio(name, TORCH)
            tokens = case.rows * case.length / median
            results.measured[f"{case} {name}"] = {
                "median_seconds": median,
                "tokens_per_second": tokens,
                "ratio": ratio,
                "layers": self.layers,
                "dtype": self.dtype,
                "seconds": turns.seconds[name],
            }
            table.add_row(name, f"{median:.3f}", f"{tokens:.0f}", f"{ratio:.3f}")
        results.ratios[f"{case}"] = turns.ratio(HERE, TORCH)
        results.ratios[f"{case} local / global"] = turns.ratio("local", "global")
        results.tables.append(table)

    def config(self, kind: str | None = None) -> ModernBertConfig:
        """The config; with a type of layers, of a model that has no other."""
        return ModernBertConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            num_attention_heads=self.width // 64,
            intermediate_size=self.width * 3 // 2,
            classifier_pooling="mean",
            layer_types=() if kind is None else (kind,) * self.layers,
        )

    def _gradients(self, config: ModernBertConfig, params: Any, batch: dict[str, Any]) -> Callable[[], Any]:
        """A function that computes the loss and its gradients, with the layers as programs hold them here."""
        layers, unroll = runners.default_form(jax.default_backend())
        model = models.SequenceClassifier(config, dtype=self.dtype, layers=layers, unroll=unroll)
        own = jax.device_put(models.stack_layers(params) if layers == "stacked" else params)
        inputs = jax.device_put({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})

        @jax.jit
        def compute(params, inputs):
            def loss(params):
                logits = model.apply({"params": params}, inputs["input_ids"], inputs["attention_mask"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, inputs["labels"]).mean()

            return jax.value_and_grad(loss)(params)

        return lambda: compute(own, inputs)


def torch_gradients(model: Any, batch: dict[str, Any], dtype: str) -> Callable[[], Any]:
    """A function that computes the loss and its gradients with torch, and gives the loss."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    names = ("input_ids", "attention_mask", "labels")
    inputs = {name: torch.from_numpy(batch[name]).to(device).long() for name in names}

    def compute():
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs).loss
        loss.backward()
        return against_torch.Loss(loss.detach())

    return compute
