"""The model cards: that of a fine-tuned model and that of a primed one."""

import jax
import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard

from pats_jax import models
from pats_jax.reporting import plots
from pats_jax.run import model_card

RESULTS = {
    "model_name_or_path": "tiny",
    "data": "rte from somewhere",
    "method": "pats",
    "seed": 3,
    "steps": 20,
    "num_labels": 2,
    "eval_examples": 7,
    "main_metric": "accuracy",
    "majority_class": {"metrics": {"accuracy": 0.5}},
    "final": {"step": 20, "metrics": {"accuracy": 0.75}},
    "best": {"step": 10, "metrics": {"accuracy": 0.87654}},
    "versions": {"python": "3.11"},
}


def read(folder):
    """The card's text, without its front matter."""
    return ModelCard.load(folder / "README.md").text.lstrip()


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    settings = {"task_name": "rte", "data_dir": None, "seed": 3}
    named = RESULTS | {"model_name_or_path": "google-bert/bert-base-uncased", "method": "pats+mixout", "model_step": 10}
    for name in ("run", "own"):
        (tmp_path / name).mkdir()
    model_card.write_fine_tuned(tmp_path / "run", settings, named)
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert (data.base_model, data.license, data.library_name) == (named["model_name_or_path"], None, "transformers")
    assert data.pipeline_tag == "text-classification" and data.datasets == ["nyu-mll/glue"]
    assert data.tags == ["pats-jax", "jax", "fine-tuned", "pats", "mixout"]
    (score,) = data.eval_results
    assert (score.dataset_type, score.dataset_config, score.dataset_split) == ("nyu-mll/glue", "rte", "validation")
    assert (score.metric_type, score.metric_value) == ("accuracy", 0.87654), "of the model that is in the folder"
    model_card.write_fine_tuned(tmp_path / "own", {"task_name": None, "seed": 3}, RESULTS | {"peft": "bitfit"})
    data = ModelCard.load(tmp_path / "own" / "README.md").data
    assert data.base_model is data.datasets is data.library_name is None
    (score,) = data.eval_results
    assert (score.dataset_type, score.dataset_name, score.metric_value) == ("other", "rte from somewhere", 0.75)


@pytest.mark.parametrize(
    "written, known", [("---\nlicense: mit\n---\n", "mit"), ("no card", None), ("---\n: [\n---\n", None)]
)
def test_the_license_is_that_of_the_base_model_if_its_card_says_so(tmp_path, written, known):
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "run").mkdir()
    (base / "README.md").write_text(written)
    model_card.write_fine_tuned(tmp_path / "run", {}, RESULTS | {"model_name_or_path": str(base)})
    assert ModelCard.load(tmp_path / "run" / "README.md").data.license == known


def test_only_changed_settings_are_shown(tmp_path):
    defaults = {"seed": 42, "learning_rate": 5e-5, "method": "finetune", "output_dir": None, "layers": "auto"}
    chosen = {"seed": 42, "learning_rate": 1e-4, "method": "pats", "output_dir": "here", "layers": "stacked"}
    model_card.write_fine_tuned(tmp_path, chosen, RESULTS, defaults)
    table = read(tmp_path).partition("| setting | value |\n| --- | --- |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == ["| learning_rate | `0.0001` |", "| method | `pats` |"]


@pytest.mark.parametrize("kind", [None, "lora"])
def test_the_python_of_a_card_runs(kind, tmp_path):
    """And gives the logits of the model that was saved."""
    base, tokenizer = tiny.save_checkpoint(tmp_path / "base"), tiny.tokenizer()
    model, params, config = models.from_pretrained(base, num_labels=2, key=1)
    folder = tmp_path / "run"
    if kind:
        model, params = models.peft.add_peft(model, params, models.peft.LoraConfig(rank=2), key=1)
        params["peft"] = jax.tree.map(lambda x: x + 0.1, params["peft"])
        models.peft.save_peft(folder / "adapter", model=model, params=params, base_model_name_or_path=str(base))
    else:
        models.save_pretrained(folder / "model", params=params, config=config, tokenizer=tokenizer)
    model_card.write_fine_tuned(folder, {}, RESULTS | {"peft": kind, "model_name_or_path": str(base)})
    code = read(folder).partition("```python\n")[2].partition("```")[0]
    said = {}
    exec(code, said)  # our own text
    inputs = dict(models.load_tokenizer(base)(["A text."], return_tensors="np"))
    np.testing.assert_allclose(said["logits"], model.apply({"params": params}, **inputs), rtol=1e-5, atol=1e-6)


def test_the_model_card(tmp_path):
    settings = {"seed": 3, "noise_layers": r"query|key\.kernel$", "eval_steps": None}
    plots.plot_loss(tmp_path / "plots" / "loss.png", [{"step": 1, "loss": 1.0, "learning_rate": 0.0}])
    model_card.write_fine_tuned(tmp_path, settings, RESULTS)
    card = read(tmp_path)
    assert card.startswith("# tiny fine-tuned on rte from somewhere\n")
    assert "`--method pats`, seed 3, 20 steps." in card
    for row in ("| | accuracy |", "| best | 0.8765 |", "| final | 0.7500 |", "| majority class | 0.5000 |"):
        assert f"\n{row}\n" in card
    assert (
        "\n| noise_layers | <code>query&#124;key&#92;&#46;kernel&#36;</code> |\n" in card and "eval_steps" not in card
    )
    assert f"pats-jax predict {tmp_path}/model --file" in card
    assert "![loss](plots/loss.png)" in card


def test_an_interval_without_width_is_not_on_the_card(tmp_path):
    interval = {"low": 1.0, "high": 1.0, "level": 0.95, "resamples": 2000}
    found = {"diagnosis": {"metric": "accuracy", "score": 1.0, "interval": interval}}
    model_card.write_fine_tuned(tmp_path, {}, RESULTS | found)
    text = read(tmp_path)
    assert "interval 1.0000" not in text and "there is no bootstrap interval" in text


def test_the_interval_of_the_score_is_on_the_card(tmp_path):
    interval = {"low": 0.61234, "high": 0.85, "level": 0.95, "resamples": 2000}
    found = {"diagnosis": {"metric": "accuracy", "score": 0.75, "interval": interval}}
    model_card.write_fine_tuned(tmp_path, {}, RESULTS | found)
    said = "accuracy of the model in this folder is 0.7500, 95% bootstrap interval 0.6123 to 0.8500."
    assert f"| majority class | 0.5000 |\n\n{said}\n" in read(tmp_path)


def test_the_model_card_of_a_run_without_evaluation(tmp_path):
    results = {name: RESULTS[name] for name in RESULTS if name not in ("final", "best", "majority_class", "steps")}
    model_card.write_fine_tuned(tmp_path, {}, results)
    card = read(tmp_path)
    assert "Not evaluated." in card and "seed 3." in card and "Plots" not in card


@pytest.mark.parametrize("train, kind, parts", [("plm", None, ["model"]), ("pe", "lora", ["adapter"])])
def test_the_card_of_a_primed_model(tmp_path, train, kind, parts):
    for part in parts:
        (tmp_path / part).mkdir()
    primed = {"algorithm": "mtl", "train": train, "peft": kind, "head": "pair", "data_dir": "builtin"}
    counts = {"upstream_tasks": ["weather", "voice"], "trained_parameters": 7, "num_parameters": 9}
    model_card.write_primed(tmp_path, {"partition": "builtin", "seed": 3}, RESULTS | primed | counts)
    card = read(tmp_path)
    assert card.startswith("# tiny primed on 2 few-shot tasks\n")
    assert "--algorithm mtl --train " + train in card and "7 of 9 parameters" in card and "weather, voice" in card
    assert "\n| best | 10 | 0.8765 |\n| final | 20 | 0.7500 |\n" in card
    command = card.split("```\n")[1].replace(" \\\n ", "").strip()
    assert command == (
        f"pats-jax gym --primed {tmp_path} --kinds lora --head pair --model_name_or_path tiny "
        f"--data_dir builtin --partition builtin --output_dir {tmp_path}-gym"
    )
    assert [part for part in ("model", "adapter") if f"`{part}/`" in card] == parts
    assert f"pats-jax prime --config {tmp_path}/config.json --output_dir {tmp_path}-again" in card


def test_the_card_of_a_primed_model_that_was_not_watched(tmp_path):
    results = {name: RESULTS[name] for name in RESULTS if name not in ("final", "best")}
    primed = {"algorithm": "mtl", "train": "plm", "peft": None, "head": "pair", "data_dir": "builtin"}
    counts = {"upstream_tasks": ["weather"], "trained_parameters": 7, "num_parameters": 9}
    model_card.write_primed(tmp_path, {"partition": "builtin"}, results | primed | counts)
    assert "Not evaluated on dev tasks." in read(tmp_path)
