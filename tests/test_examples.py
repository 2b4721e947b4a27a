"""Every example learns its task; chance is 10 % on the digits and 63 % on the tumours."""

import importlib.util
import pathlib

import pytest
import tiny

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize(
    "name, accuracy",
    [pytest.param("linen_bert", 0.85, marks=pytest.mark.slow), ("nnx_mlp", 0.93), ("equinox_mlp", 0.93)],
)
def test_example_learns_and_reports_sensitivity(name, accuracy, capsys):
    assert load(name).main() > accuracy
    report = capsys.readouterr().out.splitlines()
    assert report[0].startswith("accuracy")
    shares = [int(line.split(" holds ")[1].split("%")[0]) for line in report[1:]]
    assert len(shares) >= 2 and all(10 < share < 100 for share in shares)


@pytest.mark.slow
def test_the_demo_says_how_long_it_takes_and_what_the_models_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    demo = load("demo")
    small = {"max_steps": 4, "logging_steps": 2, "max_eval_samples": 16, "max_seq_length": 32, "num_devices": 1}
    settings = demo.SETTINGS.replace(model_name_or_path=str(tiny.save_checkpoint(tmp_path / "tiny")), **small)
    results = demo.main(settings, tmp_path / "demo")
    told = capsys.readouterr().out
    assert told.index("On two CPU cores this takes about 3 min 20 s") < told.index("AdamW on built-in data")
    assert "(generated, not GLUE)" in told and "without compilation" in told
    assert len(results) == 2 and (tmp_path / "demo" / "scores.png").read_bytes().startswith(b"\x89PNG")
    answers = [line for line in told.splitlines() if line.count("positive") + line.count("negative") == 3]
    assert len(answers) == 6, "six sentences, each with its label and what both models say"


def test_the_demo_tells_time_without_compilation():
    lines = [{"step": step, "loss": 1.0, "timing": {"seconds": s}} for step, s in ((10, 90.0), (20, 2.0), (40, 8.0))]
    assert load("demo").seconds_per_step([*lines, {"step": 40, "eval": {}}]) == pytest.approx(0.3)
    assert load("demo").seconds_per_step(lines[:1]) == 9.0
