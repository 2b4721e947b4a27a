"""`pats-jax`: the command line; each subcommand calls the module that does the work.

Heavy modules are imported only when a subcommand needs them, so ``--help`` and ``--version`` are fast.
"""

import contextlib
import errno
import importlib
import inspect
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable

import pats_jax
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.reporting import console


def main(args: list[str] | None = None) -> None:
    """Runs `pats-jax`.

    Exits with code 2 and one line on stderr if the input is wrong or the system refuses a file or memory, 130 on
    Ctrl-C, 141 if its output is closed, and 143 on SIGTERM.
    """
    code = _outcome(sys.argv[1:] if args is None else args)
    if code is not None:
        sys.exit(code)


def _outcome(args):
    """The exit code; None if the command succeeds."""
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(str(error))
    except Preempted as error:
        _tell(console.visible(str(error)))
        return 128 + error.signal_number  # as shells count
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # whoever reads our output, `head` for instance, has seen enough
        _leave_stdout()
        return 141  # 128 + SIGPIPE
    except OSError as error:
        if error.errno is None or not error.strerror:
            raise
        _leave_stdout()
        return _fail(_refusal(error))
    except MemoryError as error:
        return _fail(f"not enough memory ({error or 'of the host'}); {_LESS_MEMORY}")
    except RuntimeError as error:
        said = str(error)
        if said.startswith("Unable to initialize backend"):
            return _fail(f"the environment variable JAX_PLATFORMS names a platform that is not available: {said}")
        if "RESOURCE_EXHAUSTED" not in said:  # XLA's word for it
            raise
        return _fail(f"not enough memory ({said.partition(': ')[2]}); {_LESS_MEMORY}")


def _dispatch(args):
    stdout_is_open = console.open_streams()
    if args[:1] in (["-V"], ["--version"]):
        print(f"pats-jax {pats_jax.__version__}")
        return None
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    endless = next((arg for arg in args if len(arg) > _LONGEST_ARGUMENT), None)
    if endless is not None:
        raise InputError(f"{shown(endless, quoted=False)}: too long for a flag or its value")
    name, rest = args[0], args[1:]
    _show_warnings_in_a_line()
    if name not in COMMANDS | CHILDREN:
        raise InputError(f"{shown(name, quoted=False)}: no such command; choose one of {', '.join(COMMANDS)}")
    if not stdout_is_open and name == "predict" and not any(arg.startswith("--output") for arg in rest):
        raise InputError("standard output is closed; set --output_file")
    try:
        (COMMANDS | CHILDREN)[name](rest)
    except SystemExit as ended:  # from the parser of flags
        return ended.code
    return None


_LONGEST_ARGUMENT = 10_000  # characters: paths end at 4096, and the parser takes seconds over longer ones
_LESS_MEMORY = "lower the batch size, --max_seq_length, --lora_rank or --adapter_size, or use --gradient_checkpointing"


def _fail(message):
    _tell(f"error: {console.one_line(message)}")
    return 2


def _tell(message):
    with contextlib.suppress(OSError):  # nobody reads stderr
        print(f"pats-jax: {message}", file=sys.stderr, flush=True)


def _leave_stdout():
    """Discards what is still to be written, so that writing does not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refusal(error):
    """What the system refused, in one line."""
    cannot = "could not be written" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "cannot be used"
    has_name = isinstance(error.filename, str | bytes)  # not the number of an open file
    path = shown(os.fsdecode(error.filename), 300, quoted=False) if has_name else "a file"
    return f"{path} {cannot}: {error.strerror}"


def glue(args: list[str]) -> None:
    """Fine-tune, evaluate and predict on a GLUE task or on your own files."""
    parsed = _module("run.flags").parse(args, "pats-jax glue", _module("run.settings").Settings)
    _module("glue").run(parsed, _stdout())


def train(args: list[str]) -> None:
    """Fine-tune a classifier or regressor on your own texts, evaluate it and predict."""
    parsed = _module("run.flags").parse(args, "pats-jax train", _module("run.settings").OwnDataSettings)
    _module("glue").run(parsed, _stdout())


def text2text(args: list[str]) -> None:
    """Fine-tune T5 or BART to write texts, such as summaries, and score what it writes."""
    kind = _module("run.text2text_settings").Text2TextSettings
    parsed = _module("run.flags").parse(args, "pats-jax text2text", kind)
    _module("programs.text2text").run(parsed, _stdout())


def compare(args: list[str]) -> None:
    """Compare methods over tasks and seeds, and write a report with statistics and plots."""
    _module("comparison.compare").run(args, _stdout())


def glue_lanes(args: list[str]) -> None:
    """Make a set of runs in lanes, which is described on standard input; `pats-jax compare` starts it."""
    del args
    _module("programs.glue_lanes").main(sys.stdin.read(), _stdout())


def text2text_lanes(args: list[str]) -> None:
    """Make a set of runs of `pats-jax text2text` in lanes; as `glue_lanes`."""
    del args
    _module("programs.text2text_lanes").main(sys.stdin.read(), _stdout())


def prime(args: list[str]) -> None:
    """Prime a model or its adapters on the upstream tasks of a few-shot gym."""
    kind = _module("priming.upstream_settings").PrimingSettings
    parsed = _module("run.flags").parse(args, "pats-jax prime", kind)
    _module("priming.upstream").run(parsed, _stdout())


def gym(args: list[str]) -> None:
    """Tune on the target tasks of a few-shot gym, and report what priming gains."""
    kind = _module("priming.gym_settings").GymSettings
    parsed = _module("run.flags").parse(args, "pats-jax gym", kind)
    _module("priming.downstream").run(parsed, args, _stdout())


def predict(args: list[str]) -> None:
    """Predict labels and probabilities (or scores) for new texts with a trained model."""
    paths = {"model": "model", "file": "--file", "output_file": "--output_file"}
    _call(_module("programs.predict").predict_file, args, "pats-jax predict", paths, predict.__doc__)


def submission(args: list[str]) -> None:
    """Collect the predictions of finished runs in a zip file for the GLUE server."""
    paths = {"runs": "runs", "output_dir": "--output_dir"}
    _call(_module("programs.submission").write_submission, args, "pats-jax submission", paths, submission.__doc__)


def builtin(args: list[str]) -> None:
    """Write the built-in data (generated, not GLUE) as TSV files in GLUE's layout."""
    import tyro

    paths, options = {"directory": "directory"}, {"config": (tyro.conf.PositionalRequiredArgs,)}
    _call(_module("data").write_builtin, args, "pats-jax builtin", paths, builtin.__doc__, **options)


def methods(args: list[str]) -> None:
    """List the methods that --method accepts, with their settings, costs and sources."""

    def show() -> None:
        out = _stdout()
        if not out.is_terminal:
            out.width = 200  # a file or a pipe has no width of its own
        out.print(_module("methods").as_table())

    console.parse_flags(show, args=args, prog="pats-jax methods", description=methods.__doc__)()


def completion(args: list[str]) -> None:
    """Print a script by which bash, or zsh with bashcompinit, completes commands and flags."""
    console.parse_flags(lambda: None, args=args, prog="pats-jax completion", description=completion.__doc__)
    commands = [name for name in COMMANDS if name != "completion"]
    print("\n".join([*map(_completion_of, commands), _COMPLETION.format(commands=" ".join(COMMANDS))]))


def _completion_of(name):
    """The function ``_tyro_pats_jax_NAME`` of bash, by the parser of the command's flags, without its registration."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        COMMANDS[name](["--tyro-print-completion", "bash"])
    return printed.getvalue().partition("# Register completion")[0]


_COMPLETION = """
_pats_jax() {{
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{commands}" -- "${{COMP_WORDS[1]}}"))
    return
  fi
  COMP_WORDS=("${{COMP_WORDS[@]:1}}")
  COMP_CWORD=$((COMP_CWORD - 1))
  if declare -F "_tyro_pats_jax_${{COMP_WORDS[0]}}" >/dev/null; then
    "_tyro_pats_jax_${{COMP_WORDS[0]}}"
  fi
}}
complete -o default -F _pats_jax pats-jax"""


def _module(name):
    """A module of the library, imported when a command asks for it."""
    return importlib.import_module(f"pats_jax.{name}")


def _stdout():
    import rich.console

    return rich.console.Console()


def _call(function, args, prog, paths, description, **options):
    """Calls a function with the values of its flags; paths: argument -> its name in error messages."""
    path_of_flag = _module("run.flags").path_of_flag
    flags = console.parse_flags(function, args=args, prog=prog, description=description, **options)
    given = inspect.signature(function).bind(*flags.args, **flags.keywords)
    for argument, name in paths.items():
        value = given.arguments.get(argument)
        if isinstance(value, tuple):
            given.arguments[argument] = tuple(path_of_flag(name, each) for each in value)
        elif value is not None:
            given.arguments[argument] = path_of_flag(name, str(value))
    function(*given.args, **given.kwargs)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "predict": predict,
    "text2text": text2text,
    "glue": glue,
    "compare": compare,
    "prime": prime,
    "gym": gym,
    "submission": submission,
    "methods": methods,
    "builtin": builtin,
    "completion": completion,
}

# what the commands start as child processes
CHILDREN: dict[str, Callable[[list[str]], None]] = {"glue-lanes": glue_lanes, "text2text-lanes": text2text_lanes}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pats-jax COMMAND [FLAGS]",
            "",
            "Sensitivity-aware fine-tuning of pretrained language models in JAX.",
            "",
            *lines,
            "",
            "Run `pats-jax COMMAND --help` for a command's flags, and `pats-jax --version` for the version.",
        ]
    )


def _show_warnings_in_a_line() -> None:
    """Prints warnings and the library's log as single lines on stderr, without the source line that raised them."""
    warnings.showwarning = lambda message, *_, **__: _tell(console.one_line(f"warning: {message}"))
    # Orbax leaves coroutines behind when a save fails; what failed is said by `Checkpoints`.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(_Line("pats-jax: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pats_jax").setLevel(logging.INFO)
    # Orbax logs internals to the first three, Matplotlib its fonts to the last.
    for name in ("absl", "asyncio", "concurrent.futures", "matplotlib"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _leave_failures_of_threads_to_those_who_wait_for_them()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed


class _Line(logging.Formatter):
    """Formats a record as one line, whatever its message contains."""

    def format(self, record):
        return console.one_line(super().format(record))


def _leave_failures_of_threads_to_those_who_wait_for_them() -> None:
    """Hides tracebacks of background threads; `Checkpoints` reports a failed save in one line."""
    log = logging.getLogger(__name__)
    sys.unraisablehook = lambda failed: log.debug("in %s: %r", failed.object, failed.exc_value)
    threading.excepthook = lambda failed: log.debug("in %s: %r", failed.thread, failed.exc_value)


if __name__ == "__main__":
    main()
