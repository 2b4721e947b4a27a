"""The settings of AdamW and its schedule."""

import dataclasses
import math
from typing import ClassVar, Literal

from pats_jax.core.settings import POSITIVE, PROBABILITY, Group, Range, at_least, setting


@dataclasses.dataclass(frozen=True)
class AdamWSettings(Group):
    """The settings of AdamW, without the learning rate."""

    title: ClassVar[str] = "optimizer"

    warmup_ratio: float = setting(
        0.1,
        "fraction of the steps, rounded up, over which the learning rate rises",
        Range(lambda x: 0 <= x <= 1, "in [0, 1]"),
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "the learning rate after warmup: linear or cosine decay to 0, or constant; constant has no warmup"
    )
    weight_decay: float = setting(0.01, "AdamW's weight decay; not applied to biases and LayerNorm", at_least(0))
    adam_beta1: float = setting(0.9, "decay rate of the first moment", PROBABILITY)
    adam_beta2: float = setting(0.999, "decay rate of the second moment", PROBABILITY)
    # smaller numbers are 0 in float32, and Adam would divide by it
    adam_epsilon: float = setting(
        1e-8,
        "added to the square root of the second moment",
        Range(lambda x: 2.0**-126 <= x < math.inf, "at least 1.2e-38"),
    )
    max_grad_norm: float = setting(1.0, "clip gradients to this global norm", POSITIVE)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(AdamWSettings):
    """AdamW with a linear warmup, and a decay to 0 where it is not constant."""

    learning_rate: float = setting(
        5e-5, "peak learning rate: linear warmup, then linear decay to 0 by default", POSITIVE, is_basic=True
    )
    lora_plus_ratio: float = setting(
        1.0, "LoRA+: with --peft lora, learning rate of B and of vectors / of the rest; 16 is usual", POSITIVE
    )

    @classmethod
    def at(cls, learning_rate: float, others: AdamWSettings) -> "OptimizerSettings":
        """The settings ``others`` with a learning rate."""
        return cls(learning_rate=learning_rate, **{f.name: getattr(others, f.name) for f in dataclasses.fields(others)})
