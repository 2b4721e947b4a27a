"""How a run starts: devices, the folder that it writes, and whether it goes on with the run in it."""

import dataclasses
import os
import pathlib
import stat
from typing import Any, Generic

import jax
import rich.console

from pats_jax import methods, parallel, run_folder
from pats_jax.errors import InputError
from pats_jax.journal import check_tensorboard
from pats_jax.settings import Kind, read_config


@dataclasses.dataclass(frozen=True)
class Start(Generic[Kind]):
    """A run that is about to start.

    Attributes:
      settings: with the folder and the sizes of a batch worked out.
      runner: over the run's devices.
      folder: the run's.
      console: where it speaks: nowhere in any process but the first.
      resuming: whether it goes on with the run that the folder holds.
      finished: the results of that run, if there is nothing to go on with.
    """

    settings: Kind
    runner: parallel.MeshRunner
    folder: pathlib.Path
    console: rich.console.Console
    resuming: bool
    finished: dict[str, Any] | None

    def open_folder(self) -> None:
        """Makes the folder, or removes what a killed run has left, once every process has found its input right."""
        parallel.wait_for_all("every process has checked its input")
        if parallel.is_first():
            if self.resuming:
                run_folder.remove_leftovers(self.folder)
            else:
                run_folder.start(self.folder, self.settings.to_dict())
        parallel.wait_for_all("the run's folder is there")


def begin(settings: Kind, default_folder: str, console: rich.console.Console | None) -> Start[Kind]:
    """Joins the other processes, and finds devices and folder; nothing is written yet.

    Args:
      settings: what to do; ``check`` is called first.
      default_folder: the run's folder where the settings name none.
      console: where progress and scores go; none: nowhere.

    Raises:
      InputError: on settings that are wrong, devices that are not there, or a folder that cannot be the run's.
    """
    settings.check()
    methods.get_methods(settings.method)
    keep_compiled_programs(settings.compilation_cache_dir)
    parallel.initialize(
        settings.coordinator_address, settings.num_processes, settings.process_id, settings.heartbeat_timeout_seconds
    )
    runner = parallel.make_runner(settings.parallel, fsdp=settings.fsdp, num_devices=settings.num_devices)
    console = console if console and parallel.is_first() else rich.console.Console(quiet=True)
    settings = dataclasses.replace(settings, output_dir=settings.output_dir or default_folder)
    folder, finished = pathlib.Path(str(settings.output_dir)), None
    resuming = settings.resume and (folder / "config.json").exists()
    if resuming:
        settings = settings.resuming(read_config(str(folder / "config.json"), type(settings)))
        finished = run_folder.read_results(folder)
    else:
        run_folder.check_free(folder, settings.overwrite)
    if finished is None:
        settings = settings.with_batch_size(runner.num_devices)
        if settings.report_to == "tensorboard":
            check_tensorboard()
    return Start(settings, runner, folder, console, resuming, finished)


def keep_compiled_programs(directory: str | None) -> None:
    """Turns on JAX's cache on disk, in a folder that nobody else can write: what lies in it will be executed.

    Raises:
      InputError: if the folder cannot be made, or others can write in it.
    """
    if directory is None:
        return
    path = pathlib.Path(directory).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--compilation_cache_dir {directory}: {error.strerror}") from None
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"--compilation_cache_dir {directory}: others can write in it; chmod 700, or another folder")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a second each by default, for some thirty
