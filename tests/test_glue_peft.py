"""``--peft`` in the GLUE program, on a random checkpoint and tables small enough for seconds."""

import csv
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import scipy.special
import tiny
from safetensors.numpy import load_file

from pats_jax import glue, methods, models, pats_noise, trees
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.programs import cli
from pats_jax.run import pe_modules
from pats_jax.run.settings import Settings

KINDS = tuple(peft.KINDS)
SMALL = {
    "lora_rank": 2,
    "adalora_init_r": 3,
    "adalora_target_r": 2,
    "adapter_size": 3,
    "prompt_length": 4,
    "prefix_length": 4,
    "lora_dropout": 0.1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.quick_settings(tmp_path_factory.mktemp("glue"), num_train_epochs=2)


def run(base, folder, **changes):
    changes = tiny.read_flags(Settings, **SMALL | changes)
    return glue.run(dataclasses.replace(base, output_dir=str(folder), **changes))


def predicted(folder, capsys, texts):
    """The probabilities (rows, classes) that `pats-jax predict` gives."""
    capsys.readouterr()
    cli.main(["predict", str(folder), "--file", str(texts)])
    _, *rows = csv.reader(io.StringIO(capsys.readouterr().out), delimiter="\t")
    return np.array([row[2:-1] for row in rows], float)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(tiny.sentences(6, 9)[0]) + "\n")
    return path


def test_lora_with_pats(base, tmp_path, texts, capsys, caplog):
    """Adapter and merged model answer alike, and only what the run says was trained."""
    caplog.set_level("INFO")
    results = run(base, tmp_path / "run", peft="lora", method="pats", noise_scale=0.1)
    trained = 2 * 2 * 2 * 16 + 2 * 16 + 2
    assert results["peft"] == "lora" and results["trained_parameters"] == trained
    assert f"training {trained} of {results['num_parameters']} parameters" in caplog.text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["trained_parameters"] == trained
    start, merged = (load_file(folder / "model.safetensors") for folder in _folders(base, tmp_path))
    moved = {name for name in start if not np.array_equal(start[name], merged[name])}
    layer = "bert.encoder.layer.0.attention.self"
    assert moved == {f"{layer}.query.weight", f"{layer}.value.weight"}
    by_adapter, by_model = (predicted(tmp_path / "run" / part, capsys, texts) for part in ("adapter", "model"))
    np.testing.assert_allclose(by_adapter, by_model, atol=2e-4)
    expected = scipy.special.softmax(tiny.reference_logits(tmp_path / "run" / "model", _lines(texts), max_length=16), 1)
    np.testing.assert_allclose(by_model, expected, atol=2e-4)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"`--peft lora` ({trained} of" in card and "`adapter/`" in card and "So does PEFT (torch)" in card


def _folders(base, tmp_path):
    return tiny.Path(base.model.model_name_or_path), tmp_path / "run" / "model"


def _lines(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize("kind", ("prefix", pytest.param("adapters", marks=pytest.mark.slow)))
def test_what_does_not_merge_leaves_an_adapter(kind, base, tmp_path, texts, capsys):
    run(base, tmp_path / "run", peft=kind)
    assert not (tmp_path / "run" / "model").exists()
    probabilities = predicted(tmp_path / "run" / "adapter", capsys, texts)
    model, params, _ = peft.load_peft_model(tmp_path / "run" / "adapter")
    encoded = tiny.tokenizer()(_lines(texts), padding=True, return_tensors="np")
    expected = scipy.special.softmax(jax.jit(lambda b: model.apply({"params": params}, **b))(dict(encoded)), axis=1)
    np.testing.assert_allclose(probabilities, expected, atol=2e-4)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"pats-jax predict {tmp_path}/run/adapter" in card and "`model/`" not in card
    assert ("PEFT (torch)" in card) == (kind == "prefix")
    assert np.array_equal(predicted(tmp_path / "run", capsys, texts), probabilities)


@pytest.mark.parametrize("kind", ("adalora", pytest.param("lora", marks=pytest.mark.slow)))
def test_resumed_is_bitwise_the_whole_run(kind, base, tmp_path):
    """AdaLoRA's ranks fall meanwhile, and in the end are those that were asked for; the model is what was evaluated."""
    settings = {"peft": kind, "method": "pats", "noise_scale": 0.1, "save_steps": 2, "save_total_limit": None}
    run(base, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "results.json").unlink()
    steps = sorted(int(path.name) for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert steps[0] == 2 and len(steps) > 1
    for step in steps[1:]:
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").unlink()
    run(base, tmp_path / "cut", resume=True, **settings)
    whole, again = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == again.keys() and all(np.array_equal(whole[name], again[name]) for name in whole)
    if kind == "adalora":
        assert sum(x.size for name, x in whole.items() if "lora_E" in name) == 2 * SMALL["adalora_target_r"]
        assert all(np.all(x) for name, x in whole.items() if "lora_E" in name)
        steps = json.loads((tmp_path / "whole" / "results.json").read_text())["steps"]
        config = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
        assert config["total_step"] == steps and sum(map(sum, config["rank_pattern"].values())) == 4
        lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        losses = [line for line in lines if "loss" in line]
        for line in losses:
            assert line["loss"] == pytest.approx(line["task_loss"] + 0.5 * line["orthogonality"], rel=1e-5)
        assert losses
        model, params, _ = peft.load_peft_model(tmp_path / "whole" / "adapter")
        words = tiny.sentences(6, 9)[0]
        encoded = dict(tiny.tokenizer()(words, padding=True, return_tensors="np"))
        expected = tiny.reference_logits(tmp_path / "whole" / "model", words)
        np.testing.assert_allclose(
            jax.jit(lambda b: model.apply({"params": params}, **b))(encoded), expected, atol=2e-4
        )


def with_modules(**changes):
    """Settings, and the parameters of a tiny model with the modules that they choose."""
    settings = Settings(**tiny.read_flags(Settings, **SMALL | changes))
    model, params = models.SequenceClassifier(tiny.CONFIG), tiny.random_params(tiny.CONFIG)
    return settings, *peft.add_peft(model, params, settings.adapter, key=0)


def test_a_flag_of_another_kind_is_refused():
    with pytest.raises(InputError, match="--adapter_size: not a setting of --peft lora; omit it"):
        Settings(peft="lora", adapter_size=5)
    for kind in KINDS:
        assert Settings(peft=kind).adapter == peft.KINDS[kind](), "flags have the configs' defaults"


@pytest.mark.parametrize("kind", ("lora", "adapters", pytest.param("adalora", marks=pytest.mark.slow)))
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name not in ("bitfit", "sift", "noisytune")])
def test_methods_that_go_with_matrices(kind, method):
    """The optimizer is made for the modules and the head alone, and takes a step."""
    settings, model, params = with_modules(peft=kind, method=method)
    pe_modules.check_methods(settings.peft, settings.methods, params)
    trained, _ = trees.partition(peft.trainable_mask(model, params), params)

    def fisher(keep_fraction, mask):
        return jax.tree.map(lambda p: np.ones(p.shape, bool), trained)

    tx = methods.make_optimizer(
        settings.optimizer,
        settings.methods,
        60,
        trained,
        seed=settings.seed,
        fisher=fisher,
        adapter=settings.adapter,
    )
    shapes = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[0], trained)
    assert jax.tree.structure(shapes) == jax.tree.structure(trained)


@pytest.mark.parametrize(
    "kind, method, reason",
    [
        ("lora", "bitfit", "both select the parameters to train"),
        ("prefix", "sage+sift", "both select the parameters to train"),
        ("adapters", "noisytune", "changes the base model's weights"),
        ("prompt", "lnsr", "LNSR cannot handle the prompt's tokens"),
        ("prompt", "pats", "no adapter parameter matches.*one path is peft.prompt_embeddings; set --noise_layers"),
        ("ia3", "dps-dense", "no adapter parameter matches"),
        ("bitfit", "mixout", "no adapter parameter matches"),
    ],
)
def test_pairs_that_do_not_go_together(kind, method, reason):
    settings, _, params = with_modules(peft=kind, method=method)
    with pytest.raises(InputError, match=rf"--peft {kind} --method .*{reason}") as caught:
        pe_modules.check_methods(settings.peft, settings.methods, params)
    assert "\n" not in str(caught.value)


def test_noise_on_a_prompt_when_asked():
    settings, model, params = with_modules(peft="prompt", method="pats", noise_layers="prompt_embeddings")
    pe_modules.check_methods(settings.peft, settings.methods, params)
    trained, _ = trees.partition(peft.trainable_mask(model, params), params)
    (state,) = trees.find_states(
        methods.make_optimizer(settings.optimizer, settings.methods, 60, trained).init(trained), type(pats_state())
    )
    assert [x.shape for x in jax.tree.leaves(state.sensitivity)] == [(4, 16)]


def pats_state():
    return pats_noise(1e-3, key=0).init({})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft": "lora", "lora_layers": "nose"}, "lora_layers 'nose': matches no linear layer; one is named bert"),
        ({"peft": "lora", "lora_rank": 0}, "^lora_rank 0: must be at least 1"),
        ({"peft": "adalora", "adalora_tinit": 6}, "adalora_tinit 6, adalora_tfinal 0: leave none of 6 steps"),
        ({"peft": "adalora", "adalora_target_r": 4}, "adalora_target_r 4: must be at most adalora_init_r 3"),
        ({"peft": "prompt", "prompt_length": 20}, "they leave 4 of the model's positions for the text"),
        ({"peft": "lora", "method": "bitfit"}, "--peft lora --method bitfit: both select"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(changes, message, base, tmp_path):
    with pytest.raises(InputError, match=message):
        run(base, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
