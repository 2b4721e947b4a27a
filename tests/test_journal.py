"""What is logged is what can be read back, from metrics.jsonl, from TensorBoard's files and from the profiler's."""

import builtins
import gzip
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from pats_jax import glue
from pats_jax.errors import InputError
from pats_jax.run import replacing, run_folder
from pats_jax.run.journal import Journal, check_tensorboard
from pats_jax.training.profiling import Profiler, seconds_since_process_start
from pats_jax.training.runners import MeshRunner

TRAINED = {"step": 2, "loss": 0.5, "learning_rate": 1e-3, "skipped_steps": 0, "timing": {"seconds": 1.5}}
EVALUATED = {"step": 2, "eval": {"accuracy": 0.75}}


def scalars(folder):
    """(tag, step) -> value of all event files, with the record framing checked."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return found


def test_lines_and_scalars(tmp_path):
    with Journal(tmp_path, [], tensorboard=True) as journal:
        journal.write(TRAINED)
        journal.write(EVALUATED)
    assert run_folder.read_metrics(tmp_path) == [TRAINED, EVALUATED]
    assert scalars(tmp_path) == {
        ("train/loss", 2): 0.5,
        ("train/learning_rate", 2): pytest.approx(1e-3),
        ("train/skipped_steps", 2): 0,
        ("timing/seconds", 2): 1.5,
        ("eval/accuracy", 2): 0.75,
    }


def test_a_resumed_run_has_the_lines_up_to_its_checkpoint_only(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(TRAINED) + "\n" + '{"step": 4, "lo')
    with Journal(tmp_path, [TRAINED]) as journal:
        journal.write(EVALUATED)
    assert run_folder.read_metrics(tmp_path) == [TRAINED, EVALUATED]
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_that_is_not_installed(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        InputError, match=r"--report_to tensorboard: needs tensorboardX; run: pip install 'pats-jax\[tensorboard\]'"
    ):
        check_tensorboard()


@jax.jit
def double(x):
    return 2 * x


def traced_calls(folder):
    """How often the profiler saw the function `double`; it sees one call more than once."""
    (trace,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum("PjitFunction(double)" in event.get("name", "") for event in events)


@pytest.fixture(scope="module")
def seen_of_one_call(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    x = double(jnp.ones(3))
    with jax.profiler.trace(str(folder)):
        double(x)
    return traced_calls(folder)


STEPS = pytest.mark.parametrize("first, total, expected", [(0, 50, 10), (30, 100, 10), (0, 4, 4), (7, 12, 5)])


@STEPS
def test_the_profiler_runs_for_ten_steps_or_all_of_a_shorter_run(tmp_path, monkeypatch, first, total, expected):
    """By when JAX's profiler is started and stopped."""
    seen, running = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    with Profiler(tmp_path / "run", first, total) as profiler:
        for step in range(first + 1, total + 1):
            seen += [step] * len(running)
            profiler.after(step, jnp.ones(3))
    last = min(first + 20, total)
    assert not running and seen == list(range(last - expected + 1, last + 1))


@pytest.mark.slow
@STEPS
def test_the_profiler_sees_ten_steps_or_all_of_a_shorter_run(tmp_path, seen_of_one_call, first, total, expected):
    x = double(jnp.ones(3))
    with Profiler(tmp_path / "run", first, total) as profiler:
        for step in range(first + 1, total + 1):
            x = double(x)
            profiler.after(step, x)
    assert traced_calls(tmp_path / "run") == expected * seen_of_one_call > 0


def test_the_age_of_the_process_counts_from_its_start(tmp_path):
    program = (
        "import time; time.sleep(0.3)\n"
        "from pats_jax.training import profiling; print(profiling.seconds_since_process_start())"
    )
    begun = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True).stdout)
    assert 0.3 < age < time.perf_counter() - begun + 0.05
    assert seconds_since_process_start() > age, "this process is older"


def test_a_run_shows_itself(tmp_path):
    settings = tiny.quick_settings(
        tmp_path,
        output_dir=str(tmp_path / "run"),
        method="pats",
        length_buckets=2,
        max_steps=12,
        logging_steps=4,
        report_to="tensorboard",
        profile=True,
    )
    glue.run(settings)
    lines = [line for line in run_folder.read_metrics(tmp_path / "run") if "eval" not in line]
    figures = {"loss", "learning_rate", "grad_norm", "param_norm", "update_norm", "noise_norm", "noise_share"}
    figures |= {"padding_share", "skipped_steps"}
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert line.keys() == figures | {"step", "timing"}
        assert 0 < line["noise_share"] < 1 and 0 <= line["padding_share"] < 1 and line["skipped_steps"] == 0
        assert line["timing"].keys() == {"seconds", "data_wait_seconds", "examples_per_second", "tokens_per_second"}
    shown = scalars(tmp_path / "run")
    assert {tag for tag, _ in shown} >= {f"train/{name}" for name in figures} | {"eval/accuracy"}
    assert shown["train/loss", 8] == pytest.approx(lines[1]["loss"])
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert replacing.foreign(tmp_path / "run") is None


@pytest.mark.slow
def test_off_the_cpu_norms_are_those_of_logged_steps(tmp_path, monkeypatch):
    """Every step is logged, so both ways log the same norms; only the second measures none inside the step."""
    found = {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(MeshRunner, "platform", platform)
        folder = tmp_path / platform
        settings = {"layers": "separate", "unroll": 1, "length_buckets": 1, "max_steps": 3, "logging_steps": 1}
        glue.run(tiny.quick_settings(tmp_path, output_dir=str(folder), method="pats", **settings))
        lines = [line for line in run_folder.read_metrics(folder) if "eval" not in line]
        found[platform] = [(line["param_norm"], line["update_norm"]) for line in lines]
    assert len(found["gpu"]) == 3
    np.testing.assert_allclose(found["gpu"], found["cpu"], rtol=1e-3)
