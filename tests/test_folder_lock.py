"""One program at a time in a folder: real processes, and those that a killed one leaves."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from pats_jax.comparison import compare
from pats_jax.errors import InputError
from pats_jax.run import folder_lock, run_start, workers
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.settings import Settings

AT_WORK = "another pats-jax, or a process that it started, is using it"
# Takes the lock, starts a process that holds it too, says its number and waits.
HOLDER = """
import pathlib, subprocess, sys, time
from pats_jax.run.folder_lock import FolderLock
with FolderLock(pathlib.Path(sys.argv[1])) as lock:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], pass_fds=lock.descriptors)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def is_free(folder):
    try:
        with FolderLock(folder):
            return True
    except InputError as error:
        assert str(error).startswith(f"--output_dir {folder}: {AT_WORK}")
        return False


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_process_leaves_no_lock_but_by_those_that_it_has_started(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        assert not is_free(tmp_path)
        holder.kill()
        holder.wait()
        assert not is_free(tmp_path), "what it has started is at work still"
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
    wait_until(lambda: is_free(tmp_path))
    assert not (tmp_path / ".lock").exists()


def test_the_file_goes_with_the_lock_and_its_holder_may_move_the_folder(tmp_path):
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    first.take()
    (tmp_path / "run").rename(tmp_path / "moved")
    second.take()  # of a new folder
    assert not is_free(tmp_path / "moved")
    first.release()
    assert not is_free(tmp_path / "run") and (tmp_path / "run" / ".lock").exists()
    second.release()
    assert not list((tmp_path / "run").iterdir()) and is_free(tmp_path / "run")


def test_a_lock_is_taken_where_the_folder_is_now(tmp_path):
    with FolderLock(tmp_path / "run") as lock:
        (tmp_path / "run").rename(tmp_path / "moved")
        lock.take()
        assert not is_free(tmp_path / "run") and is_free(tmp_path / "moved")


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FolderLock(tmp_path):
        assert "the file system has no locks" in caplog.text


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"run: cannot be written \(\.lock is a link\)"), FolderLock(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


# runs


def begin(folder, **changes):
    return run_start.begin(Settings(task_name="sst2", output_dir=str(folder), **changes), "", None)


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}], ids=str)
def test_one_run_at_a_time(how, tmp_path):
    folder = tmp_path / "run"
    with begin(folder) as start:
        start.open_folder()
        before = (folder / "config.json").stat()
        with pytest.raises(InputError, match=AT_WORK):
            begin(folder, **how)
        assert (folder / "config.json").stat() == before
    with begin(folder, **how) as start:
        start.open_folder()


def test_two_runs_that_begin_at_once(tmp_path):
    """Both find the folder empty; the second finds out when it is about to write."""
    with begin(tmp_path / "run") as first, begin(tmp_path / "run") as second:
        first.open_folder()
        with pytest.raises(InputError, match=AT_WORK):
            second.open_folder()
    with pytest.raises(InputError, match="not empty"):
        begin(tmp_path / "run")


def test_a_run_that_another_has_finished_meanwhile_is_not_made_again(tmp_path):
    with begin(tmp_path / "run") as start:
        start.open_folder()
    with begin(tmp_path / "run", resume=True) as late:
        with begin(tmp_path / "run", resume=True) as start:
            start.open_folder()
            start.finish({"seed": 1, "method": "pats", "data": "sst2"})
        with pytest.raises(InputError, match="another pats-jax finished the run; repeat the command"):
            late.open_folder()
    with FolderLock(tmp_path / "run"), begin(tmp_path / "run", resume=True) as start:
        assert start.finished["seed"] == 1, "to read a finished run nobody needs the lock"


# gyms


def test_processes_of_one_gym_know_that_it_is_theirs(tmp_path, monkeypatch):
    """By the folder's own lock, or by that of their job."""
    with workers.hold(tmp_path) as lock, FolderLock(tmp_path, name=".lock-job-3") as own:
        for held in (lock, own):
            monkeypatch.delenv("PATS_JAX_LOCK", raising=False)
            assert not folder_lock.is_handed_on(tmp_path)
            for name, value in folder_lock.handed_on(held).items():
                monkeypatch.setenv(name, value)
            assert folder_lock.is_handed_on(tmp_path) and not folder_lock.is_handed_on(tmp_path / "another")
    assert not folder_lock.is_handed_on(tmp_path), "it is not held any more"


@pytest.mark.parametrize("name", [".lock", ".lock-job-0"])
def test_another_program_and_a_job_of_a_killed_one_keep_a_gym_out(name, tmp_path):
    with FolderLock(tmp_path, name=name), pytest.raises(InputError, match=AT_WORK), workers.hold(tmp_path):
        pass
    with workers.hold(tmp_path):
        assert not is_free(tmp_path)


# grids

GRID = """
import sys
from pats_jax.programs import cli
from pats_jax.comparison import compare
from pats_jax.run import machine, workers
workers.describe_machine = lambda: {}
machine.find_devices = machine.Devices
compare.run_arguments = lambda run, root, flags: ["-S", "-c", sys.argv[1]]
cli.main(["compare", *sys.argv[2:]])
"""


def test_no_grid_starts_over_the_runs_of_a_killed_one(tmp_path):
    grid, pid = tmp_path / "grid", tmp_path / "pid"
    run = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    flags = f"--methods finetune --tasks sst2 --seeds 1 --output_dir {grid}".split()
    killed = subprocess.Popen([sys.executable, "-c", GRID, run, *flags], stderr=subprocess.DEVNULL)
    wait_until(lambda: killed.poll() is not None or (pid.exists() and pid.read_text()))
    killed.kill()
    killed.wait()
    try:
        with pytest.raises(InputError, match=AT_WORK):
            compare.run(flags, rich.console.Console(quiet=True))
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    wait_until(lambda: is_free(grid))
