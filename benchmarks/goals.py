"""The goals of speed and size, and what the results files say of them: pictures, and the table of the docs page."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console

from benchmarks import report
from pats_jax.core import files
from pats_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: written by `python -m benchmarks plot` -->", "<!-- end of measured -->"
COLOURS = {"finetune": "#9aa5b1", "pats": "#0b6e99", "pats:all": "#f2a541", "torch": "#b1472f"}
SHAPES = ("minilm 32x64", "bert-base 8x128")

Found = dict[str, report.Stored]  # subject -> what its results file holds


@dataclasses.dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
      text: what is measured.
      subject: the results file.
      bound: largest value that is good.
      value: reads the value from the file; KeyError where it was not measured.
      form: format of values.
    """

    text: str
    subject: str
    bound: float
    value: Callable[[dict[str, Any]], float]
    form: str = ".2f"


def _ratio(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["ratios"][name]


def _figure(case: str, name: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["measured"][case][name]


def _state(variant: str) -> Callable[[dict[str, Any]], float]:
    """Bytes of state that PATS adds for each parameter with noise."""

    def value(results):
        figures = results["measured"][f"minilm {variant} state"]
        return figures["beyond_adamw_per_parameter"] / figures["noisy_share"]

    return value


def growth(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of models whose updates were measured in the same rounds, the smallest model first."""
    found = (figures for key, figures in results["measured"].items() if key.startswith("growth "))
    return sorted(found, key=lambda figures: figures["parameters"])


def _spread(results):
    """Largest over smallest of the time for each parameter that noise on all leaves adds to the update."""
    values = [figures["extra_seconds"] / figures["parameters"] for figures in growth(results)]
    return max(values) / min(values) if len(values) > 1 else float("nan")


GOALS = (
    *(Goal(f"AdamW's step here / torch's, {s}", "torch", 0.90, _ratio(f"{s} finetune")) for s in SHAPES),
    *(
        Goal(f"ModernBERT's forward and backward here / torch's, SDPA, {s}", "long", 1.0, _ratio(f"modernbert {s}"))
        for s in ("4x512", "1x2048")
    ),
    Goal("BART-base's step here / torch's, 8x(128+32)", "text2text", 0.95, _ratio("step 8x(128+32)")),
    *(
        Goal(f"BART-base writes 32 tokens, {beams} beams, seconds here / torch's", "text2text", 0.5, _ratio(name))
        for beams, name in ((beams, f"generate 8x128, {beams} beams, 32 tokens") for beams in (1, 4))
    ),
    *(Goal(f"PATS's step / AdamW's, default layers, {s}", "step", 1.02, _ratio(f"{s} pats"), ".3f") for s in SHAPES),
    *(Goal(f"the same with noise on all leaves, {s}", "step", 1.05, _ratio(f"{s} pats:all"), ".3f") for s in SHAPES),
    Goal("PATS's update alone / AdamW's, MiniLM, default layers", "optimizer", 1.30, _ratio("minilm pats"), ".3f"),
    Goal("the same with noise on all leaves", "optimizer", 1.65, _ratio("minilm pats:all"), ".3f"),
    Goal(
        "temporaries that PATS adds to the update, share of the parameters' bytes, default layers",
        *("memory", 0.01, _figure("minilm pats update", "temporaries_beyond_adamw_share"), ".2%"),
    ),
    Goal(
        "the same with noise on all leaves",
        *("memory", 0.01, _figure("minilm pats:all update", "temporaries_beyond_adamw_share"), ".2%"),
    ),
    Goal("state that PATS adds, bytes for each parameter with noise", "memory", 4.001, _state("pats:all"), ".3f"),
    Goal("the same in bfloat16", "memory", 2.001, _state("pats:all:bfloat16"), ".3f"),
    Goal("first step, cold cache, PATS / AdamW, MiniLM", "compile", 1.25, _ratio("minilm 32x64 pats cold")),
    Goal(
        "`pats-jax glue`, MiniLM, warm cache: start of the process to first step, s",
        *("compile", 8.0, _figure("pats-jax glue", "warm_seconds"), ".1f"),
    ),
    Goal("CoLA's epoch, bucketed / padded to 128", "pipeline", 0.30, _ratio("cola epoch bucketed / padded")),
    Goal(
        "time that the device waits for data, SST-2",
        *("pipeline", 0.01, _figure("sst2 waiting", "waiting_share"), ".2%"),
    ),
    Goal("second-order MAML's step / first-order's, MiniLM", "priming", 3.5, _ratio("minilm 16x64 maml")),
    Goal(
        "memory of a MAML step, BERT-base, 4 tasks of 16 rows in turn, GB",
        *(
            "priming",
            16.0,
            lambda results: results["measured"]["bert-base 16x64 maml in turn"]["total"] / 1e9,
            ".1f",
        ),
    ),
    Goal("step with LoRA / of the whole model, MiniLM", "step", 0.80, _ratio("minilm 32x64 finetune:lora")),
    Goal("PATS's extra time for each parameter, most / least of all sizes", "optimizer", 1.20, _spread),
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the results files of the CPU, and write the tables of goals and of devices into the docs page."""

    results_dir: pathlib.Path = report.RESULTS  # a folder for each kind of device, with JSON files
    images_dir: pathlib.Path = ROOT / "docs" / "images"  # where the pictures go
    page: pathlib.Path | None = ROOT / "docs" / "performance.md"  # whose part between two comments is written anew

    def run(self, console: rich.console.Console) -> int:
        from benchmarks import by_device

        folder = self.results_dir / "cpu"
        found = {p.stem: report.read(p) for p in sorted(folder.glob("*.json")) if _is_subject(p)}
        if not found:
            raise InputError(f"--results_dir: no results in {folder}; `python -m benchmarks all` writes them")
        drawn = draw_all(found, self.images_dir)
        table = goal_lines(found, GOALS, "python -m benchmarks {}")
        lines = [*table, "", *(f"![{path.stem}](images/{path.name})" for path in drawn), "", *where(found)]
        if self.page:
            write_between(self.page, lines, BEGIN, END)
        elsewhere = by_device.lines(self.results_dir)
        if self.page and elsewhere:
            write_between(self.page, elsewhere, by_device.BEGIN, by_device.END)
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return 0


def goal_lines(found: Mapping[str, Any], chosen: Sequence[Goal], source: str) -> list[str]:
    """A table of goals in Markdown; a dash where nothing was measured.

    Args:
      found: subject -> what its results file holds.
      chosen: the goals.
      source: with the subject in place of ``{}``, where a figure comes from.
    """
    lines = ["| | goal | measured | | from |", "| --- | ---: | ---: | --- | --- |"]
    for goal in chosen:
        try:
            value = goal.value(found[goal.subject])
        except KeyError:
            value = float("nan")
        measured, verdict = ("-", "") if value != value else (f"{value:{goal.form}}", _verdict(value, goal.bound))
        bound = f"{goal.bound:.0%}" if goal.form.endswith("%") else f"{goal.bound:.4g}"
        lines.append(f"| {goal.text} | {bound} | {measured} | {verdict} | `{source.format(goal.subject)}` |")
    return lines


def where(found: Found) -> list[str]:
    """On what each subject was measured."""
    lines: dict[str, list[str]] = {}
    for name, results in found.items():
        lines.setdefault(report.describe_machine(results["machine"], results["versions"]), []).append(name)
    return [f"Measured {machine} ({', '.join(names)})." for machine, names in lines.items()]


def write_between(page: pathlib.Path, lines: list[str], begin: str, end: str) -> None:
    """Replaces what a page has between two comments.

    Raises:
      InputError: if it has not both.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise InputError(f"--page {page}: has not both lines, {begin} and {end}")
    page.write_text(before + "\n".join([begin, "", *lines, "", end]) + after, encoding="utf-8")


def draw_all(found: Found, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what there is; returns the pictures."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in DRAWINGS.items():
        if name not in found:
            continue
        height = max(3.6, 0.19 * len(found[name]["ratios"]))  # inches; bars have names
        figure = Figure(figsize=(7.2, height), layout="constrained")
        if draw(figure.subplots(), found[name]):
            path = folder / f"performance_{name}.png"
            figure.savefig(path, dpi=120)
            drawn.append(path)
    return drawn


def _draw_ratios(title: str, base: str, log: bool = False) -> Callable[[Any, dict[str, Any]], bool]:
    """Draws the ratios of a subject as bars."""

    def draw(axes, results):
        ratios = results["ratios"]
        colours = [COLOURS.get(name.split(" ")[-1], "#5f8f6a") for name in ratios]
        bars = axes.barh(list(ratios), list(ratios.values()), color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.axvline(1, color="#333333", linewidth=1)
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.set(title=title, xlabel=base, xscale="log" if log else "linear")
        axes.margins(x=0.12)
        return bool(ratios)

    return draw


def _draw_growth(axes, results):
    """Time of an update by size of the model, AdamW and PATS on all leaves."""
    rows = growth(results)
    sizes = [row["parameters"] / 1e6 for row in rows]
    for variant, seconds, label in (
        ("finetune", "base_median_seconds", "AdamW"),
        ("pats:all", "median_seconds", "PATS, all leaves"),
    ):
        axes.loglog(sizes, [1e3 * row[seconds] for row in rows], "o-", color=COLOURS[variant], label=label)
    axes.set(title="Update alone by size of the model", xlabel="million parameters", ylabel="milliseconds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return bool(rows)


def _draw_state(axes, results):
    """Bytes of optimizer state for each parameter, by method."""
    rows = {key: f for key, f in results["measured"].items() if key.endswith(" state")}
    names = [key.removesuffix(" state").partition(" ")[2] for key in rows]
    bars = axes.barh(names, [figures["bytes_per_parameter"] for figures in rows.values()], color="#0b6e99")
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set(title="Optimizer state", xlabel="bytes for each parameter of the model")
    axes.margins(x=0.1)
    return bool(rows)


DRAWINGS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "torch": _draw_ratios("Training step here against Transformers with torch", "time of torch's step = 1"),
    "long": _draw_ratios("ModernBERT on long texts: loss and gradients", "time of torch, or of global layers = 1"),
    "text2text": _draw_ratios("BART: training step and generation", "time of torch = 1"),
    "step": _draw_ratios("Training step by method", "time of plain AdamW's step = 1"),
    "optimizer": _draw_growth,
    "memory": _draw_state,
    "compile": _draw_ratios("Trace, lower, compile", "plain AdamW = 1"),
    "priming": _draw_ratios("Upstream step by algorithm", "first-order MAML = 1"),
    "devices": _draw_ratios("Runners on virtual devices, the same global batch", "plain jit on one device = 1"),
    "random": _draw_ratios("11 million random numbers added to an array", "adding 1 = 1", log=True),
}


def _verdict(value, bound):
    return "reached" if value <= bound else "missed"


def _is_subject(path):
    found = files.read_json(path)
    return isinstance(found, dict) and "ratios" in found
