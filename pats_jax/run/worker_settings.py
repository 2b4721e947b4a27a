"""The settings of `pats_jax.run.workers`."""

import dataclasses
from typing import ClassVar, Literal

from pats_jax.core.settings import Group, at_least, setting
from pats_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class WorkerSettings(Group):
    """Where child processes run, and how many at a time."""

    title: ClassVar[str] = "workers"

    jobs: int = setting(1, "number of parallel processes, which share the cores", at_least(1, 1000), is_basic=True)
    executor: Literal["local", "dask"] = setting(
        "local", "where to run: on this machine, or on the workers of a dask cluster"
    )
    scheduler: str | None = setting(None, "address of the dask scheduler, such as tcp://HOST:8786")

    def check(self) -> None:
        super().check()
        if self.executor == "local" and self.scheduler is not None:
            raise InputError("--scheduler: needs --executor dask")
        if self.executor == "dask" and self.scheduler is None:
            raise InputError("--executor dask: set --scheduler to the address of the dask scheduler")
        if self.executor == "dask" and self.jobs > 1:
            raise InputError("--jobs: with --executor dask, each worker runs one process; start more workers instead")
