"""Subject `torch`: the same training step in Transformers with torch, in turns with JAX's."""

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import cases, report
from benchmarks.cases import Case, Dtype
from benchmarks.turns import Turns, calls_together, take_turns
from pats_jax import models
from pats_jax.errors import InputError
from pats_jax.run.settings import Settings
from pats_jax.training import runners

TORCH = "torch"


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run torch.

    Attributes:
      attention: Transformers' name of it, "sdpa" or "eager".
      fused: whether AdamW is torch's fused one.
      compile_mode: of `torch.compile`; None: the model runs eagerly.
    """

    attention: str = "sdpa"
    fused: bool = True
    compile_mode: str | None = None


WAYS = {
    "eager": Way(),
    "eager:attention": Way(attention="eager"),
    "eager:adamw": Way(fused=False),
    "compile": Way(compile_mode="default"),
    "compile:reduce-overhead": Way(compile_mode="reduce-overhead"),
    "compile:max-autotune": Way(compile_mode="max-autotune"),
}
ON_CPU, ELSEWHERE = ("eager", "eager:attention", "eager:adamw"), ("eager", "compile")  # what is tried


@dataclasses.dataclass(frozen=True)
class AgainstTorch(report.Subject):
    """A training step here and in Transformers with torch: the same model, shape, dropout rates and optimizer.

    Torch gets its fastest way of several, found out first: eager, with its other attention (eager:attention), without
    its fused AdamW (eager:adamw), compile, compile:reduce-overhead, compile:max-autotune. Before a timed step each side
    makes one that is not timed: the first step after the other library's takes longer, most of it in the system. Both
    sides are measured alone as well: a median that differs from the one in turns would show that they disturb each
    other. On a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false, or JAX leaves torch little memory.
    """

    cases: tuple[str, ...] = ("minilm:32x64", "bert-base:8x128")  # MODEL:ROWSxLENGTH; bert-base and such: random
    methods: tuple[str, ...] = ("finetune", "pats", "pats:all")  # METHOD[:CHANGE...]
    torch_ways: tuple[str, ...] = ()  # see above; none: the three eager ones on CPU, else eager and compile
    dtype: Dtype = "float32"  # of computation; torch under autocast
    pipelined: int | None = None  # steps timed together, without waiting in between; none: 1 on CPU, else 20
    rounds: int = 10  # timed steps of each side in turns
    rounds_alone: int = 4  # timed steps of each side alone, and of each of torch's ways

    def run(self) -> report.Results:
        import torch

        for way in self.torch_ways:
            way_named(way)
        torch.set_num_threads(report.usable_cores())
        results = report.Results(versions={"torch": torch.__version__})
        for case in map(Case.parse, self.cases):
            self._measure(case, results)
        return results

    def _measure(self, case: Case, results: report.Results) -> None:
        calls = calls_together(self.pipelined)
        model, params, config = cases.load_model(case.model)
        batch = cases.random_batch(config.vocab_size, case.rows, case.length)
        settings = cases.settings_of("finetune", max_steps=10_000)
        ways = self.torch_ways or (ON_CPU if jax.default_backend() == "cpu" else ELSEWHERE)
        alone: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            models.save_pretrained(folder, params=params, config=config)

            def start(way):
                loaded = load_torch_model(folder, WAYS[way].attention)
                return torch_step(loaded, WAYS[way], settings, batch, self.dtype)

            for way in ways:
                step = start(way)
                alone[way] = take_turns({way: step}, self.rounds_alone, calls=calls).median(way)
                del step
                gc.collect()
            fastest = min(alone, key=lambda way: alone[way])
            sides: dict[str, Any] = {TORCH: start(fastest)}
        del model, params
        load = cases.loader(case.model, self.dtype)
        for method in self.methods:
            model, params, _ = load(method)
            training = cases.Training(model, params, cases.settings_of(method), 10_000, batch)
            sides[method] = training.start(runners.make_runner(num_devices=1))
            alone[method] = take_turns({method: sides[method]}, self.rounds_alone, calls=calls).median(method)
        turns = take_turns(sides, self.rounds, untimed=1, calls=calls)
        results.tables.append(self._report(case, turns, alone | {TORCH: alone[fastest]}, fastest, results))
        for method in self.methods:
            results.measured[f"{case} {method}"]["program"] = sides[method].program

    def _report(self, case: Case, turns: Turns, alone: dict[str, float], fastest: str, results: report.Results) -> Any:
        calls = calls_together(self.pipelined)
        table = report.table(
            f"Step of {case}, {self.dtype}, torch by {fastest}, {self.rounds} rounds of {calls}",
            *("side", "median in turns, s", "median alone, s", "to torch", "to the first here"),
        )
        for name in turns.seconds:
            ratio, own = turns.ratio(name, TORCH), turns.ratio(name, self.methods[0])
            results.measured[f"{case} {name}"] = {
                "median_seconds": turns.median(name),
                "median_seconds_alone": alone[name],
                "ratio": ratio,
                "ratio_to_first": own,
                "dtype": self.dtype,
                "pipelined": calls,
                "seconds": turns.seconds[name],
            }
            if name != TORCH:
                results.ratios[f"{case} {name}"] = ratio
            figures = (turns.median(name), alone[name], ratio, own)
            table.add_row(name, *(f"{figure:.3f}" for figure in figures))
        ways = {way: alone[way] for way in WAYS if way in alone}
        results.measured[f"{case} {TORCH}"] |= {"fastest": fastest, "median_seconds_alone_by_way": ways}
        return table


def way_named(name: str) -> Way:
    """The entry of `WAYS`.

    Raises:
      InputError: if there is none.
    """
    if name not in WAYS:
        raise InputError(f"--torch_ways {name}: choose from {', '.join(WAYS)}")
    return WAYS[name]


class Loss:
    """A loss that torch's device may still be at work on; `jax.block_until_ready` waits for it."""

    def __init__(self, value: Any):
        self._value = value

    def block_until_ready(self) -> "Loss":
        """Waits for the device."""
        float(self)
        return self

    def __float__(self) -> float:
        return self._value.item()


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


def torch_step(
    model: Any, way: Way, settings: Settings, batch: dict[str, Any], dtype: str = "float32"
) -> Callable[[], Loss]:
    """A function that makes one step with torch: loss, gradient, clipping, AdamW, linear schedule.

    Args:
      model: a model of Transformers, with the way's attention.
      way: how torch runs it.
      settings: of the optimizer.
      batch: see `cases.random_batch`; it is on the device from the start.
      dtype: "float32", or "bfloat16" under autocast.

    Returns:
      A function that gives the loss before its step and does not wait for the device.
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
        lr=settings.optimizer.learning_rate,
        betas=(settings.optimizer.adam_beta1, settings.optimizer.adam_beta2),
        eps=settings.optimizer.adam_epsilon,
        weight_decay=settings.optimizer.weight_decay,
        fused=way.fused,
    )
    warmup_steps = math.ceil(settings.length.max_steps * settings.optimizer.warmup_ratio)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, settings.length.max_steps)
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    inputs = {name: torch.from_numpy(batch[name]).to(device).long() for name in names if name in batch}
    forward = torch.compile(model, mode=way.compile_mode) if way.compile_mode else model

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return Loss(loss.detach())

    return step
