"""Subject `torch`: the same training step in Transformers with torch, in turns with JAX's."""

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.turns import Turns, take_turns
from pats_jax import models
from pats_jax.run.settings import Settings
from pats_jax.training import runners

TORCH = "torch"
WAYS = {  # to run torch: attention, and whether AdamW is its fused one
    "sdpa, fused AdamW": ("sdpa", True),
    "eager, fused AdamW": ("eager", True),
    "sdpa": ("sdpa", False),
}


@dataclasses.dataclass(frozen=True)
class AgainstTorch(report.Subject):
    """A training step here and in Transformers with torch: the same model, shape, dropout rates and optimizer.

    Torch gets its fastest way of several (attention, fused AdamW or not), found out first. Before a timed step each
    side makes one that is not timed: the first step after the other library's takes longer, most of it in the system.
    Both sides are measured alone as well: a median that differs from the one in turns would show that they disturb
    each other.
    """

    cases: tuple[str, ...] = ("minilm:32x64", "bert-base:8x128")  # MODEL:ROWSxLENGTH; bert-base and such: random
    methods: tuple[str, ...] = ("finetune", "pats", "pats:all")  # METHOD[:CHANGE...]
    rounds: int = 10  # timed steps of each side in turns
    rounds_alone: int = 4  # timed steps of each side alone, and of each of torch's ways

    def run(self) -> report.Results:
        import torch

        torch.set_num_threads(report.usable_cores())
        results = report.Results(versions={"torch": torch.__version__})
        for case in map(Case.parse, self.cases):
            self._measure(case, results)
        return results

    def _measure(self, case: Case, results: report.Results) -> None:
        model, params, config = cases.load_model(case.model)
        batch = cases.random_batch(config.vocab_size, case.rows, case.length)
        settings = cases.settings_of("finetune", max_steps=10_000)
        alone: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            models.save_pretrained(folder, params=params, config=config)
            for way, (attention, fused) in WAYS.items():
                step = torch_step(folder, attention, fused, settings, batch)
                alone[way] = take_turns({way: step}, self.rounds_alone).median(way)
                del step
                gc.collect()
            fastest = min(alone, key=lambda way: alone[way])
            sides = {TORCH: torch_step(folder, *WAYS[fastest], settings, batch)}
        for method in self.methods:
            training = cases.Training(model, params, cases.settings_of(method), 10_000, batch)
            sides[method] = training.start(runners.make_runner(num_devices=1))
            alone[method] = take_turns({method: sides[method]}, self.rounds_alone).median(method)
        alone[TORCH] = alone[fastest]
        turns = take_turns(sides, self.rounds, untimed=1)
        results.tables.append(self._report(case, turns, alone, fastest, results))

    def _report(self, case: Case, turns: Turns, alone: dict[str, float], fastest: str, results: report.Results) -> Any:
        table = report.table(
            f"Step of {case}, torch by {fastest}, {self.rounds} rounds",
            *("side", "median in turns, s", "median alone, s", "to torch", "to the first here"),
        )
        for name in turns.seconds:
            ratio, own = turns.ratio(name, TORCH), turns.ratio(name, self.methods[0])
            results.measured[f"{case} {name}"] = {
                "median_seconds": turns.median(name),
                "median_seconds_alone": alone[name],
                "ratio": ratio,
                "ratio_to_first": own,
                "seconds": turns.seconds[name],
            }
            if name != TORCH:
                results.ratios[f"{case} {name}"] = ratio
            figures = (turns.median(name), alone[name], ratio, own)
            table.add_row(name, *(f"{figure:.3f}" for figure in figures))
        ways = {way: alone[way] for way in WAYS}
        results.measured[f"{case} {TORCH}"] |= {"fastest": fastest, "median_seconds_alone_by_way": ways}
        return table


def torch_step(
    folder: str, attention: str, fused: bool, settings: Settings, batch: dict[str, Any]
) -> Callable[[], float]:
    """A function that makes one step with torch: loss, gradient, clipping, AdamW, linear schedule.

    Args:
      folder: a checkpoint that Transformers loads.
      attention: "sdpa" or "eager".
      fused: whether AdamW is torch's fused one.
      settings: of the optimizer.
      batch: see `cases.random_batch`.

    Returns:
      A function that gives the loss before its step.
    """
    step = torch_training(load_torch_model(folder, attention), fused, settings, batch)
    return lambda: step().item()


def load_torch_model(name: str, attention: str) -> Any:
    """Transformers' classifier in float32: of a checkpoint's folder, or of a size of `cases.SIZES` drawn at random."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForSequenceClassification
    if name not in cases.SIZES:
        return auto.from_pretrained(name, attn_implementation=attention, dtype=torch.float32)
    config = transformers.BertConfig(**cases.config_of_size(name).to_dict())
    return auto.from_config(config, attn_implementation=attention)


def torch_training(
    model: Any,
    fused: bool,
    settings: Settings,
    batch: dict[str, Any],
    *,
    dtype: str = "float32",
    compile_mode: str | None = None,
) -> Callable[[], Any]:
    """A function that makes one step with torch and does not wait for the device.

    Args:
      model: a classifier of Transformers.
      fused: whether AdamW is torch's fused one.
      settings: of the optimizer.
      batch: see `cases.random_batch`; it is on the device from the start.
      dtype: "float32", or "bfloat16" under autocast.
      compile_mode: of `torch.compile`; none: the model runs eagerly.

    Returns:
      A function that gives the loss before its step, a tensor on the device.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=fused,
    )
    warmup_steps = math.ceil(settings.max_steps * settings.warmup_ratio)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, settings.max_steps)
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    inputs = {name: torch.from_numpy(batch[name]).to(device).long() for name in names}
    forward = torch.compile(model, mode=compile_mode) if compile_mode else model

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
