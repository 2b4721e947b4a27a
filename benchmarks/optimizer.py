"""Subject `optimizer`: the update alone, AdamW against PATS, and both against the memory traffic that they need."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, programs, report
from benchmarks.cases import Dtype
from benchmarks.step import groups
from benchmarks.turns import calls_together, take_turns_in_set_ups
from pats_jax.methods import make_optimizer

BASE, NOISY = "finetune", "pats:all"
COPY = "x + 1"
COPY_ENTRIES = 2**27  # float32, 512 MiB: more than any cache holds

Start = Callable[[], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Optimizer(report.Subject):
    """Median time of the optimizer's update alone: AdamW with clipping, decay and schedule, and PATS on top of it.

    Beside it the bytes that an update in two passes over memory must move, and the share of this machine's copy
    bandwidth that it makes of them; and how PATS's extra time grows with the model.
    """

    models: tuple[str, ...] = ("minilm", "bert-base")  # whose parameters are updated, with random gradients
    variants: tuple[str, ...] = ("pats", "pats:all")  # METHOD[:CHANGE...], of every model
    more_variants: tuple[str, ...] = (  # of the first model, too
        "pats:normal",
        "pats:all:normal",
        "pats:bfloat16",
        "pats:all:bfloat16",
        "pats:threefry2x32",
        "pats:rbg",
        "pats:philox4x32",
    )
    growth: tuple[str, ...] = (  # AdamW and pats:all of all of them in turns
        "bert-tiny",
        "bert-mini",
        "minilm",
        "bert-small",
        "bert-medium",
        "bert-base",
    )
    set_ups: int = 6  # times that all parameters and states are put into memory anew, in an order drawn anew
    rounds: int = 10  # timed updates of each variant in each of them
    together: int = 4  # variants whose states are in memory at the same time, AdamW among them
    dtype: Dtype = "float32"  # of the model's computation; its parameters, gradients and state are float32 anyway
    pipelined: int | None = None  # updates timed together, without waiting in between; none: 1 on CPU, else 20

    def run(self) -> report.Results:
        results = report.Results()
        table = report.table(
            f"Update alone, {self.set_ups} x {self.rounds} rounds",
            *("model", "variant", "median, ms", "to AdamW", "by bytes", "MB to move", "share of copy bandwidth"),
            *("to memory", "kernels"),
        )
        for number, model in enumerate(self.models):
            self._measure(model, self.variants + (self.more_variants if number == 0 else ()), results, table)
        results.tables.append(table)
        if self.growth:
            self._measure_growth(results)
        return results

    def _update(self, model: str, variant: str) -> "Update":
        options = cases.model_options(variant)
        total_steps = self.rounds * calls_together(self.pipelined)
        return Update(variant, *params_and_gradient(model, **options), total_steps)

    def _measure(self, name: str, variants: tuple[str, ...], results: report.Results, table: Any) -> None:
        calls = calls_together(self.pipelined)
        for group in groups(variants, self.together - 1):
            updates = {variant: self._update(name, variant) for variant in (BASE, *group)}
            described = {variant: programs.describe_program(update.compile()) for variant, update in updates.items()}
            starts = {variant: update.start for variant, update in updates.items()}
            turns = take_turns_in_set_ups({**starts, COPY: prepare_copy()}, self.set_ups, self.rounds, calls=calls)
            for variant, update in updates.items():
                key = f"{name} {variant}"
                if key in results.measured:
                    continue
                figures = describe_bytes(variant, update.params)
                figures |= {
                    "median_seconds": turns.median(variant),
                    "ratio": turns.ratio(variant, BASE),
                    "extra_seconds": turns.difference(variant, BASE),
                    "copy_bytes_per_second": 8 * COPY_ENTRIES / turns.median(COPY),
                    "seconds": turns.seconds[variant],
                    "base_seconds": turns.seconds[BASE],
                }
                rate = figures["bytes"] / figures["median_seconds"]
                figures["share_of_bandwidth"] = rate / figures["copy_bytes_per_second"]
                least = figures["least_bytes"] / figures["copy_bytes_per_second"]
                figures |= {"to_memory": figures["median_seconds"] / least, "pipelined": calls}
                figures |= {"dtype": self.dtype, "program": described[variant]}
                results.measured[key] = figures
                if variant != BASE:
                    results.ratios[key] = figures["ratio"]
                table.add_row(*_row(name, variant, figures))

    def _measure_growth(self, results: report.Results) -> None:
        """All models in the same rounds: a machine that becomes slower on the way is no growth."""
        starts, sizes = {}, {}
        for model in self.growth:
            for variant in (BASE, NOISY):
                update = self._update(model, variant)
                starts[f"{model} {variant}"], sizes[model] = update.start, cases.size(update.params)
        turns = take_turns_in_set_ups(starts, self.set_ups, self.rounds, calls=calls_together(self.pipelined))
        table = report.table(
            "Growth with noise on all leaves", "model", "parameters, M", "extra ns/parameter", "AdamW's ns/parameter"
        )
        for model, size in sizes.items():
            base, noisy = f"{model} {BASE}", f"{model} {NOISY}"
            figures = {
                "parameters": size,
                "base_median_seconds": turns.median(base),
                "median_seconds": turns.median(noisy),
                "extra_seconds": turns.difference(noisy, base),
                "seconds": turns.seconds[noisy],
                "base_seconds": turns.seconds[base],
            }
            results.measured[f"growth {model}"] = figures
            extra, adamw = (1e9 * figures[name] / size for name in ("extra_seconds", "base_median_seconds"))
            table.add_row(model, f"{size / 1e6:.1f}", f"{extra:.3f}", f"{adamw:.3f}")
        results.tables.append(table)


@functools.lru_cache(maxsize=1)
def params_and_gradient(model: str, **options: Any) -> tuple[Any, Any]:
    """A model's parameters, and a random gradient of them; options are those of `cases.load_model`."""
    _, params, _ = cases.load_model(model, **options)
    rng = np.random.default_rng(0)
    return params, jax.tree.map(lambda p: jnp.array(1e-3 * rng.standard_normal(p.shape, np.float32)), params)


class Update:
    """A variant's update of parameters and optimizer state, both donated.

    Attributes:
      params: what it starts from, NumPy arrays.
      function: ``function(params, opt_state, grads) -> (params, opt_state)``, jitted.
      shapes: of its arguments.
    """

    def __init__(self, variant: str, params: Any, grads: Any, total_steps: int):
        settings = cases.settings_of(variant)
        tx = make_optimizer(settings.optimizer, settings.methods, total_steps + 1, params, seed=settings.seed)
        self.params, self._grads = params, grads
        self.function, self._init = jax.jit(cases.update_step(tx), donate_argnums=(0, 1)), jax.jit(tx.init)
        self.shapes = jax.eval_shape(lambda params, grads: (params, tx.init(params), grads), params, grads)

    def compile(self) -> jax.stages.Compiled:
        """The compiled program, which a call then runs."""
        return self.function.lower(*self.shapes).compile()

    def start(self) -> Callable[[], Any]:
        """Allocates parameters and state; gives a function that makes an update of them."""
        held = jax.tree.map(jnp.array, self.params), self._init(self.params)
        return _in_place(lambda held: self.function(*held, self._grads), held)


def prepare_copy() -> Start:
    """The same for reading and writing 512 MiB."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    return lambda: _in_place(add, jnp.zeros(COPY_ENTRIES))


def _in_place(work: Callable[[Any], Any], held: Any) -> Callable[[], Any]:
    def run():
        nonlocal held
        held = work(held)
        return held

    return run


def describe_bytes(variant: str, params: Any) -> dict[str, Any]:
    """The bytes that an update must move if it goes over memory twice, as the means that it needs demand.

    The first pass reads the gradient (clipping) and, where there is noise, parameter and sensitivity; the second reads
    gradient, parameter and both moments and writes all but the gradient, and the same with sensitivity.
    ``least_bytes`` is less: 28 a parameter, gradient, parameter and moments read once and all but the gradient written
    once. PATS needs 16 more where there is noise: sensitivity read and written, and gradient and parameter read before
    that for the mean over the tensor.
    """
    noisy, sensitivity = cases.noisy_share(params, variant), 2 if "bfloat16" in variant.split(":") else 4
    adamw, extra = 8 * 4, noisy * (4 + 3 * sensitivity) if noisy else 0
    size = cases.size(params)
    return {
        "parameters": size,
        "noisy_parameters": round(noisy * size),
        "bytes": round((adamw + extra) * size),
        "least_bytes": round((28 + noisy * (8 + 2 * sensitivity)) * size),
        "ratio_by_bytes": (adamw + extra) / adamw,
    }


def _row(name, variant, figures):
    return (
        name,
        variant,
        f"{1e3 * figures['median_seconds']:.1f}",
        f"{figures['ratio']:.3f}",
        f"{figures['ratio_by_bytes']:.3f}",
        f"{figures['bytes'] / 1e6:.0f}",
        f"{figures['share_of_bandwidth']:.0%}",
        f"{figures['to_memory']:.2f}",
        str(figures["program"]["kernels"]),
    )
