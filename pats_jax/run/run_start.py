"""How a run starts: devices, the output folder, and whether to resume the run in it."""

import contextlib
import dataclasses
import logging
import os
import pathlib
from typing import Generic

import jax
import rich.console

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError
from pats_jax.run import compilation_cache, hub, replacing, run_folder, xla_flags
from pats_jax.run.flags import read_config
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.journal import check_tensorboard
from pats_jax.run.settings import Kind, resuming as resuming_settings
from pats_jax.training import runners

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start(Generic[Kind]):
    """A run that is about to start; a context manager that releases the folder at its end.

    Attributes:
      settings: the settings, with folder, layers and batch sizes filled in.
      runner: runs steps on the run's devices.
      folder: the output folder.
      console: where process 0 prints; silent in all others.
      resuming: whether the run resumes the one in the folder.
      finished: the results of that run, if it is already finished.
      lock: the lock of the folder, which process 0 takes.
    """

    settings: Kind
    runner: runners.MeshRunner
    folder: pathlib.Path
    console: rich.console.Console
    resuming: bool
    finished: JsonObject | None
    lock: FolderLock

    def __enter__(self) -> "Start[Kind]":
        return self

    def __exit__(self, *error) -> None:
        self.lock.release()

    def open_folder(self) -> None:
        """Creates the folder, or removes what a killed run left there, once every process has checked its input.

        Raises:
          InputError: in all processes, if another program is using the folder or it cannot be written.
        """
        runners.wait_for_all("every process has checked its input")
        failure = None
        if runners.is_first():
            try:
                self._open()
            except InputError as error:
                failure = error
        is_open = runners.first_says(failure is None)
        if failure is not None:
            raise failure
        if not is_open:
            raise InputError(f"--output_dir {self.folder}: process 0 cannot use it; see its message")

    def finish(self, results: JsonObject) -> None:
        """Writes results.json, which marks the run as finished, and removes the run that it replaces; for process 0."""
        run_folder.write_results(self.folder, results)
        replacing.discard(self.folder)

    def _open(self):
        folder, overwrite = self.folder, self.settings.folder.overwrite
        self.lock.take()
        if self.resuming:
            if run_folder.read_results(folder) is not None:
                raise InputError(f"--output_dir {folder}: another pats-jax finished the run; repeat the command")
            run_folder.check_links(folder)
            run_folder.remove_leftovers(folder)
            return
        run_folder.check_free(folder, overwrite)  # it may hold something else by now
        previous = replacing.kept(folder)
        if previous and not overwrite:
            replacing.keep_for_good(previous)
        moved = replacing.set_aside(folder) if replacing.contents(folder) else None
        try:
            self.lock.take()  # that of before went with the run that was there
            run_folder.start(folder, self.settings.to_dict())
        except InputError:
            replacing.put_back(folder, moved)
            raise
        previous = replacing.kept(folder)
        if previous:
            logger.info("the previous run is kept as %s until this one is finished", previous)


def begin(settings: Kind, default_folder: str, console: rich.console.Console | None) -> Start[Kind]:
    """Connects to the other processes, and finds devices and folder; writes nothing yet.

    Args:
      settings: the settings of the run; ``check`` is called first.
      default_folder: the output folder if the settings name none.
      console: where to print progress and scores; None: nowhere.

    Raises:
      InputError: if settings are not valid, devices are missing, or the folder cannot be used.
    """
    settings.check()
    if settings.hub.push_to_hub:
        hub.check_ready(settings.hub.hub_model_id, "--push_to_hub")
    processes, devices, compiler = settings.processes, settings.devices, settings.compiler
    xla_flags.set_defaults(compiler.deterministic)
    compilation_cache.keep_compiled_programs(compiler.compilation_cache_dir)
    runners.initialize(
        processes.coordinator_address,
        processes.num_processes,
        processes.process_id,
        processes.heartbeat_timeout_seconds,
    )
    runner = runners.make_runner(devices.parallel, fsdp=devices.fsdp, num_devices=devices.num_devices)
    console = console if console and runners.is_first() else rich.console.Console(quiet=True)
    settings = settings.replace(output_dir=settings.folder.output_dir or default_folder)
    settings = settings.with_layers(*runners.default_form(runner.platform), settings.adapter)
    folder = pathlib.Path(str(settings.folder.output_dir))
    lock = FolderLock(folder)
    resuming = settings.folder.resume and (folder / "config.json").exists()
    finished = run_folder.read_results(folder) if resuming else None
    with contextlib.ExitStack() as failing:
        failing.callback(lock.release)
        if finished is None and os.path.lexists(lock.path) and jax.process_count() == 1:
            lock.take()  # now already, as nothing need be made for it
        if resuming:
            settings = resuming_settings(settings, read_config(str(folder / "config.json"), type(settings)))
            if finished is None:
                run_folder.check_links(folder)
        else:
            run_folder.check_free(folder, settings.folder.overwrite)
            if settings.folder.overwrite:
                replacing.check_inputs(folder, settings)
        if finished is None:
            settings = settings.over(runner.num_devices)
            if settings.loop.report_to == "tensorboard":
                check_tensorboard()
        failing.pop_all()
    return Start(settings, runner, folder, console, resuming, finished, lock)
