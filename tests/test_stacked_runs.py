"""`pats-jax glue` and `prime` with stacked layers: what is written has separate ones, and is that of a separate run."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import tiny
from safetensors.numpy import load_file

from pats_jax import TrainState, glue
from pats_jax.errors import InputError
from pats_jax.priming import downstream, upstream
from pats_jax.priming.few_shot_tuning import TuningStart, load_start
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run import run_folder
from pats_jax.run.settings import Settings
from pats_jax.training.loop import Hooks, Rhythm, fit

LAYERS = 2
SMALL = {"lora_rank": 2, "adapter_size": 3, "prompt_length": 4, "prefix_length": 4, "lora_dropout": 0.1}
METHODS = [
    "dps-mix+lnsr",
    "mixout+pats",
    "dps-dense",
    "sift",
    "child-d",
    "child-f",
    "r3f",
    "smart",
    "noisytune",
    "perturbed",
]
KINDS = ["lora", "adalora", "adapters", "ia3", "bitfit", "prompt", "prefix"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacked")
    settings = tiny.quick_settings(folder, max_steps=6, learning_rate=1e-3, logging_steps=2)
    tiny.save_checkpoint(folder / "checkpoint", num_hidden_layers=LAYERS, attention_probs_dropout_prob=0.1)
    return settings


def run(base, folder, layers, **changes):
    own = tiny.read_flags(Settings, **SMALL | {"update_ratio": 0.3} | changes)
    settings = dataclasses.replace(base, output_dir=str(folder / layers), layers=layers, **own)
    results = glue.run(settings)
    assert json.loads((folder / layers / "config.json").read_text())["layers"] == layers
    return results


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        ({"lora_layers": r"layer\.1\..*query$"}, "separate"),
        ({"lora_layers": r"layer\.\d*[02468]\."}, "separate"),
        ({"lora_layers": r"\.(query|key|value)$"}, "stacked"),
        ({"lora_layers": "dense"}, "stacked"),
        ({"peft": "ia3", "ia3_input_layers": "", "ia3_output_layers": r"layer\.[01]\..*key$"}, "separate"),
        ({"peft": "ia3"}, "stacked"),
        ({"peft": None}, "stacked"),
    ],
)
def test_an_adapter_on_some_layers_gets_separate_ones_where_the_backend_would_stack_them(flags, layers):
    settings = Settings(**{"task_name": "rte", "peft": "lora"} | flags)
    assert settings.with_layers("stacked", 0, settings.adapter).model.layers == layers
    stacked = settings.replace(layers="stacked").with_layers("separate", 1, settings.adapter)
    assert stacked.model.layers == "stacked"


def assert_same_files(folder, parts):
    """Tensors by their names within DESIGN's bounds; but key biases, whose gradient is nothing but rounding."""
    for part in parts:
        ours, expected = (
            load_file(next((folder / name / part).glob("*.safetensors"))) for name in ("stacked", "separate")
        )
        assert ours.keys() == expected.keys()
        for name, theirs in expected.items():
            if not name.endswith("key.bias"):
                np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=2e-4, err_msg=name)


def assert_same_figures(ours, expected):
    """Of JSON: the same keys, words and counts, and nearly the same numbers."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name in expected.keys() - {"timing"}:
            assert_same_figures(ours[name], expected[name])
    elif isinstance(expected, list):
        for one, other in zip(ours, expected, strict=True):
            assert_same_figures(one, other)
    elif isinstance(expected, float):
        assert ours == pytest.approx(expected, rel=2e-3, abs=2e-3)
    else:
        assert ours == expected


MEASURED = {"noise_scale": 0.1, "sensitivity_batches": 1, "sift_rate": 0.2}
SAVED = {"method": "pats", "save_steps": 3, "save_total_limit": None, "attention_dropout": 0.0}


def assert_same_runs(folder, found):
    assert_same_files(folder, ["model"])
    assert_same_figures(found["stacked"], found["separate"])
    assert_same_figures(*(run_folder.read_metrics(folder / name) for name in found))
    names = found["stacked"]["concentration"]["after"].keys()
    assert {f"bert.encoder.layer.{number}.output.dense.kernel" for number in range(LAYERS)} <= names
    card = (folder / "stacked" / "README.md").read_text()
    assert card.count("encoder.layer.output") == 0


@pytest.fixture(scope="module")
def pats_runs(base, tmp_path_factory):
    """The folder of two runs of PATS with checkpoints, and what they return."""
    folder = tmp_path_factory.mktemp("pats")
    return folder, {layers: run(base, folder, layers, **MEASURED, **SAVED) for layers in ("separate", "stacked")}


@pytest.mark.slow  # test_model_layers.py and test_layers.py have its parts
def test_pats(pats_runs):
    assert_same_runs(*pats_runs)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method(base, tmp_path, method):
    found = {layers: run(base, tmp_path, layers, method=method, **MEASURED) for layers in ("separate", "stacked")}
    assert_same_runs(tmp_path, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter(base, tmp_path, kind):
    found = {
        layers: run(base, tmp_path, layers, peft=kind, sensitivity_batches=1) for layers in ("separate", "stacked")
    }
    assert_same_files(tmp_path, [part for part in ("adapter", "model") if (tmp_path / "separate" / part).exists()])
    assert_same_figures(found["stacked"], found["separate"])


@pytest.mark.slow  # test_checkpoint_layers.py has the state that it restores
def test_an_interrupted_run_goes_on_in_the_other_layout(base, pats_runs, tmp_path):
    shutil.copytree(pats_runs[0], tmp_path, dirs_exist_ok=True)
    for step in (tmp_path / "stacked" / "checkpoints").iterdir():
        if int(step.name) > 3:
            step.rename(tmp_path / step.name)
    (tmp_path / "stacked" / "results.json").unlink()
    changes = tiny.read_flags(Settings, **MEASURED, **SAVED)
    resumed = base.replace(output_dir=str(tmp_path / "stacked"), layers="separate", resume=True, **changes)
    glue.run(resumed)
    assert_same_files(tmp_path, ["model"])
    assert_same_figures(*(run_folder.read_metrics(tmp_path / name) for name in ("stacked", "separate")))


def test_a_divergence_names_the_separate_layer():
    kernel = jnp.array([[[1.0, 2.0]], [[3.0, -9.0]]])
    params = {"bert": {"encoder": {"layer": {"output": {"kernel": kernel}}}}, "bias": jnp.ones(3)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1), key=0)
    counts = {"examples": 1.0, "tokens": 1.0, "computed_tokens": 1.0}
    rhythm = Rhythm(total_steps=1, logging_steps=1, eval_steps=1)

    def step(state, batch):
        return state, {"loss": np.nan, "skipped": 1.0}

    hooks = Hooks()
    hooks.metric = "accuracy"
    with pytest.raises(InputError, match=r"the largest parameter is in bert\.encoder\.layer\.1\.output\.kernel \(9\)"):
        fit(state, step, iter([({}, counts)]), rhythm, hooks)


def test_an_adapter_of_one_layer_needs_separate_layers(base, tmp_path):
    with pytest.raises(InputError, match=r"the adapter changes 1 of 2 layers: .*separate layers") as caught:
        run(base, tmp_path, "stacked", peft="lora", lora_layers=r"layer\.1\..*\.query$")
    assert "\n" not in str(caught.value) and not (tmp_path / "stacked").exists()


@pytest.fixture(scope="module")
def gym(tmp_path_factory):
    home = tiny.write_gym_home(tmp_path_factory.mktemp("home"))
    tiny.save_checkpoint(home / "model", num_hidden_layers=LAYERS)
    path = home / "one_shape.json"
    path.write_text(json.dumps(tiny.PARTITION | {"train": ["weather", "voice"], "dev": []}))
    return home


PRIMED = [("mtl", "plm"), ("maml", "plm"), ("fomaml", "pe"), ("reptile", "plm+pe")]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, train", PRIMED)
def test_priming(gym, tmp_path, algorithm, train):
    settings = PrimingSettings(
        model_name_or_path=str(gym / "model"),
        data_dir=str(gym / "gym"),
        partition=str(gym / "one_shape.json"),
        algorithm=algorithm,
        train=train,
        peft="lora" if "pe" in train else None,
        max_seq_length=16,
        max_steps=3,
        learning_rate=1e-3,
        tasks_per_step=2,
        inner_learning_rate=0.1,
        inner_batch_size=4,
        task_batch_size=4,
        save_steps=0,
        num_devices=1,
        **({"lora_rank": 2} if "pe" in train else {}),
    )
    for layers in ("separate", "stacked"):
        upstream.run(dataclasses.replace(settings, output_dir=str(tmp_path / layers), layers=layers))
    assert_same_files(tmp_path, [part for part in ("adapter", "model") if (tmp_path / "separate" / part).exists()])


def test_a_tuning_of_the_gym_loads_the_layout_that_is_asked_for(gym):
    start = TuningStart("direct", None, None, str(gym / "model"), None, str(gym / "model"), "full")
    for layers, expected in (("auto", "separate"), ("stacked", "stacked")):
        model, _ = load_start(GymSettings(layers=layers, unroll=2, output_dir="unused"), start)
        assert (model.layers, model.unroll) == (expected, 2)


@pytest.mark.slow
def test_a_gym_with_stacked_layers_has_the_same_records(gym, tmp_path):
    settings = GymSettings(
        model_name_or_path=str(gym / "model"),
        data_dir=str(gym / "gym"),
        partition=str(gym / "partition.json"),
        kinds=("full", "lora"),
        tasks=("manners",),
        samples=(13,),
        grid=("full=1e-3", "lora=1e-2"),
        method="pats",
        max_seq_length=16,
        max_steps=3,
        eval_steps=1,
        lora_rank=2,
        compilation_cache_dir=str(tmp_path / "compiled"),
    )
    for layers in ("separate", "stacked"):
        changed = dataclasses.replace(settings, output_dir=str(tmp_path / layers), layers=layers)
        downstream.run(changed, [], rich.console.Console(quiet=True))
    ours, theirs = (sorted((tmp_path / name / "tunings").glob("*/*.json")) for name in ("stacked", "separate"))
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        found = [{k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"} for path in (one, other)]
        assert_same_figures(*found)
