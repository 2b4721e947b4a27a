"""``--preset crossfit``: the recipe of CrossFit's scripts (commit 56285ca), as defaults of the flags.

Each of them is a flag of its own. CrossFit tunes BART-base whole; the learning rates of PEFT methods stay ours.
"""

from collections.abc import Callable

from pats_jax.core.settings import Flat
from pats_jax.errors import InputError

_TEXTS: Flat = {
    "head": "generate",
    "max_seq_length": 512,
    "max_target_length": 64,
    "num_beams": 4,
    "start_with_bos": True,
    "loss_reduction": "sum",
    "label_smoothing_factor": 0.1,
    "weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 0.1,
}


def tuning(given: Callable[[str], str | None]) -> Flat:
    """Of `pats-jax gym`: 1,000 steps, scored every 100, over three learning rates and three batch sizes."""
    return _TEXTS | {
        "max_steps": 1000,
        "eval_steps": 100,
        "warmup_ratio": 0.1,
        "grid": ("full=1e-5,2e-5,5e-5",),
        "batch_grid": (2, 4, 8),
        "ties": "first",
    }


def upstream(given: Callable[[str], str | None]) -> Flat:
    """Of `pats-jax prime`, for its algorithm; CrossFit has multi-task learning and MAML.

    Raises:
      InputError: for an algorithm that CrossFit's code does not have.
    """
    algorithm = given("algorithm") or "mtl"
    if algorithm == "mtl":
        rows = {"tasks_per_step": 32, "task_batch_size": 1}
        return _TEXTS | rows | {"learning_rate": 3e-5, "max_steps": 16_980, "warmup_ratio": 1018 / 16_980}
    if algorithm != "maml":
        raise InputError(f"--preset crossfit: CrossFit has no code for {algorithm}, only for mtl and maml")
    rows = {"tasks_per_step": 4, "gradient_accumulation_steps": 4, "inner_batch_size": 16, "task_batch_size": 16}
    rates = {"learning_rate": 1e-5, "inner_learning_rate": 3e-5, "inner_steps": 1}
    return _TEXTS | rows | rates | {"max_steps": 6000, "warmup_ratio": 0.06}
