"""``python -m benchmarks.on_device``: what an accelerator does, row by row, in a few minutes without network.

Each row is one thing to measure, the most important first; a row starts only while its time is left. After each row,
and within long ones, everything measured so far is in ``on_device.json``. Processes prepare (load, compile, warm up) at
the same time and are then timed one after the other, while the others wait; in a cold, glue, resumed or tests row,
nothing else runs. XLA has the flags that the programs set, unless XLA_FLAGS or ``--xla`` say otherwise.
``benchmarks/on_device.sh`` installs what a bare CUDA image lacks and calls this.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import tyro

from benchmarks.names import without_folders

FORMS = ("separate", "stacked", "stacked:unroll2", "stacked:unroll4", "stacked:unroll12")
SMALLEST = {"base": "bert-tiny:4x16", "large": "bert-tiny:2x16", "minilm": "bert-tiny:4x8"}  # of a rehearsal
WORKER = (sys.executable, "-m", "benchmarks.device_worker")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure on an accelerator within a time budget."""

    out: pathlib.Path  # folder of on_device.json and log.txt
    carried: pathlib.Path  # folder with minilm (a checkpoint) and glue (TSV folders)
    rows: tuple[str, ...] = ()  # which rows, in this order; none: all of them
    budget: float = 230.0  # seconds for everything
    forms: tuple[str, ...] = FORMS  # of our model in the rows step and update: CHANGE[:CHANGE...]
    methods: tuple[str, ...] = ("finetune", "pats", "pats:all")  # METHOD[:CHANGE...] in the rows step and update
    best: str | None = None  # form of our model in the other rows; none: the fastest of row step, else the first form
    xla: tuple[str, ...] = ()  # NAME=XLA_FLAGS: rows step and cold also time plain fine-tuning with these flags
    also: tuple[str, ...] = ()  # sizes of row models to time with row step, plain fine-tuning in its first form
    lanes: tuple[int, ...] = (8,)  # numbers of trainings side by side in row lanes
    torch_ways: tuple[str, ...] = ("eager", "compile")  # also compile:reduce-overhead, compile:max-autotune
    dtype: str = "bfloat16"  # of computation, on both sides
    steps: int = 20  # steps without waiting in between
    repeats: int = 3  # times that so many steps are timed, in each of two rounds
    prepare: float = 110.0  # seconds after which processes that are still preparing are dropped
    profiles: int = 2  # variants of row step that are profiled
    once: bool = False  # rows cold and glue with the empty cache only
    rehearse: bool = False  # tiny models, on CPU


class Worker:
    """A `device_worker` process, its lines read in a thread."""

    def __init__(self, name: str, words: Sequence[str], log: TextIO, env: dict[str, str]):
        self.name = name
        self._lines: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            [*WORKER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
            process_group=0,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def next_line(self, timeout: float) -> dict[str, Any] | None:
        """What the process says next; None if it says nothing in time or has ended."""
        try:
            line = self._lines.get(timeout=max(timeout, 0.01))
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def ask(self, command: str, timeout: float = 60.0) -> dict[str, Any]:
        """The answer to a line."""
        try:
            self._process.stdin.write(command + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            return {"error": "the process has ended"}
        return self.next_line(timeout) or {"error": f"no answer in {timeout:.0f} s"}

    def close(self) -> None:
        """Ends the process and those that it started."""
        end_group(self._process)


def end_group(process: subprocess.Popen) -> None:
    """Kills a process that leads a group of its own, and the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Session:
    """One call: its flags, what has been measured, and the time that is left."""

    def __init__(self, flags: Flags):
        self.flags, self._deadline = flags, time.monotonic() + flags.budget
        words = map(without_folders, sys.argv[1:])
        self.found: dict[str, Any] = {
            "device": None,
            "versions": {},
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "-m", "benchmarks.on_device", *words]),
            "rows": {},
        }
        flags.out.mkdir(parents=True, exist_ok=True)
        self.log = (flags.out / "log.txt").open("a")
        self.env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
        self.env |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "8"}
        self.env.pop("JAX_COMPILATION_CACHE_DIR", None)
        if flags.rehearse:
            self.env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._deadline - time.monotonic()

    def save(self) -> None:
        """Writes everything measured so far."""
        target = self.flags.out / "on_device.json"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        temporary.replace(target)

    def case(self, size: str) -> str:
        """MODEL:ROWSxLENGTH of "base", "large" or "minilm"."""
        if self.flags.rehearse:
            return SMALLEST[size]
        minilm = f"{self.flags.carried.resolve() / 'minilm'}:32x64"
        return {"base": "bert-base:32x128", "large": "bert-large:16x128", "minilm": minilm}[size]

    def best_form(self) -> str:
        """The form of our model for the rows that measure one form only."""
        variants = self.found["rows"].get("step", {}).get("variants", {})
        measured = {
            name: found["ms"] for name, found in variants.items() if name.startswith("finetune:") and "ms" in found
        }
        fastest = min(measured, key=lambda name: measured[name], default="").partition(":")[2]
        return self.flags.best or fastest or self.flags.forms[0]

    @contextlib.contextmanager
    def workers(
        self, asked: dict[str, Sequence[str]], more_env: dict[str, dict[str, str]] | None = None
    ) -> Iterator[tuple[dict[str, Worker], dict[str, Any]]]:
        """Processes that have prepared, by name, and what each said; those too late, or that failed, are no more."""
        until = time.monotonic() + min(self.flags.prepare, self.left() - 10)
        started = {
            name: Worker(name, words, self.log, self.env | (more_env or {}).get(name, {}))
            for name, words in asked.items()
        }
        try:
            said = self._wait(started, until)
            for name in started.keys() - said.keys():
                started[name].close()
                said[name] = {"error": "not ready in time, or ended; see log.txt"}
            for one in said.values():
                self.found["device"] = one.pop("device", self.found["device"])
                self.found["versions"] |= one.pop("versions", {})
            yield {name: started[name] for name in said if "variants" in said[name]}, said
        finally:
            for worker in started.values():
                worker.close()

    def _wait(self, started: dict[str, Worker], until: float) -> dict[str, dict[str, Any]]:
        """What the processes say that have prepared by a time; where none of a side has, until one of it has."""
        said: dict[str, dict[str, Any]] = {}
        coming = dict(started)
        while coming and self.left() > 15:
            sides = {name[:3] for name in coming} - {name[:3] for name in said}
            if time.monotonic() > until and not sides:
                break
            for name, worker in list(coming.items()):
                line = worker.next_line(0.1)
                if line is not None:
                    said[name] = line
                if line is not None or worker.ended():
                    del coming[name]
        return {name: said[name] for name in started if name in said}

    def command(self, words: Sequence[str], timeout: float, env: dict[str, str]) -> tuple[float, int | None, str]:
        """Seconds of a program, its exit code (None: it was killed at its limit) and its standard output."""
        started = time.monotonic()
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env, process_group=0)
        try:
            output, _ = process.communicate(timeout=max(1.0, min(timeout, self.left())))
        except subprocess.TimeoutExpired:
            return time.monotonic() - started, None, ""
        finally:
            end_group(process)
        return time.monotonic() - started, process.returncode, output


def race(session: Session, row: dict[str, Any], asked: dict[str, Sequence[str]], **more: Any) -> None:
    """Prepares processes together and times all their variants in turns, in two rounds; figures go into row.

    Args:
      session: the call.
      row: gets ``variants``: by name, what preparing showed and the milliseconds a step.
      asked: name of a process -> words of `device_worker`.
      **more: see `Session.workers`; and ``then``, called with row and the processes before they end.
    """
    flags, then = session.flags, more.pop("then", None)
    with session.workers(asked, **more) as (ready, said):
        row["processes"] = {name: {k: v for k, v in one.items() if k != "variants"} for name, one in said.items()}
        variants = row["variants"] = {}
        names = {}
        for process in ready:
            for variant, figures in said[process]["variants"].items():
                name = f"{process.partition(' ')[2]} {variant}".strip()
                name = f"torch {name}" if process.startswith("torch") else name
                variants[name] = figures
                if "error" not in figures:
                    names[name] = process, variant
        for _ in range(2):
            for name, (process, variant) in names.items():
                if session.left() < 5:
                    break
                answer = ready[process].ask(f"time {variant} {flags.steps} {flags.repeats}", min(60.0, session.left()))
                if "error" in answer:
                    variants[name]["error"] = answer["error"]
                    continue
                variants[name].setdefault("step_seconds", []).append(answer["seconds"])
                variants[name]["ms"] = 1e3 * statistics.median(sum(variants[name]["step_seconds"], []))
            session.save()
        if then:
            then(row, {name: (ready[process], variant) for name, (process, variant) in names.items()})


def _ratios(row: dict[str, Any], base: str) -> None:
    """Adds each variant's ratio to a base, where both were measured."""
    against = row["variants"].get(base, {}).get("ms")
    for figures in row["variants"].values():
        if against and "ms" in figures:
            figures["to_torch_compile"] = figures["ms"] / against


def _of_size(row, size):
    """The part of a row that is of one size of `Session.case`."""
    return {"variants": {name: figures for name, figures in row["variants"].items() if size in name.split()}}


def _without_sizes(row, sizes):
    """The part of a row that is of none of these sizes."""
    found = {name: figures for name, figures in row["variants"].items() if not {*sizes} & {*name.split()}}
    return {"variants": found}


def _torch_way(flags: Flags) -> str:
    return next((way for way in flags.torch_ways if way.startswith("compile")), "eager")


def step(session: Session, row: dict[str, Any]) -> None:
    """The training step of BERT-base, ours in all forms and torch's; then a profile of the fastest."""
    flags, case = session.flags, session.case("base")
    asked = {"torch": ("torch", case, flags.dtype, *flags.torch_ways)} if flags.torch_ways else {}
    for form in flags.forms:
        variants = [f"{method}:{form}" for method in flags.methods]
        if form.startswith("separate"):  # takes longest to compile: what is too late shall not take others with it
            asked |= {f"jax-{variant}": ("step", case, flags.dtype, variant) for variant in variants}
        else:
            asked[f"jax-{form}"] = ("step", case, flags.dtype, *variants)

    for size in flags.also:
        asked[f"torch {size}"] = ("torch", session.case(size), flags.dtype, _torch_way(flags))
        asked[f"jax {size}"] = ("step", session.case(size), flags.dtype, f"finetune:{flags.forms[0]}")
    more_env = {}
    for way in flags.xla:
        name, _, xla_flags = way.partition("=")
        asked[f"jax {name}"] = ("step", case, flags.dtype, f"finetune:{flags.forms[0]}")
        more_env[f"jax {name}"] = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()}

    def profile(row, ready):
        for size in flags.also:
            _ratios(_of_size(row, size), f"torch {size} {_torch_way(flags)}")
        _ratios(_without_sizes(row, flags.also), f"torch {_torch_way(flags)}")
        session.save()
        ours = sorted((name for name in ready if "ms" in row["variants"][name]), key=lambda n: row["variants"][n]["ms"])
        plain = [name for name in ours if name.startswith("finetune")]
        noisy = [name for name in ours if name.startswith("pats:all")]
        row["profiles"] = {}
        for name in (plain[:1] + noisy[:1] + plain[1:])[: flags.profiles]:
            if session.left() > 20:
                worker, variant = ready[name]
                row["profiles"][name] = worker.ask(f"profile {variant} 5", min(60.0, session.left()))
                session.save()

    race(session, row, asked, more_env=more_env, then=profile)


def update(session: Session, row: dict[str, Any]) -> None:
    """The update alone, for separate and stacked parameters, and the copy bandwidth of the device."""
    flags = session.flags
    layouts = dict.fromkeys(form.partition(":")[0] for form in flags.forms)
    variants = [f"{method}:{layout}" for layout in layouts for method in flags.methods]
    race(session, row, {"jax": ("update", session.case("base"), flags.dtype, "copy", *variants)})
    copy = row["variants"].get("copy", {})
    if "ms" in copy:
        rate = row["copy_bytes_per_second"] = copy["bytes"] / (1e-3 * copy["ms"])
        for figures in row["variants"].values():
            if "ms" in figures:
                figures["to_memory"] = figures["ms"] / (1e3 * figures["bytes"] / rate)


def models(session: Session, row: dict[str, Any]) -> None:
    """The step of MiniLM and BERT-large, ours in its best form and torch's."""
    flags, form, asked = session.flags, session.best_form(), {}
    for size in ("minilm", "large"):
        case, names = session.case(size), [f"finetune:{form}", f"pats:all:{form}"]
        asked[f"torch {size}"] = ("torch", case, flags.dtype, _torch_way(flags))
        asked[f"jax {size}"] = ("step", case, flags.dtype, *names)
    race(session, row, asked)
    for size in ("minilm", "large"):
        _ratios(_of_size(row, size), f"torch {size} {_torch_way(flags)}")


def attention(session: Session, row: dict[str, Any]) -> None:
    """Attention by einsum and by `jax.nn.dot_product_attention`, 12 times forward and backward."""
    small = session.flags.rehearse
    cases = ("2x8x2x8", "2x16x2x8") if small else ("32x128x12x64", "8x512x12x64")
    ways = ("einsum", "xla") if small else ("einsum", "xla", "cudnn", "cudnn-lengths")
    dtype = "float32" if small else "bfloat16"
    race(session, row, {f"jax {case}": ("attention", case, dtype, *ways) for case in cases})


def attention_in_model(session: Session, row: dict[str, Any]) -> None:
    """The step of BERT-base on rows of 512 tokens without attention dropout: attention by einsum and by cuDNN."""
    flags, form = session.flags, session.best_form()
    case = "bert-tiny:2x16" if flags.rehearse else "bert-base:8x512"
    ways = ("einsum",) if flags.rehearse else ("einsum", "cudnn")
    race(session, row, {"jax": ("step", case, flags.dtype, *(f"finetune:{form}:{way}" for way in ways))})


def lanes(session: Session, row: dict[str, Any]) -> None:
    """The step of MiniLM in lanes, over as many steps of one training; and a profile of it."""
    flags, form, case = session.flags, session.best_form(), session.case("minilm")
    asked = {"jax one": ("step", case, flags.dtype, f"finetune:{form}")}
    names = [f"{count}:{method}:{form}" for method in ("finetune", "pats") for count in flags.lanes]
    asked["jax lanes"] = ("lanes", case, flags.dtype, *names)

    def against_one(row, ready):
        one = row["variants"][f"one finetune:{form}"].get("ms")
        for figures in row["variants"].values():
            if one and "ms" in figures and "lanes" in figures:
                figures["to_steps_of_one"] = figures["ms"] / (figures["lanes"] * one)
        row["profiles"] = {}
        for name, (worker, variant) in ready.items():
            if session.left() > 15:
                row["profiles"][name] = worker.ask(f"profile {variant} 5", min(60.0, session.left()))
                session.save()

    race(session, row, asked, then=against_one)


def cold(session: Session, row: dict[str, Any]) -> None:
    """Seconds from the start of a process to the first loss, with an empty compilation cache and with a full one."""
    form = session.best_form()
    with tempfile.TemporaryDirectory() as folder:
        model = str(pathlib.Path(folder) / "model")
        words = [*WORKER, "checkpoint", session.case("base").partition(":")[0], model]
        session.command(words, 60, session.env | {"JAX_PLATFORMS": "cpu"})
        for method in ("finetune", "pats"):
            # A cache is local to its method: what one has compiled would help the other.
            env = session.env | {"JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(folder) / method)}
            env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            for kind in ("empty cache", "again")[: 1 if session.flags.once else 2]:
                words = [*WORKER, "first_loss", model, session.flags.dtype, f"{method}:{form}"]
                seconds, code, output = session.command(words, 90, env)
                row[f"{method}:{form} {kind}"] = {"seconds": seconds, "exit": code} | (json.loads(output or "{}"))
                session.save()
        for way in session.flags.xla:  # each with an empty cache of its own
            name, _, xla_flags = way.partition("=")
            env = session.env | {"JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(folder) / name)}
            env |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()}
            words = [*WORKER, "first_loss", model, session.flags.dtype, f"finetune:{form}"]
            seconds, code, output = session.command(words, 90, env)
            row[f"{name} finetune:{form}"] = {"seconds": seconds, "exit": code} | (json.loads(output or "{}"))
            session.save()


def _glue_words(session, folder):
    """The command line of `pats-jax glue` on MRPC with MiniLM, its compiled programs kept in a folder."""
    flags, carried = session.flags, session.flags.carried.resolve()
    words = [sys.executable, "-m", "pats_jax", "glue", "--task_name", "mrpc"]
    words += ["--data_dir", str(carried / "glue"), "--model_name_or_path", str(carried / "minilm")]
    words += ["--compilation_cache_dir", str(pathlib.Path(folder) / "compiled")]
    if flags.rehearse:
        return [*words, "--max_train_samples", "64", "--max_eval_samples", "64", "--max_seq_length", "16"]
    return [*words, "--dtype", flags.dtype]


def glue(session: Session, row: dict[str, Any]) -> None:
    """`pats-jax glue` on MRPC with MiniLM, three epochs, with an empty cache and once more."""
    flags = session.flags
    with tempfile.TemporaryDirectory() as folder:
        words = _glue_words(session, folder)
        words += ["--max_steps", "3"] if flags.rehearse else ["--num_train_epochs", "3"]
        env = session.env | {"XDG_CACHE_HOME": folder}
        for kind in ("empty cache", "again")[: 1 if flags.once else 2]:
            run = pathlib.Path(folder) / kind.replace(" ", "_")
            seconds, code, output = session.command([*words, "--output_dir", str(run)], 150, env)
            row[kind] = {"seconds": seconds, "exit": code, "last_lines": output.splitlines()[-3:]}
            session.save()


def deterministic(session: Session, row: dict[str, Any]) -> None:
    """What ordered sums cost, and whether two trainings of five steps then end with equal bits."""
    words = ("step", session.case("base"), session.flags.dtype, f"finetune:{session.best_form()}")
    flag = "--xla_gpu_exclude_nondeterministic_ops=true"
    ordered = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}

    def bits(row, ready):
        for name, (worker, variant) in ready.items():
            row["variants"][name] |= worker.ask(f"bits {variant} 5", min(60.0, session.left()))

    race(session, row, {"jax usual": words, "jax ordered": words}, more_env={"jax ordered": ordered}, then=bits)


def resumed(session: Session, row: dict[str, Any]) -> None:
    """`pats-jax glue --deterministic`: whether a run that is killed and resumed ends with the bits of a whole one."""
    steps, saved = ("4", "2") if session.flags.rehearse else ("60", "30")
    with tempfile.TemporaryDirectory() as folder:
        words = [*_glue_words(session, folder), "--deterministic", "--method", "pats"]
        words += ["--max_steps", steps, "--eval_steps", steps, "--save_steps", saved]
        digests = {}
        for name in ("whole", "again", "killed"):
            run = pathlib.Path(folder) / name
            arguments = [*words, "--output_dir", str(run)]
            if name == "killed":
                row["killed"] = _kill_after(session, [*arguments, "--save_steps", saved], run / "checkpoints" / saved)
                arguments.append("--resume")
            seconds, code, output = session.command(arguments, 90, session.env)
            row[name] = row.get(name, {}) | {"seconds": seconds, "exit": code, "last_lines": output.splitlines()[-2:]}
            weights = run / "model" / "model.safetensors"
            digests[name] = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None
            session.save()
    row["digests"] = digests
    row["equal_bits"] = {
        name: digests[name] is not None and digests[name] == digests["whole"] for name in ("again", "killed")
    }


def _kill_after(session, words, checkpoint):
    """Kills a program as soon as a checkpoint of it is complete; what had become of it then."""
    process = subprocess.Popen(words, stdout=session.log, stderr=session.log, env=session.env, process_group=0)
    until = time.monotonic() + min(90.0, session.left())
    while process.poll() is None and not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.02)
    ended = process.poll()
    end_group(process)
    return {"checkpoint": checkpoint.exists(), "ended_before": ended}


def tests(session: Session, row: dict[str, Any]) -> None:
    """The tests of the transforms and of the random numbers."""
    words = [sys.executable, "-m", "pytest", "-q", "tests/test_transforms.py", "tests/test_random.py"]
    words += ["-p", "no:cacheprovider"]
    if session.flags.rehearse:
        words += ["-k", "pmap"]
    seconds, code, output = session.command(words, 150, session.env)
    row |= {"seconds": seconds, "exit": code, "last_lines": output.splitlines()[-25:]}


# In their order of importance, with the seconds that must be left for a row to start.
ROWS: dict[str, tuple[Callable[[Session, dict[str, Any]], None], float]] = {
    "step": (step, 60),
    "update": (update, 40),
    "models": (models, 60),
    "attention": (attention, 30),
    "cold": (cold, 30),
    "glue": (glue, 40),
    "deterministic": (deterministic, 40),
    "lanes": (lanes, 60),
    "attention_in_model": (attention_in_model, 40),
    "resumed": (resumed, 50),
    "tests": (tests, 40),
}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A short table of what was measured."""
    for name, row in found["rows"].items():
        yield f"== {name}  {row.get('row_seconds', 0):.0f} s  {row.get('error', '')}"
        for process, said in row.get("processes", {}).items():
            if "error" in said:
                yield f"   {process}: {said['error']}"
        for variant, figures in row.get("variants", {}).items():
            yield "   " + _line(variant, figures)
        for variant, profile in row.get("profiles", {}).items():
            if "top" in profile:
                yield f"   {variant}: busy {profile['busy_ms']:.2f} of {profile['wall_ms']:.2f} ms"
                yield from (f"     {k['ms']:8.3f} ms {k['runs']:6.0f} x {k['name'][:70]}" for k in profile["top"][:8])
        for part, value in row.items():
            if isinstance(value, dict) and "seconds" in value:
                yield f"   {part:40} {value['seconds']:8.1f} s  exit {value['exit']}"
                yield from (f"     {line}" for line in value.get("last_lines", [])[:1])
        if name == "tests":
            yield "   " + " ".join(row.get("last_lines", [])[-1:])
        if name == "resumed":
            yield f"   equal bits: {row.get('equal_bits')}"
        if "copy_bytes_per_second" in row:
            yield f"   copy {row['copy_bytes_per_second'] / 1e9:.0f} GB/s"


def _line(variant: str, figures: dict[str, Any]) -> str:
    text = f"{variant:40} {figures['ms']:9.3f} ms" if "ms" in figures else f"{variant:40} {figures.get('error')}"
    units = {"to_torch_compile": "of torch", "to_memory": "of memory's time", "to_steps_of_one": "of steps of one"}
    for key, unit in units.items():
        text += f"  {figures[key]:.3f} {unit}" if key in figures else ""
    if "compile_seconds" in figures:
        text += f"  compile {figures['compile_seconds']:.1f} s, {figures['kernels']} kernels"
    return text + (f"  equal bits: {figures['equal_bits']}" if "equal_bits" in figures else "")


def main() -> None:
    """Measures the rows that were asked for, as time allows; exits with 1 if one failed."""
    flags = tyro.cli(Flags, use_underscores=True)
    unknown = [name for name in flags.rows if name not in ROWS]
    if unknown:
        print(f"error: --rows {' '.join(unknown)}: no such row; choose from {', '.join(ROWS)}", file=sys.stderr)
        sys.exit(2)
    if flags.rehearse:
        flags = dataclasses.replace(flags, steps=2, repeats=1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end with this one
    session = Session(flags)
    failed = False
    for name in flags.rows or ROWS:
        measure, needed = ROWS[name]
        row = session.found["rows"][name] = {}  # type: dict[str, Any]
        started = time.monotonic()
        if session.left() < (5 if flags.rehearse else needed):
            row["error"] = f"not started: {session.left():.0f} s left"
            continue
        try:
            measure(session, row)
        except Exception as error:
            failed = True
            row["error"] = f"{type(error).__name__}: {error}"
        row["row_seconds"] = time.monotonic() - started
        session.save()
        print(f"{name}: {row['row_seconds']:.0f} s, {session.left():.0f} s left {row.get('error', '')}", flush=True)
    session.save()
    print("\n".join(lines(session.found)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
