"""``python -m benchmarks tpu``: the training step compiled for slices of a TPU that is not there.

libtpu compiles for a described slice on any machine (`jax.experimental.topologies`); nothing runs. Each cell is a
training step. The form that the programs take by default on a TPU gives the seconds of the compilation and the memory
of a chip. XLA counts the body of a loop once, so operations and bytes are those of the same step with its layers
unrolled, without a loop.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import tyro

from benchmarks import cases, goals, report
from benchmarks.cases import Case
from benchmarks.memory import figures_of
from pats_jax import models
from pats_jax.errors import InputError
from pats_jax.models.config import EncoderConfig
from pats_jax.models.layers import Layout
from pats_jax.reporting.console import say
from pats_jax.training import runners

BEGIN, END = "<!-- compiled: written by `make tpu` -->", "<!-- end of compiled -->"
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

    Writes memory a chip and seconds of compilation; for some, without a loop, operations and bytes. Exit code 1 where a
    step does not compile or does not fit in a chip's memory.
    """

    cells: tuple[str, ...] = ()  # which of them; none: all
    unrolled: tuple[str, ...] = (ADAMW, "pats", PATS_ALL)  # of these also without a loop: five minutes each
    rows: int = 256  # of the global batch
    length: int = 128  # tokens of a row
    jobs: int = 2  # unrolled cells at a time; the others are compiled one at a time, as their seconds count
    output_file: pathlib.Path = report.RESULTS / "v5e" / "compiled.json"
    add: bool = False  # keep what the file holds of other cells
    page: pathlib.Path | None = None  # whose part between two comments is written anew, from all that the file holds

    def run(self, console: rich.console.Console) -> int:
        jax.config.update("jax_platforms", "cpu")  # of this process: libtpu would look for chips here
        chosen = choose_cells("--cells", self.cells) if self.cells else CELLS
        found = {}
        for cell in chosen:
            found[cell.name] = compile_in_new_process(cell, self.rows, self.length, None)
            say(console, f"{cell.name}: {spell(found[cell.name])}")
        again = [
            cell for cell in choose_cells("--unrolled", self.unrolled) if "error" not in found.get(cell.name, EMPTY)
        ]
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as threads:
            counted = threads.map(lambda cell: compile_in_new_process(cell, self.rows, self.length, 0), again)
            for cell, figures in zip(again, counted, strict=True):
                found[cell.name] |= {"error": figures["error"]} if "error" in figures else {"unrolled": figures}
                say(console, f"{cell.name}, unrolled: {spell(figures)}")
        results = report.Results(measured=found, ratios=ratios(found), tables=[table(found)], versions=libtpu_version())
        report.finish("tpu", results, self.output_file, self.add, console)
        if self.page:
            held = report.read(self.output_file)
            where = f"Compiled {report.describe_machine(held['machine'], held['versions'])}."
            goals.write_between(self.page, [*markdown(held["measured"]), "", where], BEGIN, END)
        failed = failures(found)
        for line in failed:
            say(console, f"FAILED {line}")
        return 1 if failed else 0


def libtpu_version() -> dict[str, str]:
    """The version of libtpu, where it is installed."""
    found = importlib.util.find_spec("libtpu")
    return {"libtpu": importlib.metadata.version("libtpu")} if found else {}


EMPTY = {"error": "not chosen"}


def choose_cells(flag: str, names: Sequence[str]) -> list[Cell]:
    """The cells of some names.

    Raises:
      InputError: if there is none of a name.
    """
    known = {cell.name: cell for cell in CELLS}
    for name in names:
        if name not in known:
            raise InputError(f"{flag} {name}: none of {', '.join(known)}")
    return [known[name] for name in names]


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each cell that did not compile, or needs more memory than its chip has."""
    lines = []
    for name, figures in found.items():
        if "error" in figures:
            lines.append(f"{name}: {figures['error']}")
        elif needed(figures) > figures["chip_memory"]:
            there = figures["chip_memory"] / GB
            lines.append(f"{name}: needs {needed(figures) / GB:.2f} GB of a chip's {there:.0f} GB")
    return lines


def needed(figures: dict[str, Any]) -> int:
    """Bytes of a chip's memory that a step takes, its program included."""
    return figures["memory"]["total"] + figures["memory"]["generated_code"]


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of compilation over those of AdamW's step, where both have compiled."""
    seconds = {name: figures["cpu_seconds"]["compile"] for name, figures in found.items() if "error" not in figures}
    return {f"{name} compile": value / seconds[ADAMW] for name, value in seconds.items() if ADAMW in seconds}


COLUMNS = (
    *(
        "step",
        "lower, s",
        "compile, s",
        "compile, CPU s",
        "arguments, GB",
        "temporaries, GB",
        "in all, GB",
        "of a chip",
    ),
    *("unrolled: temporaries, GB", "bytes accessed, GB", "of them HBM, GB", "operations, 10^12"),
)


def table(found: dict[str, dict[str, Any]]) -> Any:
    """The cells for reading."""
    made = report.table("A chip's share of a training step", *COLUMNS)
    for row in rows_of(found):
        made.add_row(*row)
    return made


def markdown(found: dict[str, dict[str, Any]]) -> list[str]:
    """The same as lines of a docs page."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows_of(found)]
    return [f"| {' | '.join(line)} |" for line in lines]


def rows_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The texts of the table's rows."""
    return [[name, *_columns(figures)] for name, figures in found.items()]


def _columns(figures):
    if "error" in figures:
        return ["failed", *[""] * (len(COLUMNS) - 2)]
    memory, unrolled = figures["memory"], figures.get("unrolled")
    times = [figures["seconds"]["lower"], figures["seconds"]["compile"], figures["cpu_seconds"]["compile"]]
    held = [one / GB for one in (memory["arguments"], memory["temporaries"], needed(figures))]
    row = [*(f"{one:.0f}" for one in times), *(f"{one:.2f}" for one in held)]
    row.append(f"{needed(figures) / figures['chip_memory']:.0%}")
    if not unrolled:
        return row + [""] * 4
    counted = [unrolled["memory"]["temporaries"], unrolled["bytes_accessed"], unrolled["hbm_bytes"]]
    return row + [f"{one / GB:.2f}" for one in counted] + [f"{unrolled['operations'] / 1e12:.2f}"]


def spell(figures: dict[str, Any]) -> str:
    """A cell in a few words, while the others are being compiled."""
    if "error" in figures:
        return f"failed: {figures['error']}"
    return f"compiled in {figures['seconds']['compile']:.0f} s, {needed(figures) / GB:.2f} GB a chip"


WORKER = (sys.executable, "-m", "benchmarks.tpu")


def compile_in_new_process(cell: Cell, rows: int, length: int, unroll: int | None) -> dict[str, Any]:
    """What `compile_cell` prints, or its error: XLA may end the whole process."""
    command = [*WORKER, "--cell", cell.name, "--rows", str(rows), "--length", str(length)]
    command += [] if unroll is None else ["--unroll", str(unroll)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return {"error": f"{ended}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"}


def compile_cell(cell: str, rows: int, length: int, unroll: int | None = None) -> None:
    """Prints a cell's figures as JSON.

    Args:
      cell: its name.
      rows: of the global batch.
      length: tokens of a row.
      unroll: layers in an iteration, 0: all; none: what the programs take on a TPU.
    """
    (chosen,) = choose_cells("--cell", [cell])
    layers, default = runners.default_form("tpu")
    try:
        devices = described_devices(chosen.topology)
        figures = figures_of_step(
            chosen, Case(chosen.model, rows, length), devices, layers, default if unroll is None else unroll
        )
    except (jax.errors.JaxRuntimeError, InputError) as error:
        figures = {"error": str(error).strip().splitlines()[0]}
    print(json.dumps(figures))


def figures_of_step(
    cell: Cell, case: Case, devices: Sequence[jax.Device], layers: Layout, unroll: int
) -> dict[str, Any]:
    """What XLA says of a cell's step, of one chip, and the seconds that it took."""
    compiled, seconds, cpu_seconds = compile_step(cell, case, devices, layers, unroll)
    costs: Any = compiled.cost_analysis()
    counted = {
        "operations": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "hbm_bytes": hbm_bytes(compiled.as_text() or ""),
    }
    return {
        **dataclasses.asdict(cell),
        **{"rows": case.rows, "length": case.length, "layers": layers, "unroll": unroll},
        **{"chips": len(devices), "chip_memory": cell.chip_memory, "load": os.getloadavg()[0]},
        **{"seconds": seconds, "cpu_seconds": cpu_seconds, "memory": figures_of(compiled)},
        **(counted if unroll == 0 else {}),
    }


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
    cell: Cell, case: Case, devices: Sequence[jax.Device], layers: Layout, unroll: int
) -> tuple[jax.stages.Compiled, dict[str, float], dict[str, float]]:
    """A cell's step, compiled for devices, and the seconds of that by the clock and of CPU time in all threads."""
    config = ROBERTA_LARGE if case.model == "roberta-large" else cases.config_of_size(case.model)
    model = models.SequenceClassifier(config, dtype=jnp.bfloat16, layers=layers, unroll=unroll)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    batch = cases.random_batch(config.vocab_size, case.rows, case.length)
    training = cases.Training(model, params, cases.settings_of(cell.method), 1000, batch)
    runner = runners.make_runner(cell.parallel, fsdp=cell.fsdp, devices=devices)
    state = runner.state_shapes(lambda params: training.create(params), params)
    clocks = [(time.perf_counter(), time.process_time())]
    lowered = runner.jit_step(training.step_of(runner), state).lower(state, runner.batch_shapes(batch))
    clocks.append((time.perf_counter(), time.process_time()))
    compiled = lowered.compile()
    clocks.append((time.perf_counter(), time.process_time()))
    (lower, lower_cpu), (compile_, compile_cpu) = np.diff(clocks, axis=0).tolist()
    return compiled, {"lower": lower, "compile": compile_}, {"lower": lower_cpu, "compile": compile_cpu}


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_ARRAY = re.compile(rf"\b({'|'.join(_SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_MOVES_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def hbm_bytes(text: str) -> int:
    """Bytes that an optimised program without loops moves between HBM and a chip, at most.

    XLA's "bytes accessed" also counts what instructions read and write in the chip's own memory, whose arrays have
    ``S(1)`` in their layout. Here those count nothing, and a copy between the two memories counts once. An instruction
    that reads a part of an array counts with the whole.

    Args:
      text: the program, as `jax.stages.Compiled.as_text` gives it.
    """
    shapes: dict[str, str] = {}
    total = 0
    for line in text[text.find("\nENTRY") :].splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, operation, rest = found.groups()
        shapes[name] = shape
        if operation in _MOVES_NOTHING or operation.endswith("-done") or "AllocateBuffer" in rest:
            continue
        if operation in ("copy-start", "slice-start"):
            arrays = [array[0] for array in _arrays(shape)]
            total += arrays[0 if operation == "copy-start" else 1]
            continue
        operands = re.findall(r"%[\w.\-]+", rest.partition("), ")[0])
        texts = [shape, *(shapes.get(operand, "") for operand in operands)]
        total += sum(size for one in texts for size, on_chip in _arrays(one) if not on_chip)
    return total


def _arrays(shape):
    """Bytes of every array of a shape, and whether it lies in the chip's own memory."""
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        size = math.prod(int(one) for one in dimensions.split(",") if one)
        yield size * _SIZES[dtype], "S(" in layout


if __name__ == "__main__":
    tyro.cli(compile_cell, use_underscores=True)
