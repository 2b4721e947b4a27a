"""The command line as its users meet it: wrong input is one line and exit code 2, and leaves nothing behind."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import huggingface_hub
import pytest
import tiny

import pats_jax
from pats_jax.errors import InputError, Preempted
from pats_jax.programs import cli
from pats_jax.training import preemption

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with GLUE's SST-2 and two checkpoints, one without a head and one with three labels."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_sst2(home / "glue")
    tiny.save_checkpoint(home / "model")
    tiny.save_checkpoint(home / "three", 3)
    return home


@pytest.fixture(autouse=True)
def advice_of_transformers(monkeypatch):
    """`main` sets a variable, which is put back."""
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)


@dataclasses.dataclass
class Shell:
    """Runs `main` on a folder of its own and holds it to the rules."""

    home: pathlib.Path
    folder: pathlib.Path
    capsys: pytest.CaptureFixture

    def flags(self, **changes):
        """Flags of a run that is right but for the changes; None leaves a flag out, True is a bare one."""
        given = {
            "model_name_or_path": self.home / "model",
            "task_name": "sst2",
            "data_dir": self.home / "glue",
            "output_dir": self.folder / "run",
            "max_seq_length": 16,
            "per_device_train_batch_size": 8,
            "num_devices": 1,
        }
        flags = []
        for name, value in (given | changes).items():
            flags += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return flags

    def refuses(self, *parts, args=None, **changes):
        """`main` must end with code 2 and one line that holds the parts, and write nothing anywhere."""
        before = self._everything()
        with pytest.raises(SystemExit) as caught:
            cli.main(args or ["glue", *self.flags(**changes)])
        out, error = self.capsys.readouterr()
        assert caught.value.code == 2 and out == ""
        assert error.startswith("pats-jax: error: ") and error.endswith("\n") and error.count("\n") == 1, error
        for part in parts:
            assert str(part) in error
        assert self._everything() == before

    def copy(self, name):
        """A copy of a checkpoint or of the data, to be damaged."""
        return pathlib.Path(shutil.copytree(self.home / name, self.folder / name))

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def _everything(self):
        return {path: path.stat().st_mtime_ns for folder in (self.home, self.folder) for path in folder.rglob("*")}


@pytest.fixture
def shell(home, tmp_path, capsys):
    return Shell(home, tmp_path, capsys)


# data


DATA = "sentence\tlabel\nann is warm\t1\nbob is cold\t0\n"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "train.tsv: the file is empty"),
        ("text\tlabel\nann is warm\t1\n", "train.tsv:1: no column 'sentence', which sst2 requires"),
        (DATA + "ann\tis\t1\n", "train.tsv:4: expected 2 columns separated by tabs, got 3"),
        (DATA + "ann is calm\t2\n", "train.tsv:4: unknown label '2'"),
        ("sentence\tlabel\n", "train.tsv: no rows below the header"),
        (DATA.encode() + b"caf\xe9\t1\n", "train.tsv:4: not UTF-8"),
    ],
)
def test_wrong_data(content, message, shell):
    data = shell.copy("glue")
    shell.write("glue/SST-2/train.tsv", content)
    shell.refuses(message, data_dir=data)


def test_missing_and_unreadable_data(shell, monkeypatch):
    shell.refuses("data_dir", "none: no such folder", "builtin", data_dir=shell.folder / "none")
    data = shell.copy("glue")
    (data / "SST-2" / "dev.tsv").unlink()
    shell.refuses("dev.tsv: no such file", data_dir=data)
    (data / "SST-2" / "dev.tsv").mkdir()
    shell.refuses("dev.tsv: cannot be read (Is a directory)", data_dir=data)

    def refuse(path, *args, open=os.open, **options):
        if str(path).endswith("train.tsv"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)  # root may read anything
    shell.refuses("train.tsv: cannot be read (Permission denied)")


def test_wrong_data_of_ones_own(shell):
    good = shell.write("good.csv", "sentence,label\nann is warm,yes\nbob is cold,no\n")
    own = {"task_name": None, "data_dir": None, "train_file": good, "per_device_train_batch_size": 2}
    shell.refuses("--validation_file is missing", **own)
    for content, message in (
        ("sentence,label\nann is warm,maybe\n", "v.csv:2: unknown label 'maybe'; the labels are 'no', 'yes'"),
        ("sentence1,sentence2,label\na,b,yes\n", "v.csv: has pairs of texts, but"),
        ("words,label\na,yes\n", "v.csv:1: no text column among 'words', 'label'"),
        ("sentence\na\n", "v.csv: no labels for the validation data"),
        ('sentence,label\n"ann,yes\n', "v.csv:2: not valid CSV"),
    ):
        shell.refuses(message, **own, validation_file=shell.write("v.csv", content))
    shell.refuses("v.doc: unknown file type '.doc'", **own, validation_file=shell.write("v.doc", "x"))
    shell.refuses("none.csv: no such file", **own, validation_file=shell.folder / "none.csv")
    same = shell.write("same.csv", "sentence,label\na,yes\nb,yes\n")
    shell.refuses("every row has the label 'yes'", **(own | {"train_file": same}), validation_file=good)


def test_no_data_from_the_hub_without_network(shell, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shell.refuses("nyu-mll/glue could not be loaded from the hub", "set data_dir to builtin", data_dir=None)


# flags


def test_unknown_names(shell):
    shell.refuses("--task_name news: no such task; choose one of cola, sst2", task_name="news")
    shell.refuses("method sgd: no such method; choose one of finetune, pats", method="sgd")
    shell.refuses("method sgd: no such method", method="sgd", do_eval=True)
    shell.refuses("ax has no split 'train'", task_name="ax")
    shell.refuses("fit: no such command; choose one of train, predict, text2text, glue, compare", args=["fit"])


def test_flags_that_have_no_meaning_here_or_exclude_each_other(shell):
    shell.refuses("--fp16 is not supported", fp16=True)
    shell.refuses("--overwrite_output_dir is not supported: use --overwrite", overwrite_output_dir=True)
    shell.refuses("--task_name cannot be used with --train_file", train_file="a.csv")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("per_device_train_batch_size", 0, "must be at least 1"),
        ("per_device_train_batch_size", 23, "a batch has 23 rows, more than the 22 training rows"),
        ("per_device_eval_batch_size", -1, "must be at least 1"),
        ("learning_rate", "nan", "must be greater than 0"),
        ("num_train_epochs", -1, "must be greater than 0"),
        ("max_steps", 0, "must be at least 1"),
        ("max_train_samples", 0, "must be at least 1"),
        ("max_seq_length", 2, "too short"),
        ("weight_decay", -1, "must be at least 0"),
        ("seed", -1, "must be in"),
    ],
)
def test_numbers_that_make_no_sense(name, value, message, shell):
    shell.refuses(name, message, **{name: value})


def test_layers_that_do_not_exist(shell):
    shell.refuses("noise_layers 'decoder': matches no parameter", method="pats", noise_layers="decoder")
    shell.refuses("noise_layers '(': not a regular expression", method="pats", noise_layers="(")


def test_wrong_config_files(shell):
    for content, message in (
        ('{"lerning_rate": 1}', "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ('{"learning_rate": "high"}', "learning_rate is 'high'; it must be a number"),
        ("learning_rate: 1", "not valid JSON"),
    ):
        path = shell.write("saved.json", content)
        shell.refuses(f"--config {path}: ", message, args=["glue", "--config", str(path)])
    shell.refuses("--config none.json: ", args=["glue", "--config", "none.json"])


def test_the_output_folder(shell):
    (shell.folder / "run").mkdir()
    shell.write("run/notes.txt", "mine")
    shell.refuses(f"--output_dir {shell.folder / 'run'}: not empty", "--overwrite")
    shell.refuses("--overwrite would delete notes.txt", overwrite=True)
    shell.refuses("notes.txt is a file", output_dir=shell.folder / "run" / "notes.txt" / "below")


# checkpoints


def test_a_model_that_is_not_there(shell, monkeypatch):
    shell.refuses("none: no such folder", model_name_or_path=shell.folder / "none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shell.refuses("org/none: ", "the hub cannot be reached", "to work offline", model_name_or_path="org/none")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[: len(data) // 2], "model.safetensors: truncated or not a safetensors file"),
        (lambda data: b"", "model.safetensors: truncated or not a safetensors file"),
        (lambda data: data + b"more", "model.safetensors: truncated or not a safetensors file"),
        (
            lambda data: data.replace(b"query.weight", b"quary.weight"),
            "lacks bert.encoder.layer.0.attention.self.query",
        ),
        (lambda data: data[:-64] + b"\xff" * 64, "non-finite values; the file is damaged"),
    ],
    ids=["truncated", "empty", "longer", "renamed tensor", "altered values"],
)
def test_damaged_weights(change, message, shell):
    folder = shell.copy("model")
    weights = folder / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    shell.refuses(message, model_name_or_path=folder)


def test_weights_as_a_pickle(shell):
    folder = shell.copy("model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    shell.refuses("only pickled weights (pytorch_model.bin)", "safetensors", model_name_or_path=folder)
    (folder / "pytorch_model.bin").unlink()
    shell.refuses("has no safetensors weights", model_name_or_path=folder)


def test_a_model_of_another_kind(shell):
    shell.refuses(
        "three: the checkpoint's head has 3 labels, but 2 are needed", model_name_or_path=shell.home / "three"
    )
    folder = shell.copy("model")
    config = json.loads((folder / "config.json").read_text())
    shell.write("model/config.json", json.dumps(config | {"model_type": "gpt2"}))
    kinds = ("bert", "roberta", "distilbert", "deberta-v2", "modernbert")
    shell.refuses("model_type 'gpt2' is not supported", *kinds, model_name_or_path=folder)
    shell.write("model/config.json", "{")
    shell.refuses("config.json", "not valid JSON", model_name_or_path=folder)


def test_a_damaged_tokenizer(shell):
    folder = shell.copy("model")
    shell.write("model/tokenizer.json", "{")
    shell.refuses(f"{folder}: the tokenizer cannot be loaded", model_name_or_path=folder)
    (folder / "tokenizer.json").unlink()
    shell.refuses(f"{folder}: has no tokenizer", model_name_or_path=folder)


# predict


def test_wrong_input_of_predict(shell):
    texts = shell.write("texts.txt", "ann is warm\nbob is cold\n")

    def refuses(*parts, model=shell.home / "three", file=texts, **more):
        flags = [word for name, value in more.items() for word in (f"--{name}", str(value))]
        shell.refuses(*parts, args=["predict", str(model), "--file", str(file), *flags])

    refuses("none: no such folder", model=shell.folder / "none")
    refuses("has no classification head", model=shell.home / "model")
    refuses("model: has no classification head", model=shell.home)  # the folder that the model is in, as of a run
    refuses("none.txt: no such file", file=shell.folder / "none.txt")
    refuses("empty.txt: the file is empty", file=shell.write("empty.txt", ""))
    refuses("bytes.txt:2: not UTF-8", file=shell.write("bytes.txt", b"ann\nb\xff\n"))
    refuses("--batch_size 0: must be at least 1", batch_size=0)
    refuses("max_seq_length 1: too short", max_seq_length=1)
    refuses(f"--output_file {shell.folder}: cannot be written", output_file=shell.folder)
    refuses("--output_file", "cannot be written", output_file=shell.folder / "none" / "out.tsv")


# the process


def environment(**changes):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **changes}


def python(*args, **changes):
    """Runs Python in a process of its own; what it printed."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=300)


def test_a_hub_that_cannot_be_reached(shell):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(shell.folder / "cache")}
    flags = shell.flags(model_name_or_path="org/none")
    done = python("-m", "pats_jax", "glue", *flags, **nowhere)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("pats-jax: error: org/none: ") and done.stderr.count("\n") == 1, done.stderr
    assert "the hub cannot be reached" in done.stderr and "to work offline" in done.stderr
    assert not (shell.folder / "run").exists()


def test_glue_as_a_module_refuses_the_same_way(shell):
    done = python("-m", "pats_jax.glue", *shell.flags(task_name="news"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pats-jax: error: --task_name news: ") and done.stderr.count("\n") == 1
    assert not (shell.folder / "run").exists()


def sh(command, **changes):
    """Runs ``pats-jax`` in a shell: `command` says with what flags and streams."""
    line = f'"{sys.executable}" -m pats_jax {command}'
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **changes}
    return subprocess.run(["sh", "-c", line], env=environment(**plain), capture_output=True, timeout=60)


def test_streams_that_are_closed_or_full():
    assert [sh(f"{flags} >&-").returncode for flags in ("--version", "glue --help", "fit")] == [0, 0, 2]
    assert sh("fit 2>&-").returncode == 2
    assert sh("--help >&- 2>&- <&-").returncode == 0
    for flags in ("--help", "glue --help"):
        done = sh(f"{flags} > /dev/full")
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"No space left" in done.stderr
    closed = sh("predict model --file texts.txt >&-")
    assert closed.stderr == b"pats-jax: error: standard output is closed; set --output_file\n"


def test_streams_that_cannot_show_everything():
    done = sh("methods", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.isascii() and b"finetune" in done.stdout
    done = sh("'caf\u00e9'", LC_ALL="C")
    assert done.returncode == 2 and done.stderr.startswith(b"pats-jax: error: caf\\") and done.stderr.isascii()
    done = sh("glue --help", COLUMNS="1")  # the parser's own help never ends at five columns
    assert done.returncode == 0 and b"--learning_rate" in done.stdout


NEXT_FILE = """
import os, sys
from pats_jax.reporting import console
was_open = console.open_streams()
print("lost")
sys.exit(os.open(os.devnull, os.O_RDONLY) + 10 * was_open)
"""


def test_what_is_printed_to_a_closed_stream_does_not_land_in_the_next_file():
    command = f"exec '{sys.executable}' -c '{NEXT_FILE}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment(), timeout=60).returncode == 3


@pytest.mark.parametrize(
    "error, code, message",
    [
        (OSError(36, "File name too long", "x" * 5000), 2, "(5000 characters) cannot be used: File name too long"),
        (OSError(28, "No space left on device", "a\nb"), 2, r"a\nb could not be written: No space left on device"),
        (MemoryError("Unable to allocate 9 TiB"), 2, "not enough memory (Unable to allocate 9 TiB); lower the batch"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"), 2, "not enough memory (Out of memory"),
        (RuntimeError("Unable to initialize backend 'tpu'"), 2, "JAX_PLATFORMS"),
        (InputError("a\nb\x1b[2Jc" + "x" * 100_000), 2, r"a\nb\x1b[2Jc"),
        (Preempted("interrupted\nand saved", signal.SIGTERM), 143, r"interrupted\nand saved"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_whatever_ends_a_command_is_told_in_one_line(error, code, message, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "glue", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["glue"])
    told = capsys.readouterr().err
    assert caught.value.code == code and message in told
    assert told.count("\n") == 1 and told.endswith("\n") and len(told) < 2100 and "\x1b" not in told


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    for fault in (RuntimeError("a fault"), KeyError("a"), OSError("no number")):
        monkeypatch.setitem(cli.COMMANDS, "glue", lambda args, fault=fault: (_ for _ in ()).throw(fault))
        with pytest.raises(type(fault)):
            cli.main(["glue"])


def test_long_values_are_not_repeated_whole(capsys):
    long, endless = "x" * 4000, "x" * 100_000
    commands = [["glue", "--learning_rate", long], ["glue", f"--{long}"], ["glue", "--task_name", long]]
    for args in ([endless], ["glue", "--learning_rate", endless], *commands):
        with pytest.raises(SystemExit) as caught:
            cli.main(args)
        out, error = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and "xxx" in error and len(error) < 5000


def test_warnings_and_the_log_are_lines(monkeypatch, capsys):
    def warn(args):
        warnings.warn("one\ntwo\x1b", stacklevel=1)

    monkeypatch.setitem(cli.COMMANDS, "glue", warn)
    cli.main(["glue"])
    assert capsys.readouterr().err == "pats-jax: warning: one\\ntwo\\x1b\n"
    record = logging.LogRecord("pats_jax", logging.WARNING, "", 0, "a\nb %s", ("c\rd",), None)
    assert cli._Line("pats-jax: %(message)s").format(record) == r"pats-jax: a\nb c\rd"


def test_names_and_texts_of_predict_and_builtin_that_are_no_paths(shell):
    for flags in (
        ["predict", "x" * 300, "--file", "t.txt"],
        ["predict", "m", "--file", "~nosuchuser/t.txt"],
        ["predict", "m", "--file", "t.txt", "--output_file", "x" * 300],
        ["submission", "~nosuchuser", "--output_dir", "x"],
        ["builtin", "x" * 5000],
    ):
        shell.refuses(args=flags)
    shell.refuses("tasks news: no such task", args=["builtin", str(shell.folder / "b"), "--tasks", "news"])


def test_a_layer_that_the_model_does_not_have(shell):
    shell.refuses("lnsr_layer 1: must be less than the model's 1 layers", method="lnsr", lnsr_layer=1)


def test_signals_are_noted_once_there_is_something_to_save():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as asked:
        assert signal.getsignal(signal.SIGTERM) is before  # while data are read: as any program
        asked.check()
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before  # a second one has its usual effect
        with pytest.raises(Preempted):
            asked.check()
    assert signal.getsignal(signal.SIGTERM) is before


WAITING = """
import signal, time
import pats_jax.programs.predict
from pats_jax.programs.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would its child
pats_jax.programs.predict.read_texts = lambda *of: (print("reading", flush=True), time.sleep(60))
main()
"""


@pytest.mark.parametrize(
    "number, code, message", [(signal.SIGINT, 130, "pats-jax: interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, "")]
)
def test_interruption_leaves_no_traceback(number, code, message, shell):
    """Ctrl-C and SIGTERM while `predict` reads its texts."""
    command = [sys.executable, "-c", WAITING, "predict", str(shell.home / "three"), "--file", "texts.txt"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(number)
        try:
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, error) == (code, message)


def test_a_reader_that_has_seen_enough(shell):
    """`pats-jax predict ... | head`: the pipe is closed before all is written."""
    texts = shell.write("texts.txt", "ann is warm\n" * 3)
    reading, writing = os.pipe()
    os.close(reading)
    command = ["-m", "pats_jax", "predict", shell.home / "three", "--file", texts, "--max_seq_length", "16"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


SLOW_TO_IMPORT = set("jax flax optax transformers tokenizers orbax datasets matplotlib pandas scipy sklearn".split())


@pytest.mark.parametrize(
    "module, args, words, loaded",
    [
        ("pats_jax", ["--version"], [pats_jax.__version__], set()),
        ("pats_jax", ["--help"], list(cli.COMMANDS), set()),
        ("pats_jax", ["glue", "--help"], ["--method", "--noise_scale"], set()),
        # This module is what runs, so what it imports is imported before it can answer.
        (
            "pats_jax.glue",
            ["--help"],
            ["--model_name_or_path", "--task_name", "--output_dir"],
            {"jax", "flax", "optax"},
        ),
    ],
)
def test_help_and_version_answer_before_what_is_slow_to_import(module, args, words, loaded):
    done = python("-X", "importtime", "-m", module, *args)
    assert done.returncode == 0 and all(word in done.stdout for word in words)
    lines = done.stderr.splitlines()
    assert all(line.startswith("import time:") for line in lines), done.stderr
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "pats_jax" in imported and imported & SLOW_TO_IMPORT == loaded


@pytest.mark.parametrize(
    "words, expected",
    [
        (["pre"], {"predict"}),
        (["glue", "--metho"], {"--method"}),
        (["prime", "--algorithm", "m"], {"mtl", "maml"}),
        (["predict", "--fil"], {"--file"}),
        (["nothing", "--fil"], set()),
    ],
)
def test_bash_completes_commands_flags_and_choices(words, expected, completion_script):
    typed = " ".join(["pats-jax", *words])
    code = (
        f"source {completion_script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _pats_jax; complete -p pats-jax; "
    )
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    registered, *found = done.stdout.splitlines()
    assert registered == "complete -o default -F _pats_jax pats-jax" and done.stderr == ""
    assert {word for word in found if word} == expected


@pytest.fixture(scope="module")
def completion_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "script.sh"
    with path.open("w") as file, contextlib.redirect_stdout(file):
        cli.main(["completion"])
    return path


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2 and "usage: pats-jax COMMAND" in capsys.readouterr().out


IMPORT_ALL = """
import importlib, pkgutil, sys
import pats_jax, pats_jax.programs.cli
assert not {"jax", "flax", "numpy"} & sys.modules.keys(), "pats_jax.programs.cli loads them"
for module in pkgutil.walk_packages(pats_jax.__path__, "pats_jax."):
    if module.name != "pats_jax.programs.classifier":  # its classes inherit from scikit-learn's
        importlib.import_module(module.name)
heavy = {"orbax", "transformers", "datasets", "sklearn", "matplotlib", "torch", "pandas"} & sys.modules.keys()
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
print(all(hasattr(pats_jax, name) for name in pats_jax.__all__))
"""


def test_importing_is_light_and_starts_no_backend():
    done = python("-c", IMPORT_ALL)
    assert done.stdout == "True\n", done.stderr


# compiled programs on disk


def test_a_folder_that_others_can_write_is_refused_for_compiled_programs(shell):
    cache = shell.folder / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    shell.refuses(f"--compilation_cache_dir {cache}: others can write to it", compilation_cache_dir=cache)
    (shell.folder / "file").write_text("")
    shell.refuses("--compilation_cache_dir", compilation_cache_dir=shell.folder / "file" / "cache")
