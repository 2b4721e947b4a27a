"""Subject `checkpoint`: what an asynchronous save costs the steps that follow it, and how large a checkpoint is."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

import jax

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.turns import take_turns
from pats_jax.training import runners
from pats_jax.training.checkpoints import Checkpoints

SAVING, PLAIN = "one save", "no save"


@dataclasses.dataclass(frozen=True)
class Checkpoint(report.Subject):
    """Stretches of training with and without one asynchronous save, in turns."""

    case: str = "minilm:32x64"  # MODEL:ROWSxLENGTH
    method: str = "pats"  # METHOD[:CHANGE...]
    save_steps: int = 50  # steps of a stretch, of which the first may be saved
    rounds: int = 3  # stretches of each kind

    def run(self) -> report.Results:
        case = Case.parse(self.case)
        model, params, config = cases.load_model(case.model)
        batch = cases.random_batch(config.vocab_size, case.rows, case.length)
        total_steps = 1 + 2 * self.rounds * self.save_steps
        training = cases.Training(model, params, cases.settings_of(self.method), total_steps, batch)
        runner = runners.make_runner()
        step = training.start(runner)
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name) / "checkpoints"
            with Checkpoints(folder, keep=2) as checkpoints:
                checkpoints.save(0, runner.view(step()[0]), {})  # the first save of a process sets Orbax up
                checkpoints.wait()
                sides = {PLAIN: self._stretch(step), SAVING: self._stretch(step, checkpoints, runner)}
                turns = take_turns(sides, self.rounds, warm_up=0)
                last = folder / str(checkpoints.steps[-1])
                stored = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        ratio, size = turns.ratio(SAVING, PLAIN), cases.size(params)
        results = report.Results({f"{case} {self.method} a save every {self.save_steps} steps": ratio})
        table = report.table(f"{self.save_steps} steps of {self.method}, {case}", "", "seconds/step", "ratio")
        for name in sides:
            seconds = turns.median(name) / self.save_steps
            results.measured[name] = {"seconds_per_step": seconds, "seconds": turns.seconds[name]}
            table.add_row(name, f"{seconds:.4f}", f"{turns.ratio(name, PLAIN):.4f}")
        results.measured["checkpoint"] = {"bytes": stored, "bytes_per_parameter": stored / size, "parameters": size}
        table.add_row(f"checkpoint: {stored / size:.2f} bytes/parameter", "", "")
        results.tables.append(table)
        return results

    def _stretch(
        self, step: Callable, checkpoints: Checkpoints | None = None, runner: runners.MeshRunner | None = None
    ) -> Callable[[], None]:
        """A function that makes the steps of a stretch, and saves after the first of them where it has checkpoints."""

        def run():
            for number in range(self.save_steps):
                state, metrics = step()
                if number == 0 and checkpoints and runner:
                    checkpoints.save(int(state.step), runner.view(state), {})
                jax.device_get(metrics)
            if checkpoints:
                checkpoints.wait()

        return run
