"""Subject `check`: the guard. Measures a few stored ratios and sizes again and fails where one has become worse."""

import dataclasses
import pathlib
from collections.abc import Mapping

import rich.console

from benchmarks import report
from benchmarks.memory import Memory
from benchmarks.optimizer import Optimizer
from benchmarks.step import Step
from pats_jax.reporting.console import say


@dataclasses.dataclass(frozen=True)
class Compared:
    """A stored figure and the same now; either may be missing.

    Attributes:
      name: subject and case.
      stored: what the results file holds.
      now: what was measured.
      allowed: largest ratio of now to stored that is no loss.
    """

    name: str
    stored: float | None
    now: float | None
    allowed: float

    @property
    def is_loss(self) -> bool:
        """Whether both are there and it has become too much worse."""
        return self.stored is not None and self.now is not None and self.now > self.allowed * self.stored

    @property
    def change(self) -> str:
        """The change in percent, in words where there is none."""
        if self.stored is None:
            return "not stored"
        if self.now is None:
            return "not measured"
        return f"{self.now / self.stored - 1:+.1%}" if self.stored else "0" if not self.now else "was 0"


# What is measured again; `memory` compiles only.
QUICK: dict[str, report.Subject] = {
    "step": Step(cases=("minilm:32x64",), methods=("finetune", "pats", "pats:all", "bitfit"), rounds=16),
    "optimizer": Optimizer(models=("minilm",), more_variants=(), growth=(), set_ups=3),
    "memory": Memory(step_methods=("finetune", "pats", "pats:all")),
}


def compare(subject: str, stored: Mapping[str, float], now: Mapping[str, float], tolerance: float) -> list[Compared]:
    """Every figure that is stored or was measured.

    Args:
      subject: its name.
      stored: case -> figure; the less the better.
      now: the same as measured.
      tolerance: by how much a figure may be worse, as a share of the stored one; 0: not at all.

    Returns:
      One entry a case.
    """
    names = [*stored, *(name for name in now if name not in stored)]
    return [Compared(f"{subject}: {name}", stored.get(name), now.get(name), 1 + tolerance) for name in names]


@dataclasses.dataclass(frozen=True)
class Check:
    """The guard: ratios of `step` and `optimizer` and bytes of `memory` again, on MiniLM, against the stored ones.

    Exit code 1 where a ratio is worse by more than the tolerance, or a program or a state takes a byte more. Times are
    never compared: another machine has others.
    """

    results_dir: pathlib.Path | None = None  # the stored results; none: those of this kind of device
    tolerance: float = 0.10  # by how much a ratio may be worse
    subjects: tuple[str, ...] = ()  # which of step, optimizer and memory; none: all

    def run(self, console: rich.console.Console) -> int:
        folder = self.results_dir or report.results_folder()
        stored = {name: report.read(folder / f"{name}.json") for name in report.choose(self.subjects, QUICK)}
        compared: list[Compared] = []
        for name in stored:
            now = QUICK[name].run()
            compared += compare(name, stored[name]["ratios"], now.ratios, self.tolerance)
            compared += compare(name, stored[name]["sizes"], now.sizes, 0.0)
        table = report.table("Stored and now; the less the better", "", "stored", "now", "change")
        for one in compared:
            if one.now is not None:
                table.add_row(one.name, _spell(one.stored), _spell(one.now), one.change)
        console.print(table)
        left_out = [one.name for one in compared if one.now is None]
        if left_out:
            say(console, f"stored, not measured again: {', '.join(left_out)}")
        elsewhere = [name for name, held in stored.items() if held["machine"] != report.machine()]
        if elsewhere:
            say(console, f"stored on another machine: {', '.join(elsewhere)}")
        losses = [one for one in compared if one.is_loss]
        for one in losses:
            say(console, f"LOSS {one.name}: {_spell(one.stored)} stored, {_spell(one.now)} now ({one.change})")
        return 1 if losses else 0


def _spell(figure):
    return "-" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.3f}"
