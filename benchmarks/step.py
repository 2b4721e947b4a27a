"""Subject `step`: the whole training step, method by model by shape, against plain AdamW."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.monitoring

from benchmarks import cases, report
from benchmarks.cases import Case, Dtype
from benchmarks.turns import Turns, calls_together, take_turns
from pats_jax.training import runners

BASE = "finetune"
METHODS = (
    "finetune",
    "pats",
    "pats:all",
    "dps-dense",
    "dps-mix",
    "bitfit",
    "sift",
    "child-d",
    "child-f",
    "mixout",
    "sage",
    "l2-sp",
    "r-drop",
    "smart",
    "finetune:lora",
)


@dataclasses.dataclass(frozen=True)
class Step(report.Subject):
    """Median time of a training step by method, model and shape, and its ratio to plain AdamW's.

    The step is the GLUE program's: clipping, schedule, dropout as the checkpoint has it (also for methods whose authors
    do without), steps that are not finite skipped, the state donated.
    """

    cases: tuple[str, ...] = ("minilm:32x64", "bert-base:8x128")  # MODEL:ROWSxLENGTH; bert-base and such: random
    methods: tuple[str, ...] = METHODS  # METHOD[:CHANGE...]; CHANGES and MODEL_CHANGES of benchmarks/cases.py name them
    dtype: Dtype = "float32"  # of computation
    rounds: int = 12  # timed steps of each method
    pipelined: int | None = None  # steps timed together, without waiting in between; none: 1 on CPU, else 20
    stage_steps: int = 2  # of DPS, whose first step of a stage that trains a subnetwork is told apart
    together: int = 4  # methods whose states are in memory at the same time, plain AdamW among them

    def run(self) -> report.Results:
        results = report.Results()
        for case in map(Case.parse, self.cases):
            self._measure(case, results)
        return results

    def _measure(self, case: Case, results: report.Results) -> None:
        calls = calls_together(self.pipelined)
        load = cases.loader(case.model, self.dtype)
        _, params, config = load(BASE)
        batch = cases.random_batch(config.vocab_size, case.rows, case.length)
        size = cases.size(params)
        table = report.table(
            f"Step of {case}, {size / 1e6:.1f}M parameters, {self.dtype}, {self.rounds} rounds of {calls}",
            *("method", "median, s", "examples/s", "to AdamW", "stage's first to others", "state, bytes/parameter"),
            *("compilations", "kernels"),
        )

        def start(method):
            model, params, _ = load(method)
            settings = cases.settings_of(method, update_ratio=self._update_ratio)
            training = cases.Training(model, params, settings, self._total_steps, batch)
            running = training.start(runners.make_runner())
            return Counted(running), running, cases.num_bytes(training.shapes.opt_state)

        base = start(BASE)
        for group in groups([method for method in self.methods if method != BASE], self.together - 1):
            started = {BASE: base} | {method: start(method) for method in group}
            turns = take_turns({method: run for method, (run, _, _) in started.items()}, self.rounds, calls=calls)
            for method, (run, running, state_bytes) in started.items():
                if method != BASE or f"{case} {BASE}" not in results.measured:
                    figures = self._describe(turns, method, case)
                    figures |= {"state_bytes": state_bytes, "compilations": run.compilations, "parameters": size}
                    figures |= {"dtype": self.dtype, "pipelined": calls, "program": running.program}
                    results.measured[f"{case} {method}"] = figures
                    table.add_row(*_row(method, figures))
            del started, run, running  # the states of this group make room for the next
        for method in self.methods:
            if method != BASE:
                figures = results.measured[f"{case} {method}"]
                results.ratios[f"{case} {method}"] = figures["ratio"]
                if figures["stage_start_ratio"]:
                    results.ratios[f"{case} {method} stage start"] = figures["stage_start_ratio"]
        results.tables.append(table)

    def _describe(self, turns: Turns, method: str, case: Case) -> dict[str, Any]:
        usual, first = list(range(self.rounds)), []
        if method.startswith("dps") and calls_together(self.pipelined) == 1:
            first = [number for number in usual if self._starts_subnetwork(number + 1)]
            usual = [number for number in usual if number not in first]
        median = turns.median(method, usual)
        return {
            "median_seconds": median,
            "examples_per_second": case.rows / median,
            "ratio": turns.ratio(method, BASE, usual),
            "stage_start_ratio": turns.median(method, first) / median if first else None,
            "seconds": turns.seconds[method],
            "base_seconds": turns.seconds[BASE],
        }

    def _starts_subnetwork(self, count):
        """Whether DPS chooses a subnetwork in the step after so many, as in `pats_jax.dps_dense`."""
        return count % self.stage_steps == 0 and count // self.stage_steps % 2 == 1

    @property
    def _total_steps(self):
        return (self.rounds + 1) * calls_together(self.pipelined)  # one round warms up

    @property
    def _update_ratio(self):
        return min(1.0, (self.stage_steps + 0.5) / self._total_steps)


class Counted:
    """A function, and how many programs JAX has compiled inside its calls.

    Attributes:
      compilations: programs so far.
    """

    def __init__(self, function: Callable[[], Any]):
        self._function, self.compilations = function, 0

    def __call__(self) -> Any:
        # JAX listens for the time of the call only: what it keeps would keep a training state in memory
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        try:
            return self._function()
        finally:
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.compilations += event == "/jax/core/compile/backend_compile_duration"


def groups(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The names, so many at a time; once nothing, if there are none."""
    size = max(size, 1)
    for begin in range(0, max(len(names), 1), size):
        yield names[begin : begin + size]


def _row(method, figures):
    start = figures["stage_start_ratio"]
    return (
        method,
        f"{figures['median_seconds']:.4f}",
        f"{figures['examples_per_second']:.1f}",
        f"{figures['ratio']:.3f}",
        f"{start:.2f}" if start else "-",
        f"{figures['state_bytes'] / figures['parameters']:.2f}",
        str(figures["compilations"]),
        str(figures["program"]["kernels"]),
    )
