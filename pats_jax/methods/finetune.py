"""Plain fine-tuning."""

import dataclasses
from typing import ClassVar

from pats_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class FineTune(Method):
    """Adds nothing to AdamW."""

    name: ClassVar = "finetune"
    kind: ClassVar = "plain"
    summary: ClassVar = "AdamW on every parameter"
    source: ClassVar = "https://arxiv.org/abs/1810.04805"
