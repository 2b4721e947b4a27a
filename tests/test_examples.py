"""Every example learns its task; chance is 10 % on the digits and 63 % on the tumours."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, accuracy",
    [pytest.param("linen_bert", 0.85, marks=pytest.mark.slow), ("nnx_mlp", 0.93), ("equinox_mlp", 0.93)],
)
def test_example_learns_and_reports_sensitivity(name, accuracy, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main() > accuracy
    report = capsys.readouterr().out.splitlines()
    assert report[0].startswith("accuracy")
    shares = [int(line.split(" holds ")[1].split("%")[0]) for line in report[1:]]
    assert len(shares) >= 2 and all(10 < share < 100 for share in shares)
