"""Subject `compile`: time to the first step, with nothing compiled before and with all of it kept on disk."""

import collections
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import tyro

from benchmarks import cases, report
from benchmarks.cases import Case
from pats_jax.errors import InputError
from pats_jax.run import run_folder, xla_flags

BASE = "finetune"
PARTS = ("trace", "lower", "compile", "run")


@dataclasses.dataclass(frozen=True)
class Compile(report.Subject):
    """Seconds to the first step (trace, lower, compile, run) by method, each in a fresh process.

    With a cold compilation cache (an empty folder) and a warm one, the methods in turns. Also the size of the programs,
    the seconds for a batch of a second length, and how long `pats-jax glue` takes from its start to its first step.
    """

    cases: tuple[str, ...] = ("minilm:32x64",)  # MODEL:ROWSxLENGTH
    methods: tuple[str, ...] = ("finetune", "pats", "pats:all", "dps-dense", "mixout", "r-drop")  # METHOD[:CHANGE...]
    second_length: int = 32  # tokens of a row in the second shape
    rounds: int = 3  # processes for each method, with a cold and with a warm cache
    program: bool = True  # also time `pats-jax glue` on the built-in CoLA or data_dir's
    data_dir: str | None = None  # folder of GLUE's TSV files; none: the built-in data

    def run(self) -> report.Results:
        results = report.Results()
        for case in map(Case.parse, self.cases):
            self._measure(case, results)
        if self.program:
            self._measure_program(results)
        return results

    def _measure(self, case: Case, results: report.Results) -> None:
        found: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
        for _ in range(self.rounds):
            for method in self.methods:
                with tempfile.TemporaryDirectory() as cache:
                    for kind in ("cold", "warm"):
                        found[method, kind].append(first_step_in_new_process(case, method, self.second_length, cache))
        table = report.table(
            f"First step of {case}, seconds, medians of {self.rounds} processes",
            *("method", "cache", *PARTS, "all but run", "to AdamW", "second shape", "instructions", "optimised"),
        )
        for kind in ("cold", "warm"):
            for method in self.methods:
                figures = summary(found[method, kind], found[self.methods[0], kind])
                results.measured[f"{case} {method} {kind}"] = figures
                if method != self.methods[0]:
                    results.ratios[f"{case} {method} {kind}"] = figures["ratio"]
                seconds = [figures[part] for part in (*PARTS, "total", "ratio", "second_shape")]
                counts = (figures["instructions"], figures["optimised_instructions"])
                table.add_row(method, kind, *(f"{value:.2f}" for value in seconds), *map(str, counts))
        results.tables.append(table)

    def _measure_program(self, results: report.Results) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache = pathlib.Path(folder) / "cache"
            seconds = [program_seconds(pathlib.Path(folder), cache, self.data_dir) for _ in range(1 + self.rounds)]
        figures = {"cold_seconds": seconds[0], "warm_seconds": statistics.median(seconds[1:]), "seconds": seconds}
        results.measured["pats-jax glue"] = figures
        table = report.table("`pats-jax glue`, CoLA", "cache", "seconds to first step")
        table.add_row("cold", f"{figures['cold_seconds']:.2f}")
        table.add_row(f"warm, median of {self.rounds}", f"{figures['warm_seconds']:.2f}")
        results.tables.append(table)


def summary(found: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what several processes found, and the ratio to another method's in the same rounds."""
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    ratio = statistics.median(one["total"] / other["total"] for one, other in zip(found, base, strict=True))
    return {**medians, "ratio": ratio, "processes": found}


def first_step(case: str, method: str, second_length: int) -> None:
    """Prints the seconds of each part of a first step as JSON; nothing has been compiled in this process before.

    Args:
      case: MODEL:ROWSxLENGTH
      method: METHOD[:CHANGE...]
      second_length: tokens of a row in the second shape
    """
    parsed = Case.parse(case)
    xla_flags.set_defaults()  # as in the programs
    model, params, config = cases.load_model(parsed.model, **cases.model_options(method))
    batch = cases.random_batch(config.vocab_size, parsed.rows, parsed.length)
    training = cases.Training(model, params, cases.settings_of(method), 1000, batch)
    started = time.perf_counter()
    state = jax.block_until_ready(jax.jit(training.create)(params))
    figures: dict[str, float] = {"create_state": time.perf_counter() - started}
    compiled = timed_compilation(training.step, state, batch, figures)
    started = time.perf_counter()
    jax.block_until_ready(compiled(state, batch))
    figures["run"] = time.perf_counter() - started
    second: dict[str, float] = {}
    other = cases.random_batch(config.vocab_size, parsed.rows, second_length)
    timed_compilation(training.step, training.shapes, other, second)
    print(json.dumps({**figures, "second_shape": second["total"]}))


def timed_compilation(step: Any, state: Any, batch: Any, figures: dict[str, float]) -> Any:
    """The compiled step; seconds and sizes go into figures."""
    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=0).trace(state, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    figures |= {part: times[number + 1] - times[number] for number, part in enumerate(PARTS[:3])}
    figures["total"] = times[3] - times[0]
    before, after = lowered.as_text(), compiled.as_text() or ""
    figures |= {"program_bytes": len(before), "instructions": before.count(" = ")}
    figures["optimised_instructions"] = after.count(" = ")
    return compiled


def first_step_in_new_process(case: Case, method: str, second_length: int, cache: str) -> dict[str, Any]:
    """What `first_step` prints, with its compiled programs kept in a folder."""
    name = f"{case.model}:{case.rows}x{case.length}"
    arguments = ["--case", name, "--method", method, "--second_length", str(second_length)]
    kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "benchmarks.compilation", *arguments]
    found = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
    if found.returncode:
        raise InputError(f"{case} {method}: {(found.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def program_seconds(folder: pathlib.Path, cache: pathlib.Path, data_dir: str | None) -> float:
    """Seconds from the start of `pats-jax glue` to its first line of metrics.jsonl."""
    run = folder / "run"
    journal = run / run_folder.METRICS
    arguments = ["--task_name", "cola", "--data_dir", data_dir or "builtin", "--method", "pats", "--do_train"]
    arguments += ["--max_steps", "1", "--logging_steps", "1", "--output_dir", str(run), "--overwrite"]
    arguments += ["--compilation_cache_dir", str(cache)]
    journal.unlink(missing_ok=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "pats_jax", "glue", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        _, errors = process.communicate()
    if process.returncode:
        raise InputError(f"pats-jax glue failed: {(errors.strip().splitlines() or ['no output'])[-1]}")
    return seconds


if __name__ == "__main__":
    tyro.cli(first_step, use_underscores=True)
