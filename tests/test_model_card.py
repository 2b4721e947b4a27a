"""The model cards: that of a fine-tuned model and that of a primed one."""

import pytest

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


def test_the_model_card(tmp_path):
    settings = {"seed": 3, "noise_layers": r"query|key\.kernel$", "eval_steps": None}
    plots.plot_loss(tmp_path / "plots" / "loss.png", [{"step": 1, "loss": 1.0, "learning_rate": 0.0}])
    model_card.write_fine_tuned(tmp_path, settings, RESULTS)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# tiny fine-tuned on rte from somewhere\n")
    assert "`--method pats`, seed 3, 20 steps." in card
    for row in ("| | accuracy |", "| best | 0.8765 |", "| final | 0.7500 |", "| majority class | 0.5000 |"):
        assert f"\n{row}\n" in card
    assert (
        "\n| noise_layers | <code>query&#124;key&#92;&#46;kernel&#36;</code> |\n" in card and "eval_steps" not in card
    )
    assert f"pats-jax predict {tmp_path.name}/model --file" in card
    assert "![loss](plots/loss.png)" in card


def test_the_model_card_of_a_run_without_evaluation(tmp_path):
    results = {name: RESULTS[name] for name in RESULTS if name not in ("final", "best", "majority_class", "steps")}
    model_card.write_fine_tuned(tmp_path, {}, results)
    card = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in card and "seed 3." in card and "Plots" not in card


@pytest.mark.parametrize("train, kind, parts", [("plm", None, ["model"]), ("pe", "lora", ["adapter"])])
def test_the_card_of_a_primed_model(tmp_path, train, kind, parts):
    for part in parts:
        (tmp_path / part).mkdir()
    primed = {"algorithm": "mtl", "train": train, "peft": kind, "head": "pair", "data_dir": "builtin"}
    counts = {"upstream_tasks": ["weather", "voice"], "trained_parameters": 7, "num_parameters": 9}
    model_card.write_primed(tmp_path, {"partition": "builtin", "seed": 3}, RESULTS | primed | counts)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# tiny primed on 2 few-shot tasks\n")
    assert "--algorithm mtl --train " + train in card and "7 of 9 parameters" in card and "weather, voice" in card
    assert "\n| best | 10 | 0.8765 |\n| final | 20 | 0.7500 |\n" in card
    command = card.split("```\n")[1].replace(" \\\n ", "").strip()
    assert command == (
        f"pats-jax gym --primed {tmp_path.name} --kinds lora --head pair --model_name_or_path tiny "
        "--data_dir builtin --partition builtin --output_dir NEW"
    )
    assert [part for part in ("model", "adapter") if f"`{part}/`" in card] == parts
    assert "pats-jax prime --config config.json" in card


def test_the_card_of_a_primed_model_that_was_not_watched(tmp_path):
    results = {name: RESULTS[name] for name in RESULTS if name not in ("final", "best")}
    primed = {"algorithm": "mtl", "train": "plm", "peft": None, "head": "pair", "data_dir": "builtin"}
    counts = {"upstream_tasks": ["weather"], "trained_parameters": 7, "num_parameters": 9}
    model_card.write_primed(tmp_path, {"partition": "builtin"}, results | primed | counts)
    assert "Not evaluated on dev tasks." in (tmp_path / "README.md").read_text()
