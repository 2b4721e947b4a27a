"""The settings of priming and few-shot tuning that only text-to-text models read."""

import dataclasses
from typing import ClassVar, Literal

from pats_jax.core.settings import PROBABILITY, Group, at_least, entries, setting
from pats_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextSettings(Group):
    """Inputs, loss and decoding of T5 and BART."""

    title: ClassVar[str] = "texts"

    show_task: bool = setting(True, "T5, BART: begin every input with the task's name in brackets, as CrossFit does")
    max_target_length: int = setting(
        64, "T5, BART: tokens of an answer; longer ones are truncated", at_least(1, 1_000_000)
    )
    num_beams: int = setting(1, "T5, BART: beams of --head generate; 1: greedy search", at_least(1, 1000))
    label_smoothing_factor: float = setting(0.0, "T5, BART: share of the loss that all words have alike", PROBABILITY)
    loss_reduction: Literal["mean", "sum"] = setting(
        "mean", "T5, BART: the mean of the words' losses, or their sum, as in CrossFit"
    )
    start_with_bos: bool = setting(
        False, "BART: generate as CrossFit does: start from bos, force bos first and eos last; T5 has no bos"
    )

    def check_read(self, head: str, *, is_read: bool) -> None:
        """Raises InputError if a setting is not its default though the head does not read it."""
        if is_read:
            return
        for flag, entry in entries(type(self)).items():
            if getattr(self, entry.name) != entry.default:
                raise InputError(f"--{flag}: is read with --head generate and likelihood only, not {head}; omit it")
