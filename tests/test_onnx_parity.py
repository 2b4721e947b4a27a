"""The recipe of docs/serving.md: a model exported to ONNX has our probabilities in ONNX Runtime."""

import pathlib
import re

import numpy as np
import pytest
import tiny

pytest.importorskip("onnxruntime", reason="parity needs ONNX Runtime: pip install .[parity]")
pytest.importorskip("torch", reason="parity needs torch: pip install .[parity]")

from pats_jax.programs.predict import LoadedModel

pytestmark = pytest.mark.parity
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "serving.md"


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_onnx_has_our_probabilities(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny.save_checkpoint(pathlib.Path("runs/mrpc/model"), num_labels=3)
    (recipe,) = re.findall(r"^```python\n(import numpy.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(recipe, names)  # our own text
    texts = tiny.sentences(rows, 1)[0]
    inputs = names["tokenizer"](texts, padding=True, return_tensors="np")
    (logits,) = names["session"].run(["logits"], {name: inputs[name] for name in names["names"]})
    ours = LoadedModel.load(str(folder)).logits(tiny_split(texts), None, 8)
    np.testing.assert_allclose(softmax(logits), softmax(ours), atol=1e-5)
    assert names["example"]["input_ids"].shape != inputs["input_ids"].shape


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def tiny_split(texts):
    from pats_jax.data import Split

    return Split(texts, None, None, [str(row) for row in range(len(texts))])
