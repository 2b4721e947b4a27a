"""One program at a time in a folder: a lock that lasts as long as one of the processes that hold it.

It is the system's own lock (`flock`) on the file ``.lock``, so a killed program leaves none behind. Child processes
that inherit the descriptor keep the lock: the runs of a killed grid, for example, until the last one has ended.
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import time

from pats_jax.errors import InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"

_INHERITED = "PATS_JAX_LOCK"  # environment variable: number of a descriptor that holds a lock of the folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """The lock of a folder, initially not held; a context manager that takes and releases it."""

    def __init__(self, folder: pathlib.Path, *, name: str = LOCK, shared: bool = False, patience: float = 0.3):
        """Creates the lock without taking it.

        Args:
          folder: the folder.
          name: the lock's file in the folder.
          shared: whether other processes that share the lock may hold it too.
          patience: seconds to wait for others.
        """
        self._descriptor: int | None = None
        self.path, self._shared, self._patience = folder / name, shared, patience

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Descriptors for ``pass_fds`` of a process that is to hold the lock too; empty while it is not held."""
        return () if self._descriptor is None else (self._descriptor,)

    def __enter__(self) -> "FolderLock":
        self.take()
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def take(self) -> None:
        """Takes the lock and creates its folder; does nothing if the lock is held and the folder was not moved.

        Raises:
          InputError: if another process holds it, or the folder cannot be written.
        """
        if self._descriptor is not None and _is_at(self._descriptor, self.path):
            return
        folder, until = self.path.parent, time.monotonic() + self._patience
        try:
            while (taken := self._try_to_take()) is None:
                if time.monotonic() >= until:
                    raise in_use(folder)
                time.sleep(0.05)
        except OSError as error:
            reason = f"{self.path.name} is a link" if error.errno == errno.ELOOP else error.strerror
            raise InputError(f"--output_dir {folder}: cannot be written ({reason})") from None
        self.release()
        self._descriptor = taken

    def release(self) -> None:
        """Releases the lock, if it is held, and removes its file unless others hold it too."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(self._descriptor, self.path):  # else it belongs to another by now
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _try_to_take(self):
        """A descriptor that holds the lock; None if another process holds it, or has just removed the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if _lock(descriptor, self._shared, self.path.parent) and _is_at(descriptor, self.path):
                return os.dup(descriptor)
        finally:
            os.close(descriptor)
        return None


def in_use(folder: pathlib.Path) -> InputError:
    """The error for a folder whose lock is held."""
    return InputError(
        f"--output_dir {folder}: another pats-jax, or a process that it started, is using it; "
        "wait until it ends, or choose another folder"
    )


def is_taken(path: pathlib.Path) -> bool:
    """Whether any process holds the lock with this file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _lock(descriptor, False, path.parent)
    finally:
        os.close(descriptor)


def handed_on(lock: FolderLock) -> dict[str, str]:
    """The environment variable that tells a process that it inherits a lock of its folder."""
    (descriptor,) = lock.descriptors
    return {_INHERITED: str(descriptor)}


def is_handed_on(folder: pathlib.Path) -> bool:
    """Whether this process inherits a lock in the folder from the process that started it."""
    number = os.environ.get(_INHERITED, "")
    return number.isdecimal() and any(_is_at(int(number), path) for path in folder.glob(f"{LOCK}*"))


def _lock(descriptor, shared, folder):
    """Tries to take the lock; returns whether it is held now."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: the file system has no locks; do not run another pats-jax there at the same time", folder)
    return True


def _is_at(descriptor, path):
    """Whether a descriptor's file is still at a path; the previous holder of its lock may have removed it."""
    try:
        ours, theirs = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
