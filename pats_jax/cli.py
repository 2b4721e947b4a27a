"""`pats-jax`: the command line, each subcommand a thin call into the room that does the work.

Nothing heavy is imported before a subcommand needs it, so that ``--help`` and ``--version`` answer at once.
"""

import errno
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable

import pats_jax
from pats_jax.errors import InputError, Preempted


def main(args: list[str] | None = None) -> None:
    """Runs `pats-jax`.

    Exits with code 2 and one line on stderr when the input is wrong or the disk is full, 130 on Ctrl-C, 143 on
    SIGTERM.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] in (["-V"], ["--version"]):
        print(f"pats-jax {pats_jax.__version__}")
        return
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if args else 2)
    name, rest = args[0], args[1:]
    _show_warnings_in_a_line()
    try:
        if name not in COMMANDS:
            raise InputError(f"{name}: no such command; there are {', '.join(COMMANDS)}")
        COMMANDS[name](rest)
        sys.stdout.flush()
    except InputError as error:
        print(f"pats-jax: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as error:
        print(f"pats-jax: {error}", file=sys.stderr)
        sys.exit(128 + error.signal_number)  # as shells count
    except KeyboardInterrupt:
        print("pats-jax: interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # whoever reads our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"pats-jax: error: {error.filename or 'a file'} could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def glue(args: list[str]) -> None:
    """Fine-tune on a GLUE task or on files of your own, evaluate, predict."""
    from pats_jax import settings

    parsed = settings.parse(args, "pats-jax glue", settings.Settings)
    import rich.console

    from pats_jax import glue as program

    program.run(parsed, rich.console.Console())


def compare(args: list[str]) -> None:
    """Run methods x tasks x seeds, and write a report with statistics and plots."""
    import rich.console

    from pats_jax import compare as program

    program.run(args, rich.console.Console())


def prime(args: list[str]) -> None:
    """Prime a model or PE modules on the upstream tasks of a few-shot gym."""
    from pats_jax import settings, upstream

    parsed = settings.parse(args, "pats-jax prime", upstream.PrimingSettings)
    import rich.console

    upstream.run(parsed, rich.console.Console())


def gym(args: list[str]) -> None:
    """Tune on the target tasks of a few-shot gym, and report what priming gains."""
    from pats_jax import downstream, gym_settings, settings

    parsed = settings.parse(args, "pats-jax gym", gym_settings.GymSettings)
    import rich.console

    downstream.run(parsed, args, rich.console.Console())


def predict(args: list[str]) -> None:
    """Labels and probabilities for new texts, by a run's model."""
    import tyro

    from pats_jax import predict as program

    tyro.cli(program.predict_file, args=args, prog="pats-jax predict", use_underscores=True)


def submission(args: list[str]) -> None:
    """Collect the predictions of finished runs into the zip that the GLUE server takes."""
    import tyro

    from pats_jax import submission as program

    tyro.cli(program.write_submission, args=args, prog="pats-jax submission", use_underscores=True)


def builtin(args: list[str]) -> None:
    """Write the built-in data (generated, not GLUE) as TSV files in GLUE's layout."""
    import tyro

    from pats_jax.data import write_builtin

    tyro.cli(write_builtin, args=args, prog="pats-jax builtin", use_underscores=True)


def methods(args: list[str]) -> None:
    """List the methods of `--method`: what each does, its settings, costs and source."""
    import rich.console
    import tyro

    from pats_jax import methods as room

    def show() -> None:
        console = rich.console.Console()
        if not console.is_terminal:
            console.width = 200  # a file or a pipe has no width of its own
        console.print(room.as_table())

    tyro.cli(show, args=args, prog="pats-jax methods", description=methods.__doc__)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "glue": glue,
    "compare": compare,
    "prime": prime,
    "gym": gym,
    "predict": predict,
    "submission": submission,
    "methods": methods,
    "builtin": builtin,
}


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
            "`pats-jax COMMAND --help` lists a command's flags; `pats-jax --version` the version.",
        ]
    )


def _show_warnings_in_a_line() -> None:
    """Warnings and the library's log as single lines on stderr, without the source line that raised them."""
    warnings.showwarning = lambda message, *_, **__: print(f"pats-jax: warning: {message}", file=sys.stderr)
    logging.basicConfig(format="pats-jax: %(message)s", level=logging.WARNING)
    logging.getLogger("pats_jax").setLevel(logging.INFO)
    for name in ("absl", "asyncio", "concurrent.futures"):  # Orbax talks of its inner life by these
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _leave_failures_of_threads_to_those_who_wait_for_them()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch, which we have no use for


def _leave_failures_of_threads_to_those_who_wait_for_them() -> None:
    """No tracebacks of background threads: a save that fails in one is told by `Checkpoints`, in a line."""
    log = logging.getLogger(__name__)
    sys.unraisablehook = lambda failed: log.debug("in %s: %r", failed.object, failed.exc_value)
    threading.excepthook = lambda failed: log.debug("in %s: %r", failed.thread, failed.exc_value)


if __name__ == "__main__":
    main()
