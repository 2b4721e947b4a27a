"""Tables of the docs page that set devices side by side, and the goals on a GPU, from ``results/DEVICE/*.json``."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import goals, report
from benchmarks.goals import Goal
from pats_jax.core import files

BEGIN, END = "<!-- by device: written by `python -m benchmarks plot` -->", "<!-- end of by device -->"
# Calls of benchmarks.on_device: other forms of the layers; XLA's own flags; the programs' flags; resumed runs.
FIRST, SECOND, THIRD, FOURTH = (f"h100/on_device_{number}" for number in range(1, 5))
H200 = "h200/on_device_1"
BEST = "stacked:unroll0"  # all layers without a loop

Held = dict[str, Any]  # what a file holds
Value = Callable[[Held], float]


def read_calls(results_dir: pathlib.Path) -> dict[str, Held]:
    """What was measured in the calls on GPUs, by ``DEVICE/CALL``; nothing where a file is missing."""
    paths = {name: results_dir / f"{name}.json" for name in (FIRST, SECOND, THIRD, FOURTH, H200)}
    if not all(path.is_file() for path in paths.values()):
        return {}
    return {name: files.read_json(path) for name, path in paths.items()}


def _figure(row: str, variant: str, name: str = "ms") -> Value:
    return lambda held: held["rows"][row]["variants"][variant][name]


def _step(variant: str) -> Value:
    return _figure("step", f"{variant}:{BEST}")


def _update(variant: str) -> Value:
    return _figure("update", f"{variant}:stacked")


def _to_torch(size: str = "") -> Value:
    return _figure("step", f"{size} finetune:{BEST}".strip(), "to_torch_compile")


def _in_lanes(method: str) -> Value:
    return _figure("lanes", f"lanes 8:{method}:{BEST}", "to_steps_of_one")


def _over(kind: Callable[[str], Value], variant: str) -> Value:
    return lambda held: kind(variant)(held) / kind("finetune")(held)


def _added(variant: str) -> Value:
    return lambda held: _step(variant)(held) - _step("finetune")(held)


def _seconds(row: str, name: str) -> Value:
    """Seconds of a program that ended well; KeyError otherwise."""

    def value(held):
        figures = held["rows"][row][name]
        if figures.get("exit", 0) != 0:
            raise KeyError(name)
        return figures["seconds"]

    return value


GOALS = (
    Goal("AdamW's step here / torch.compile's, BERT-base, 32 x 128", THIRD, 0.50, _to_torch()),
    Goal("the same, MiniLM, 32 x 64", SECOND, 0.50, _to_torch("minilm")),
    Goal("the same, BERT-large, 16 x 128", THIRD, 0.70, _to_torch("large")),
    Goal("what PATS adds to BERT-base's step, default layers, ms", THIRD, 0.5, _added("pats")),
    Goal("the same with noise on all leaves, ms", THIRD, 0.9, _added("pats:all")),
    Goal("AdamW's update alone / memory alone", FIRST, 1.25, _figure("update", "finetune:stacked", "to_memory")),
    Goal("the same of PATS with noise on all leaves", FIRST, 1.35, _figure("update", "pats:all:stacked", "to_memory")),
    Goal(
        "start of the process to the first loss, empty cache, BERT-base, AdamW, s",
        *(THIRD, 20.0, _seconds("cold", f"finetune:{BEST} empty cache"), ".1f"),
    ),
    Goal("the same, PATS, s", THIRD, 25.0, _seconds("cold", f"pats:{BEST} empty cache"), ".1f"),
    Goal(
        "`pats-jax glue`, MRPC, MiniLM, 3 epochs, empty cache, s", THIRD, 60.0, _seconds("glue", "empty cache"), ".1f"
    ),
    Goal("the same command again, s", THIRD, 25.0, _seconds("glue", "again"), ".1f"),
    Goal("a step of 8 trainings in lanes / 8 steps of one, MiniLM, 32 x 64 (H200)", H200, 0.35, _in_lanes("finetune")),
)

# Text; results file and ratio on CPU; results file and ratio on the H100.
SIDE_BY_SIDE: tuple[tuple[str, str, str, str, Value], ...] = (
    ("AdamW's step here / torch's, BERT-base", "torch", "bert-base 8x128 finetune", THIRD, _to_torch()),
    ("the same, MiniLM", "torch", "minilm 32x64 finetune", SECOND, _to_torch("minilm")),
    ("PATS's step / AdamW's, BERT-base", "step", "bert-base 8x128 pats", THIRD, _over(_step, "pats")),
    ("the same, noise on all leaves", "step", "bert-base 8x128 pats:all", THIRD, _over(_step, "pats:all")),
    ("PATS's update alone / AdamW's, BERT-base", "optimizer", "bert-base pats", FIRST, _over(_update, "pats")),
    ("the same, noise on all leaves", "optimizer", "bert-base pats:all", FIRST, _over(_update, "pats:all")),
)


def lines(results_dir: pathlib.Path) -> list[str]:
    """All of it in Markdown; nothing where there are no results of GPUs.

    Args:
      results_dir: holds a folder for each kind of device.
    """
    found = read_calls(results_dir)
    if not found:
        return []
    tables = {
        "Goals on one GPU, an H100 where no other is named (bfloat16):": goals.goal_lines(
            found, GOALS, "benchmarks/results/{}.json"
        ),
        "The same ratios on both devices:": _side_by_side(results_dir / "cpu", found),
        "The step with the programs' flags, third call (BERT-base unless another is named):": _steps(found[THIRD]),
        "The same after scores got a bfloat16 gradient, with further flags, fourth call:": _steps(found[FOURTH]),
        "The step with XLA's own flags, second call:": _steps(found[SECOND]),
        "The step, first call (BERT-base; the step then also measured the norms of parameters and update):": _steps(
            found[FIRST]
        ),
        "The update alone (BERT-base's 109 million parameters):": _updates(found[FIRST]),
        "Attention alone, forward and backward, 12 in a row, no dropout:": _attention(found[FIRST]),
        "BERT-base's AdamW step on 8 x 512 tokens without attention dropout, on one H200:": _in_model(found[H200]),
        "Sums in a fixed order, and as they come (BERT-base's AdamW step, without a loop):": _ordered(found[FIRST]),
        "`pats-jax glue --deterministic --method pats`, 60 steps of MRPC with MiniLM:": _resumed(found[FOURTH]),
        "A step of MiniLM on 32 x 64 tokens in lanes:": _lanes(found),
    }
    parts = [line for title, rows in tables.items() for line in (title, "", *rows, "")]
    return [*parts, _measured_on(found)]


def _side_by_side(cpu_folder: pathlib.Path, found: dict[str, Held]) -> Iterator[str]:
    yield "| | 2 CPU cores, float32 | one H100, bfloat16 |"
    yield "| --- | ---: | ---: |"
    for text, subject, name, file, value in SIDE_BY_SIDE:
        path = cpu_folder / f"{subject}.json"
        held = report.read(path)["ratios"].get(name) if path.exists() else None
        yield f"| {text} | {'-' if held is None else f'{held:.3f}'} | {value(found[file]):.3f} |"


def _steps(held: Held) -> Iterator[str]:
    yield "| | ms | / torch.compile | kernels | seconds to compile | temporaries, GB |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, one in held["rows"]["step"]["variants"].items():
        to_torch = one.get("to_torch_compile")
        texts = [f"{one['ms']:.2f}", f"{to_torch:.2f}" if to_torch else ""]
        if "kernels" in one:
            sizes = one["kernels"], one["compile_seconds"], one["temporary_bytes"] / 1e9
            texts += [f"{sizes[0]:,}", f"{sizes[1]:.0f}", f"{sizes[2]:.2f}"]
        else:
            texts += ["", "", ""]
        yield f"| {name} | {' | '.join(texts)} |"


def _updates(held: Held) -> Iterator[str]:
    yield "| | ms | bytes that it must move, GB | / memory alone | kernels |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, one in held["rows"]["update"]["variants"].items():
        kernels = one.get("kernels", "")
        yield f"| {name} | {one['ms']:.2f} | {one['bytes'] / 1e9:.2f} | {one['to_memory']:.2f} | {kernels} |"


def _attention(held: Held) -> Iterator[str]:
    yield "| rows x tokens x heads x width | einsum, ms | cuDNN with a mask | cuDNN with lengths |"
    yield "| --- | ---: | ---: | ---: |"
    measured = held["rows"]["attention"]["variants"]
    for shape in dict.fromkeys(name.partition(" ")[0] for name in measured):
        figures = [f"{measured[f'{shape} {way}']['ms']:.2f}" for way in ("einsum", "cudnn", "cudnn-lengths")]
        yield f"| {shape} | {' | '.join(figures)} |"


def _ordered(held: Held) -> Iterator[str]:
    yield "| | ms a step | equal bits | kernels |"
    yield "| --- | ---: | --- | ---: |"
    for name, one in held["rows"]["deterministic"]["variants"].items():
        yield f"| {name} | {one['ms']:.2f} | {'yes' if one['equal_bits'] else 'no'} | {one['kernels']:,} |"


def _in_model(held: Held) -> Iterator[str]:
    yield "| attention | ms a step | kernels | temporaries, GB |"
    yield "| --- | ---: | ---: | ---: |"
    for name, one in held["rows"]["attention_in_model"]["variants"].items():
        way = name.rpartition(":")[2]
        yield f"| {way} | {one['ms']:.2f} | {one['kernels']:,} | {one['temporary_bytes'] / 1e9:.2f} |"


def _resumed(held: Held) -> Iterator[str]:
    row = held["rows"]["resumed"]
    yield "| | the weights have the bits of the first run |"
    yield "| --- | --- |"
    names = {"again": "the same command again", "killed": "killed after the checkpoint of step 30, then resumed"}
    for name, text in names.items():
        yield f"| {text} | {'yes' if row['equal_bits'][name] else 'no'} |"


def _lanes(found: dict[str, Held]) -> Iterator[str]:
    yield "| device | | ms | / as many steps of one | kernels |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for held in (found[THIRD], found[H200]):
        for name, one in held["rows"]["lanes"]["variants"].items():
            ratio = f"{one['to_steps_of_one']:.2f}" if one.get("to_steps_of_one") else ""
            yield f"| {held['device']} | {name} | {one['ms']:.2f} | {ratio} | {one['kernels']:,} |"


def _measured_on(found: dict[str, Held]) -> str:
    versions: dict[str, str] = {}
    for held in found.values():
        versions |= held["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    devices, dates = ({held[name] for held in found.values()} for name in ("device", "date"))
    return f"Measured on one {', '.join(sorted(devices))}, {', '.join(sorted(dates))}; {packages}."
