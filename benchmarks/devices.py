"""Subject `devices`: what a runner over several devices costs, at the same global batch as one device."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.turns import take_turns
from pats_jax.errors import InputError
from pats_jax.training import runners

PLAIN = "plain jit, 1 device"


@dataclasses.dataclass(frozen=True)
class Devices(report.Subject):
    """Step time of each runner on 1, 2, 4, 8 devices against a plain jit on one, the global batch being the same.

    On virtual CPU devices, which share the machine, it shows what the runners cost. Each number of devices has a
    process of its own, in which the runners take turns.
    """

    case: str = "minilm:32x64"  # MODEL:ROWSxLENGTH, the global batch
    method: str = "pats"  # METHOD[:CHANGE...]
    counts: tuple[int, ...] = (1, 2, 4, 8)  # devices; virtual ones where JAX runs on the CPU
    runners: tuple[str, ...] = ("jit", "pmap")  # see docs/scaling.md
    rounds: int = 8  # timed steps of each

    def run(self) -> report.Results:
        results = report.Results()
        if len(self.counts) > 1:
            for count in self.counts:
                found = self._in_new_process(count)
                results.ratios |= found["ratios"]
                results.measured |= found["measured"]
        else:
            self._measure(self.counts[0], results)
        table = report.table(f"Step of {self.method}, {self.case}", "runner", "median, s", f"to {PLAIN}")
        for key, figures in results.measured.items():
            table.add_row(key, f"{figures['median_seconds']:.4f}", f"{figures['ratio']:.3f}")
        results.tables.append(table)
        return results

    def _measure(self, count: int, results: report.Results) -> None:
        if count > jax.device_count():
            raise InputError(f"--counts {count}: JAX has {jax.device_count()} devices here")
        case = Case.parse(self.case)
        model, params, config = cases.load_model(case.model)
        batch = cases.random_batch(config.vocab_size, case.rows, case.length)
        settings = cases.settings_of(self.method)
        training = cases.Training(model, params, settings, 1000, batch)
        sides = {PLAIN: plain_step(training, params, batch)}
        for kind in self.runners:
            sides[kind] = training.start(runners.make_runner(kind, num_devices=count))
        turns = take_turns(sides, self.rounds)
        for name in sides:
            key = name if name == PLAIN else f"{name}, {count} device{'s' if count > 1 else ''}"
            if name != PLAIN:
                results.ratios[key] = turns.ratio(name, PLAIN)
            results.measured[key] = {
                "median_seconds": turns.median(name),
                "ratio": turns.ratio(name, PLAIN),
                "seconds": turns.seconds[name],
                "plain_seconds": turns.seconds[PLAIN],
            }

    def _in_new_process(self, count: int) -> dict[str, Any]:
        flag = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "devices.json"
            flags = {"case": self.case, "method": self.method, "counts": count, "rounds": self.rounds}
            command = [sys.executable, "-m", "benchmarks", "devices", "--output_file", str(path)]
            command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            command += ["--runners", *self.runners]
            found = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True, text=True)
            if found.returncode:
                raise InputError(f"{count} devices: {(found.stderr.strip().splitlines() or ['no output'])[-1]}")
            return report.read(path)


def plain_step(training: cases.Training, params: Any, batch: Any) -> Callable[[], Any]:
    """A function that makes a step by `jax.jit` and nothing else, on the first device."""
    step = jax.jit(training.step, donate_argnums=0)
    held = [jax.jit(training.create)(params)]

    def run():
        held[0], metrics = step(held[0], batch)
        return held[0], metrics

    return run
