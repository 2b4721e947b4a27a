"""Two processes over loopback, four virtual devices each: as one process with eight, and never a hang."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from pats_jax.run import run_folder

pytestmark = pytest.mark.slow  # two processes at once, each of which starts, compiles and waits for the other


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a run of 20 steps without dropout, whose batches of 16 rows end in a ragged one."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.save_checkpoint(folder / "checkpoint")
    config = folder / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"classifier_dropout": 0.1', '"classifier_dropout": 0.0'))
    tiny.write_sst2(folder / "data")
    return {
        "model_name_or_path": folder / "checkpoint",
        "task_name": "sst2",
        "data_dir": folder / "data",
        "max_seq_length": 16,
        "train_batch_size": 16,
        "learning_rate": 1e-3,
        "method": "pats",
        "noise_scale": 0.01,
        "length_buckets": 1,
        "sensitivity_batches": 1,
        "max_steps": 20,
        "logging_steps": 4,
        "eval_steps": 10,
        "save_steps": 10,
        "heartbeat_timeout_seconds": 20,
    }


def launch(base, devices, environment=None, **changes):
    flags = [f"--{name}={value}" for name, value in (base | changes).items() if value is not True]
    flags += [f"--{name}" for name, value in changes.items() if value is True]
    xla = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(base["data_dir"]).parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "pats_jax", "glue", *flags]
    return subprocess.Popen(command, env=os.environ | xla | (environment or {}), text=True, stderr=subprocess.PIPE)


def launch_two(base, **changes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = base | {"coordinator_address": address, "num_processes": 2}
    return [launch(joined, 4, process_id=number, **changes) for number in range(2)]


def finish(*processes):
    """Exit codes and what was said on standard error."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    codes, said = finish(launch(base, 8, output_dir=folder))
    assert codes == [0], said
    return folder


def assert_close(folder, alone):
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, alone))
    for name, tensor in expected.items():
        if not name.endswith("key.bias"):  # its gradient is nothing but rounding, which Adam magnifies
            np.testing.assert_allclose(weights[name], tensor, rtol=0, atol=2e-4, err_msg=name)
    ours, theirs = run_folder.read_metrics(folder), run_folder.read_metrics(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.get("eval") == b.get("eval") and a.get("padding_share") == b.get("padding_share")
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    after = [
        json.loads((path / "results.json").read_text())["concentration"]["after"]["all"] for path in (folder, alone)
    ]
    assert after[0] == pytest.approx(after[1], rel=1e-3)


def test_two_processes_are_one(base, alone, tmp_path):
    codes, said = finish(*launch_two(base, output_dir=tmp_path / "run"))
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", alone)
    assert all("16 rows per step: 2 x 8 devices of 2 processes" in text for text in said)


def test_slurm_is_joined_by_itself_with_pmap(base, alone, tmp_path):
    described = {
        "SLURM_JOB_ID": str(random.randrange(10**6)),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    processes = [
        launch(
            base,
            4,
            described | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            output_dir=tmp_path / "run",
            parallel="pmap",
        )
        for number in range(2)
    ]
    codes, said = finish(*processes)
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", alone)


def wait_for_steps(folder, processes):
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert all(process.poll() is None for process in processes), finish(*processes)
        time.sleep(0.05)


def test_sigterm_to_one_saves_both_and_one_process_goes_on(base, alone, tmp_path):
    folder = tmp_path / "run"
    processes = launch_two(base, output_dir=folder, max_steps=4000, eval_steps=4000, save_steps=0)
    wait_for_steps(folder, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(*processes)
    assert codes == [143, 143], said
    assert all("interrupted and saved" in text for text in said)
    (saved,) = (int(path.name) for path in (folder / "checkpoints").iterdir())
    more = {"max_steps": 4000, "eval_steps": 4000, "save_steps": 0}
    process = launch(base, 8, output_dir=folder, resume=True, **more)
    while f"resuming after step {saved} of 4000" not in (line := process.stderr.readline()):
        assert line, "it ended before it went on"
    process.kill()
    process.wait()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_peer_ends_the_other(base, tmp_path, dead):
    processes = launch_two(base, output_dir=tmp_path / "run", max_steps=100_000, eval_steps=100_000, save_steps=0)
    wait_for_steps(tmp_path / "run", processes)
    processes[dead].kill()
    killed = time.monotonic()
    codes, _ = finish(processes[1 - dead])
    assert codes[0] != 0 and time.monotonic() - killed < 60


def test_a_run_of_pmap_goes_on_in_two_processes(base, alone, tmp_path):
    """From the checkpoint of one process with eight devices and a mesh; both find the newer one damaged."""
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    (folder / "results.json").unlink()
    (folder / "checkpoints" / "20" / "state" / "manifest.ocdbt").write_bytes(b"")
    codes, said = finish(*launch_two(base, output_dir=folder, resume=True, parallel="pmap"))
    assert codes == [0, 0] and all("resuming after step 10 of 20" in text for text in said), said
    assert "20 is damaged: state/manifest.ocdbt does not match what was saved; renamed to 20.damaged" in said[0]
    assert (folder / "checkpoints" / "20.damaged").is_dir()
    assert_close(folder, alone)
