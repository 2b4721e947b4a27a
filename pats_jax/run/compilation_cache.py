"""JAX's cache of compiled programs on disk, which the programs turn on."""

import logging
import os
import pathlib
import stat

import filelock
import jax

from pats_jax.errors import InputError

logger = logging.getLogger(__name__)

NONE = "none"  # value of --compilation_cache_dir that turns the cache off
MAX_BYTES = 4 * 2**30  # of the user's cache folder; what was not used for longest is removed first


def keep_compiled_programs(directory: str | None) -> None:
    """Turns JAX's on-disk cache on, in a folder that nobody else can write to, because its contents are executed.

    XLA keeps its choice of the fastest GPU kernels there too, which is JAX's default.

    Args:
      directory: the folder; "none" for no cache; None for ``pats_jax/compilation`` in the user's cache folder, unless
        JAX is configured to use another. If that one cannot be used, a warning says so.

    Raises:
      InputError: if the folder was given and cannot be created, or others can write to it.
    """
    if directory == NONE:
        jax.config.update("jax_enable_compilation_cache", False)
    elif directory is not None:
        _turn_on(_private_folder(pathlib.Path(directory).absolute(), directory))
    elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        try:
            folder = _private_folder(user_folder(), None)
            _remove_unfinished(folder)
        except (InputError, OSError, RuntimeError) as error:
            logger.warning("compiled programs are not kept: %s", error)
        else:
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
            _turn_on(folder)


def user_folder() -> pathlib.Path:
    """``$XDG_CACHE_HOME/pats_jax/compilation``, or the same in ``~/.cache``.

    Raises:
      RuntimeError: if there is no home folder.
    """
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else pathlib.Path.home() / ".cache"  # relative ones are void, says the standard
    return base / "pats_jax" / "compilation"


def _private_folder(path: pathlib.Path, given: str | None) -> pathlib.Path:
    """The folder, created if missing.

    Raises:
      InputError: if it was given and cannot be used.
    """
    what = path if given is None else f"--compilation_cache_dir {given}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}") from None
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"{what}: others can write to it; chmod 700 it or choose another")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{what}: cannot be written")
    return path


def _turn_on(folder: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a second each by default, for some thirty


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes programs that a killed process or a full disk left incomplete: JAX would fail on them each time.

    In a folder of limited size, JAX writes the time of the last use after the program itself, both under one lock.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        for program in folder.glob("*-cache"):
            used = program.with_name(f"{program.name.removesuffix('-cache')}-atime")
            if not used.exists() or used.stat().st_size == 0:
                program.unlink()
