"""``python -m benchmarks tpu``: the training step compiled for slices of a TPU that is not there.

libtpu compiles for a described slice on any machine (`jax.experimental.topologies`); nothing runs. Each cell is a
training step. The form that the programs take by default on a TPU gives the seconds of the compilation and the memory
of a chip. XLA counts the body of a loop once, so operations and bytes are those of the same step with its layers
unrolled, without a loop.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import tyro

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.memory import figures_of
from pats_jax import models
from pats_jax.errors import InputError
from pats_jax.models.config import EncoderConfig
from pats_jax.reporting.console import say
from pats_jax.training import runners

GB = 1e9
CHIP_MEMORY = {"v5e": 16e9, "v5p": 95e9}  # bytes
ROBERTA_LARGE = EncoderConfig(
    model_type="roberta",
    vocab_size=50265,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    pad_token_id=1,
)

# libtpu neither asks a TPU machine's services what it runs on nor keeps other processes from loading it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training step and the slice that it is compiled for.

    Attributes:
      name: what the results call it.
      method: METHOD[:CHANGE...], as in `cases.settings_of`.
      model: a name of `cases.SIZES`, or "roberta-large".
      topology: the slice, as libtpu names it.
      parallel: the runner, "jit" or "pmap".
      fsdp: devices that one copy of the state is spread over.
    """

    name: str
    method: str
    model: str = "bert-base"
    topology: str = "v5e:2x4"
    parallel: str = "jit"
    fsdp: int = 1

    @property
    def chip_memory(self) -> float:
        """Bytes that a chip has."""
        return CHIP_MEMORY[self.topology.partition(":")[0]]


ADAMW, PATS_ALL = "adamw", "pats-all"
CELLS = (
    Cell(ADAMW, "finetune"),
    Cell("pats", "pats"),
    Cell(PATS_ALL, "pats:all"),
    Cell("pmap", "pats", parallel="pmap"),
    Cell("fsdp", "pats", fsdp=2),
    Cell("roberta-large", "pats", model="roberta-large"),
    Cell("dps-dense", "dps-dense"),
    Cell("v5p", "pats", topology="v5p:2x2x1"),
)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Compile the training step for slices of a TPU; nothing runs. Needs libtpu: pip install '.[tpu]'.

    Writes memory a chip, operations, bytes accessed and seconds of compilation. Exit code 1 where a step does not
    compile or does not fit in a chip's memory.
    """

    cells: tuple[str, ...] = ()  # which of them; none: all
    rows: int = 256  # of the global batch
    length: int = 128  # tokens of a row
    unrolled: bool = True  # compile the unrolled form as well, for operations and bytes
    output_file: pathlib.Path = report.RESULTS / "v5e" / "compiled.json"
    add: bool = False  # keep what the file holds of other cells

    def run(self, console: rich.console.Console) -> int:
        known = {cell.name: cell for cell in CELLS}
        for name in self.cells:
            if name not in known:
                raise InputError(f"--cells {name}: none of {', '.join(known)}")
        chosen = [cell for cell in CELLS if not self.cells or cell.name in self.cells]
        found = {}
        for cell in chosen:
            found[cell.name] = compile_in_new_process(cell, self.rows, self.length, self.unrolled)
            say(console, f"{cell.name}: {spell(found[cell.name])}")
        results = report.Results(measured=found, ratios=ratios(found), tables=[table(found)])
        report.finish("tpu", results, self.output_file, self.add, console)
        failed = failures(found)
        for line in failed:
            say(console, f"FAILED {line}")
        return 1 if failed else 0


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each cell that did not compile, or needs more memory than its chip has."""
    lines = []
    for name, figures in found.items():
        if "error" in figures:
            lines.append(f"{name}: {figures['error']}")
        elif figures["memory"]["total"] > figures["chip_memory"]:
            needed, there = figures["memory"]["total"] / GB, figures["chip_memory"] / GB
            lines.append(f"{name}: needs {needed:.2f} GB of a chip's {there:.0f} GB")
    return lines


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of compilation over those of AdamW's step, where both have compiled."""
    seconds = {name: total_seconds(figures) for name, figures in found.items() if "error" not in figures}
    return {f"{name} compile": value / seconds[ADAMW] for name, value in seconds.items() if ADAMW in seconds}


def total_seconds(figures: dict[str, Any]) -> float:
    """Seconds to trace and lower the default form, and to compile it."""
    return sum(figures["seconds"].values())


def table(found: dict[str, dict[str, Any]]) -> Any:
    """The cells for reading."""
    made = report.table(
        "A chip's share of a training step, GB and 10^12 operations, and seconds of compilation",
        *("step", "compile", "arguments", "outputs of their own", "temporaries", "of memory"),
        *("unrolled: temporaries", "bytes accessed", "operations"),
    )
    for name, figures in found.items():
        made.add_row(name, *columns(figures))
    return made


def columns(figures: dict[str, Any]) -> list[str]:
    """A cell's figures as `table` and the docs have them."""
    if "error" in figures:
        return ["failed", *[""] * 7]
    memory, unrolled = figures["memory"], figures.get("unrolled")
    held = [memory["arguments"], memory["results"] - memory["aliased"], memory["temporaries"]]
    share = memory["total"] / figures["chip_memory"]
    row = [f"{total_seconds(figures):.0f}", *(f"{one / GB:.2f}" for one in held), f"{share:.0%}"]
    if not unrolled:
        return [*row, "", "", ""]
    counted = [unrolled["memory"]["temporaries"] / GB, unrolled["bytes_accessed"] / GB, unrolled["operations"] / 1e12]
    return row + [f"{one:.2f}" for one in counted]


def spell(figures: dict[str, Any]) -> str:
    """A cell in a few words, while the others are being compiled."""
    if "error" in figures:
        return "failed"
    return f"compiled in {total_seconds(figures):.0f} s, {figures['memory']['total'] / GB:.2f} GB a chip"


def compile_in_new_process(cell: Cell, rows: int, length: int, unrolled: bool) -> dict[str, Any]:
    """What `compile_cell` prints, or its error: XLA may end the whole process."""
    command = [sys.executable, "-m", "benchmarks.tpu", "--cell", cell.name, "--rows", str(rows)]
    command += ["--length", str(length), "--unrolled" if unrolled else "--no_unrolled"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    with contextlib.suppress(IndexError, ValueError):
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"error": (lines or [f"ended with exit code {done.returncode}"])[-1]}


def compile_cell(cell: str, rows: int, length: int, unrolled: bool) -> None:
    """Prints a cell's figures as JSON.

    Args:
      cell: its name.
      rows: of the global batch.
      length: tokens of a row.
      unrolled: whether to compile it without loops, too.
    """
    chosen = next(one for one in CELLS if one.name == cell)
    case = Case(chosen.model, rows, length)
    layers, unroll = runners.default_form("tpu")
    try:
        devices = described_devices(chosen.topology)
        compiled, seconds = compile_step(chosen, case, devices, layers, unroll)
        figures: dict[str, Any] = dataclasses.asdict(chosen) | {
            "rows": rows,
            "length": length,
            "chips": len(devices),
            "chip_memory": chosen.chip_memory,
            "layers": layers,
            "unroll": unroll,
            "seconds": seconds,
            "load": os.getloadavg()[0],
            "memory": figures_of(compiled),
        }
        if unrolled:
            compiled, seconds = compile_step(chosen, case, devices, layers, 0)
            costs: Any = compiled.cost_analysis()
            figures["unrolled"] = {
                "operations": costs["flops"],
                "bytes_accessed": costs["bytes accessed"],
                "memory": figures_of(compiled),
                "seconds": seconds,
            }
    except (jax.errors.JaxRuntimeError, InputError) as error:
        figures = {"error": str(error).strip().splitlines()[0]}
    print(json.dumps(figures))


def described_devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a slice that libtpu knows by name.

    Raises:
      InputError: if there is no libtpu.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except ImportError:
        raise InputError("libtpu is missing: pip install '.[tpu]'") from None


def compile_step(
    cell: Cell, case: Case, devices: Sequence[jax.Device], layers: str, unroll: int
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """A cell's step, compiled for devices, and the seconds of each part of that."""
    config = ROBERTA_LARGE if case.model == "roberta-large" else cases.config_of_size(case.model)
    model = models.SequenceClassifier(config, dtype=jnp.bfloat16, layers=layers, unroll=unroll)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    batch = cases.random_batch(config.vocab_size, case.rows, case.length)
    training = cases.Training(model, params, cases.settings_of(cell.method), 1000, batch)
    runner = runners.make_runner(cell.parallel, fsdp=cell.fsdp, devices=devices)
    state = runner.state_shapes(lambda params: training.create(params), params)
    times = [time.perf_counter()]
    lowered = runner.jit_step(training.step_of(runner), state).lower(state, runner.batch_shapes(batch))
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    return compiled, {"lower": times[1] - times[0], "compile": times[2] - times[1]}


if __name__ == "__main__":
    tyro.cli(compile_cell, use_underscores=True)
