"""The scheduler of child processes, with small programs as children: on this machine, and on two dask workers."""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import rich.console
import tiny

from pats_jax.comparison import compare
from pats_jax.errors import InputError
from pats_jax.run import folder_lock, workers
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.workers import Ended, Job, WorkerSettings
from pats_jax.training import preemption

# Counts to its number, keeps each count as a checkpoint, and writes its result; SIGTERM ends it between two counts.
CHILD = """
import os, pathlib, signal, sys, time
home, name, last = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def note(text):
    with (home / "notes").open("a") as file:
        file.write(f"{name} {text}\\n")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
saved = home / f"{name}.saved"
step = int(saved.read_text()) if saved.exists() else 0
note(f"from {step} by {os.getppid()}")
while step < last:
    time.sleep(0.05)
    step += 1
    saved.write_text(str(step))
    if asked:
        note(f"saved at {step}")
        sys.exit(143)
print("words:", sys.stdin.read())
(home / f"{name}.result").write_text("done")
"""


def job(home, name, *, last=1, code=CHILD, stdin=""):
    arguments = ("-S", "-c", code, str(home), name, str(last))
    return Job(name, arguments, str(home / f"{name}.log"), (str(home / f"{name}.result"),), stdin)


def notes(home):
    path = home / "notes"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


ONE = WorkerSettings()


def run(home, jobs, settings=ONE, asked=None, show=lambda running: None):
    """How each job ended, by its name, in the order in which they ended."""
    asked = asked or preemption.Preemption()
    with workers.hold(home) as lock, workers.connect(settings, lock) as fleet:
        with contextlib.closing(workers.run_jobs(jobs, fleet, home, asked, show)) as all_ended:
            return {job.name: ended for job, ended in all_ended}


def wait_until(holds, seconds=60):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.02)


# on this machine


def test_each_job_is_run_once_in_its_order(tmp_path):
    jobs = [job(tmp_path, f"run{number}", stdin=f"of {number}") for number in range(4)]
    found = run(tmp_path, jobs)
    assert list(found) == [one.name for one in jobs] and {ended.code for ended in found.values()} == {0}
    assert [line[0] for line in notes(tmp_path)] == list(found)
    assert (tmp_path / "run2.log").read_text() == "words: of 2\n" and found["run2"].seconds > 0.05
    assert run(tmp_path, jobs) == dict.fromkeys(found, Ended(0, 0.0)) and len(notes(tmp_path)) == 4
    assert not list(tmp_path.glob(".lock*"))


def test_several_run_at_a_time_on_cores_of_their_own(tmp_path):
    """Each of two waits until the other has started."""
    code = """
import os, pathlib, sys, time
home, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(home / f"{name}.here").write_text(" ".join(map(str, os.sched_getaffinity(0))))
until = time.monotonic() + 30
while len(list(home.glob("*.here"))) < 2 and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(0.5)  # so that it is seen
(home / f"{name}.result").touch()
sys.exit(time.monotonic() > until)
"""
    seen = set()
    jobs = [job(tmp_path, name, code=code) for name in ("one", "two")]
    found = run(
        tmp_path, jobs, WorkerSettings(jobs=2), show=lambda running: seen.add(tuple(one.name for one in running))
    )
    assert {ended.code for ended in found.values()} == {0} and ("one", "two") in seen
    cores = [set(path.read_text().split()) for path in tmp_path.glob("*.here")]
    assert workers.shares_of_cores(2)[0] is None or not cores[0] & cores[1]


def test_cores_are_dealt_out():
    assert workers.shares_of_cores(1) == [None]
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one core, or pins no processes")
    first, second = workers.shares_of_cores(2)
    assert first and second and not first & second and first | second == os.sched_getaffinity(0)
    assert workers.shares_of_cores(10_000) == [None] * 10_000


def test_a_failure_says_its_last_line(tmp_path):
    jobs = [
        job(tmp_path, "one", code="import sys; print('before'); sys.exit('pats-jax: error: no luck')"),
        job(tmp_path, "two", code="import os; os.kill(os.getpid(), 9)"),
        job(tmp_path, "three"),
    ]
    found = run(tmp_path, jobs)
    reasons = [workers.reason(one, found[one.name]) for one in jobs]
    assert reasons == ["no luck", "killed by signal 9: no output", None]
    assert workers.reason(jobs[0], Ended(None, 0.0)) == "its dask workers died, one after the other"


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    asked = preemption.Preemption()

    def show(running):
        if len(notes(tmp_path)) == 2:
            asked.signal_number = signal.SIGTERM

    jobs = [job(tmp_path, "short"), *(job(tmp_path, name, last=1000) for name in ("long", "later"))]
    assert run(tmp_path, jobs, asked=asked, show=show).keys() == {"short"}
    lines = notes(tmp_path)
    assert [line[0] for line in lines] == ["short", "long", "long"] and lines[-1][1] == "saved"
    saved = (tmp_path / "long.saved").read_text()
    assert lines[-1][-1] == saved and int(saved) < 1000


def test_whoever_stops_listening_stops_the_others(tmp_path):
    jobs = [job(tmp_path, "burns", code="raise SystemExit(3)"), job(tmp_path, "long", last=1000)]
    lock = FolderLock(tmp_path)
    with lock, workers.connect(WorkerSettings(jobs=2), lock) as fleet:
        with contextlib.closing(workers.run_jobs(jobs, fleet, tmp_path, preemption.Preemption())) as all_ended:
            assert next(all_ended)[1].code == 3
            wait_until(lambda: notes(tmp_path))
    assert notes(tmp_path)[-1][:2] == ["long", "saved"]


def test_a_second_ctrl_c_kills_what_is_deaf(tmp_path):
    code = "import pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN); "
    code += "pathlib.Path(sys.argv[1], 'here').touch(); time.sleep(60)"
    program = f"""
import contextlib, pathlib, signal, sys
from pats_jax.run import workers
from pats_jax.run.worker_settings import WorkerSettings
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run in the background
home = pathlib.Path({str(tmp_path)!r})
job = workers.Job("deaf", ("-S", "-c", {code!r}, str(home)), str(home / "log"))
with workers.hold(home) as lock, workers.connect(WorkerSettings(), lock) as fleet:
    with workers.note_signals() as asked, contextlib.closing(workers.run_jobs([job], fleet, home, asked)) as ended:
        list(ended)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    wait_until((tmp_path / "here").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "it waits for its child"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0 and b"KeyboardInterrupt" in process.stderr.read()
    with workers.hold(tmp_path):
        pass


def test_a_job_whose_child_of_an_earlier_worker_still_runs_waits_for_it(tmp_path, monkeypatch):
    """And finds it finished, so nothing is repeated."""
    one = job(tmp_path, "one")
    session = workers.Session("session", str(tmp_path), str(tmp_path), True, ())
    earlier = FolderLock(tmp_path, name=".lock-job-0")
    with earlier:
        monkeypatch.setattr(workers, "_SECONDS_TO_SAVE", 0.5)
        with pytest.raises(InputError, match="another pats-jax, or a process that it started"):
            workers.run_job(one, 0, session)
        (tmp_path / "one.result").touch()
    assert workers.run_job(one, 0, session) == Ended(0, 0.0) and notes(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the child of a worker ends with it on Linux only")
def test_a_child_ends_with_its_worker(tmp_path):
    program = f"""
import dataclasses
from pats_jax.run import workers
from tests.test_workers import job
import pathlib
home = pathlib.Path({str(tmp_path)!r})
workers.run_job(job(home, "one", last=1000), 0, workers.Session("session", str(home), str(home), True, ()))
"""
    root = pathlib.Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    worker = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path})
    wait_until(lambda: (tmp_path / "one.saved").exists())
    with pytest.raises(InputError), workers.hold(tmp_path):
        pass
    worker.kill()
    worker.wait()
    wait_until(lambda: notes(tmp_path)[-1][1] == "saved")
    wait_until(lambda: not folder_lock.is_taken(tmp_path / ".lock-job-0"))


# settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"jobs": 0}, "--jobs 0: must be at least 1"),
        ({"jobs": 1001}, "--jobs 1001: must be at most 1000"),
        ({"scheduler": "tcp://a:1"}, "--scheduler: needs --executor dask"),
        ({"executor": "dask"}, "--executor dask: set --scheduler"),
        ({"executor": "dask", "scheduler": "tcp://a:1", "jobs": 2}, "--jobs: with --executor dask"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(InputError, match=message):
        WorkerSettings(**changes).check()


def test_without_dask_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"--executor dask: needs .* pip install 'pats-jax\[dask\]'"):
        run(tmp_path, [], WorkerSettings(executor="dask", scheduler="tcp://127.0.0.1:8786"))


# on a cluster


def on_cluster(test):
    missing = importlib.util.find_spec("distributed") is None
    skipped = pytest.mark.skipif(missing, reason="distributed is not installed: pip install '.[dask]'")
    return pytest.mark.slow(skipped(test))


@pytest.fixture
def cluster(tmp_path):
    """Starts a scheduler on loopback; gives settings with its address, and a function that starts a worker."""
    processes = []

    def start(program, *flags):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *flags]
        root = str(pathlib.Path(__file__).parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        with (tmp_path / "cluster.log").open("ab") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
        return processes[-1]

    found = tmp_path / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(found))
    wait_until(lambda: found.exists() and found.read_text().strip().endswith("}"))
    address = json.loads(found.read_text())["address"]

    def start_worker(threads=1):
        flags = f"--nthreads {threads} --nworkers 1 --no-nanny --no-dashboard --host 127.0.0.1".split()
        return start("worker", address, *flags)

    yield WorkerSettings(executor="dask", scheduler=address), start_worker, processes[0]
    for process in processes:
        process.kill()
        process.wait()


def in_background(call, *args, **options):
    return concurrent.futures.ThreadPoolExecutor(1).submit(call, *args, **options)


@on_cluster
def test_a_killed_worker_costs_a_retry_and_no_result(tmp_path, cluster):
    """Its run resumes on the other worker from where it was saved; the finished ones are not repeated."""
    settings, start_worker, _ = cluster
    home = tmp_path / "home"
    home.mkdir()
    started = [start_worker(), start_worker()]
    jobs = [job(home, f"run{number}", last=60) for number in range(4)]
    ended = in_background(run, home, jobs, settings)
    wait_until(lambda: len(notes(home)) == 2 and len(list(home.glob("*.saved"))) == 2)
    first = {int(line[-1]): line[0] for line in notes(home)}
    killed, lost = next((worker, first[worker.pid]) for worker in started if worker.pid in first)
    killed.kill()
    found = ended.result(60)
    assert found.keys() == {one.name for one in jobs} and {one.code for one in found.values()} == {0}
    lines = notes(home)
    saved = next(int(line[-1]) for line in lines if line[1] == "saved")
    begun = [(line[0], int(line[2])) for line in lines if line[1] == "from"]
    assert 0 < saved < 60 and (lost, saved) in begun, "it resumes"
    assert sorted(begun) == sorted([(one.name, 0) for one in jobs] + [(lost, saved)]), "and nothing is repeated"
    assert run(home, jobs, settings) == {one.name: Ended(0, 0.0) for one in jobs} and notes(home) == lines


@on_cluster
def test_sets_of_runs_are_trained_by_workers(tmp_path, cluster, monkeypatch):
    """A grid of two methods in lanes, a set for each worker."""
    settings, start_worker, _ = cluster
    monkeypatch.setenv("XLA_FLAGS", tiny.flags_for_one_device())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        start_worker()
    root = tmp_path / "grid"
    flags = {
        **{"methods": ("finetune", "pats"), "seeds": ("1", "2"), "tasks": "sst2", "output_dir": root},
        **{"model_name_or_path": tiny.save_checkpoint(tmp_path / "model")},
        **{"data_dir": tiny.write_sst2(tmp_path / "data")},
        **{
            "max_seq_length": 16,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "executor": "dask",
            "scheduler": settings.scheduler,
        },
    }
    out = io.StringIO()
    compare.run(tiny.flags(**flags), rich.console.Console(file=out, width=200))
    found = json.loads((root / "comparison.json").read_text())
    assert {len(one["scores"]) for one in found["tasks"]["sst2"]["methods"].values()} == {2}
    assert sorted(path.name for path in (root / "lanes").iterdir()) == ["set1.log", "set2.log"]
    again = io.StringIO()
    compare.run(tiny.flags(**flags), rich.console.Console(file=again, width=200))
    assert "4 of 4 runs are already finished" in again.getvalue()


@on_cluster
def test_a_signal_reaches_children_on_workers(tmp_path, cluster):
    settings, start_worker, _ = cluster
    home = tmp_path / "home"
    home.mkdir()
    start_worker()
    asked = preemption.Preemption()
    jobs = [job(home, name, last=1000) for name in ("one", "two")]
    ended = in_background(run, home, jobs, settings, asked=asked)
    wait_until((home / "one.saved").exists)
    asked.signal_number = signal.SIGTERM
    assert ended.result(60) == {}
    assert [line[:2] for line in notes(home)] == [["one", "from"], ["one", "saved"]]


@on_cluster
def test_children_of_a_killed_program_go_on_and_keep_others_out(tmp_path, cluster):
    """What had not begun does not begin."""
    settings, start_worker, _ = cluster
    home = tmp_path / "home"
    home.mkdir()
    start_worker()
    program = f"""
import pathlib
from tests.test_workers import WorkerSettings, job, run
home = pathlib.Path({str(home)!r})
run(home, [job(home, name, last=100) for name in ("one", "two", "three")], {settings!r})
"""
    root = pathlib.Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path})
    wait_until((home / "one.saved").exists)
    killed.kill()
    killed.wait()
    with pytest.raises(InputError, match="another pats-jax, or a process that it started"), workers.hold(home):
        pass
    wait_until((home / "one.result").exists)
    wait_until(lambda: not folder_lock.is_taken(home / ".lock-job-0"))
    time.sleep(1)
    assert {line[0] for line in notes(home)} == {"one"}


@on_cluster
def test_a_cluster_that_does_not_fit_is_refused(tmp_path, cluster, caplog):
    settings, start_worker, scheduler = cluster
    home = tmp_path / "home"
    home.mkdir()
    start_worker(threads=2)
    ready = in_background(run, home, [], settings)
    assert ready.result(60) == {}, "a worker may come later"
    with pytest.raises(InputError, match=r"has 2 threads; start it with --nthreads 1"):
        wait_until(lambda: run(home, [], settings))
    with pytest.raises(InputError, match=r"--scheduler tcp://127.0.0.1:9: no dask scheduler answers there"):
        run(home, [], dataclasses.replace(settings, scheduler="tcp://127.0.0.1:9"))


@on_cluster
def test_the_loss_of_the_scheduler_is_said(tmp_path, cluster):
    settings, start_worker, scheduler = cluster
    home = tmp_path / "home"
    home.mkdir()
    start_worker()
    ended = in_background(run, home, [job(home, "one", last=200)], settings)
    wait_until((home / "one.saved").exists)
    scheduler.kill()
    with pytest.raises(InputError, match="the dask scheduler has ended or is not reachable; repeat the command"):
        ended.result(90)
