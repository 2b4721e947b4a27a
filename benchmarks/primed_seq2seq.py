"""Does priming help a small T5 or BART on real few-shot tasks? Multi-task learning against first-order MAML.

::

    python -m benchmarks.primed_seq2seq --model small_bart --data_dir ../shared/data/gym --output_dir primed_seq2seq

The model is that of `benchmarks.pretrain_small_bart` or `benchmarks.pretrain_tiny_t5`. The study runs `pats-jax prime`
and `pats-jax gym`; the same command resumes::

    tuning rate      the LoRA rate with the best mean test score of direct tuning on the dev tasks
    upstream rates   of each upstream stage, the rate with the best score on the dev tasks at its first check
    stages           multi-task learning and first-order MAML, each of the model alone and of LoRA alone
    gym              direct tuning on 16 candidates; of those on which it beats a constant answer, the 8 with the
                     largest gains, at least 2 of them text to text, are the targets; LoRA from each stage on these

So rates and steps are fixed on upstream and dev tasks before any target is scored, and targets are chosen by direct
tuning alone. A constant answer is the most frequent one of a sample's training rows, or an empty one. A tokenizer that
cannot write an answer as it stands, for want of capitals, has all answers in the form that it writes. The tasks are
MetaICL's files of CrossFit's: 16 rows in all, so the ARG is not CrossFit's. A model of this size cannot settle the
paper's finding.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import priming_study
from benchmarks.priming_study import LORA, MODEL, Stage, Study, write_partition
from pats_jax.core import files
from pats_jax.data import load_gym
from pats_jax.data.few_shot import MULTIPLE_CHOICE, TEXT_TO_TEXT, FewShotTask
from pats_jax.data.tables import json_lines, read_text
from pats_jax.errors import InputError
from pats_jax.models import load_tokenizer
from pats_jax.priming.few_shot_tuning import rows_to_test
from pats_jax.reporting.console import say
from pats_jax.training.answer_metrics import score_answers

UPSTREAM = (
    "ai2_arc blimp-anaphor_number_agreement blimp-ellipsis_n_bar_2 blimp-sentential_negation_npi_licensor_present "
    "blimp-sentential_negation_npi_scope circa climate_fever codah commonsense_qa emotion "
    "ethos-directed_vs_generalized ethos-gender freebase_qa glue-cola glue-mnli glue-qqp google_wellformed_query "
    "health_fact kilt_hotpotqa kilt_nq kilt_trex kilt_zsre liar numer_sense paws proto_qa quarel "
    "quartz-no_knowledge squad-no_context tweet_eval-sentiment"
).split()
DEV = ["hate_speech_offensive", "sms_spam", "superglue-wic", "wino_grande"]
CANDIDATES = (
    "ade_corpus_v2-dosage ag_news art crows_pairs glue-mrpc glue-rte glue-sst2 hate_speech18 kilt_fever "
    "lama-conceptnet lama-google_re openbookqa qa_srl sick superglue-copa wikisql"
).split()
TUNING_RATES = ("1e-3", "3e-3", "1e-2")
MODEL_RATES, LORA_RATES = ("3e-4", "1e-3"), ("1e-3", "3e-3")
_MTL = ("--algorithm", "mtl", "--task_batch_size", "4")
_FOMAML = (
    "--algorithm",
    "fomaml",
    "--inner_batch_size",
    "8",
    "--task_batch_size",
    "4",
    "--inner_learning_rate",
    "1e-2",
)


@dataclasses.dataclass(frozen=True)
class PrimedSeq2Seq:
    """What to run, and how long."""

    model: str  # folder of the T5 or BART
    data_dir: str  # folder of the task files
    output_dir: str  # folder of all runs
    steps: int = 120  # upstream steps of multi-task learning
    meta_steps: int = 60  # upstream steps of first-order MAML
    checks: int = 4  # of a stage; its first part, up to the first check, is run for each learning rate
    tuning_steps: int = 40  # steps per tuning
    test_rows: int = 100  # of each target
    targets: int = 8
    text_targets: int = 2  # at least, of them
    samples: tuple[int, ...] = (13, 21, 42)
    max_seq_length: int = 64
    max_target_length: int = 16
    jobs: int = 2  # stages, or tunings, at a time
    tasks: int | None = None  # take only the first N upstream, dev and candidate tasks; to try the script
    direct_only: bool = False  # stop after direct tuning on the candidates

    @property
    def common(self) -> tuple[str, ...]:
        """The flags of both programs."""
        lengths = ("--max_seq_length", str(self.max_seq_length), "--max_target_length", str(self.max_target_length))
        data = ("--data_dir", str(pathlib.Path(self.output_dir) / "tasks"))
        return ("--model_name_or_path", self.model, "--head", "generate", *data, *lengths)

    def stages(self) -> dict[str, Stage]:
        """The upstream stages."""
        sizes = {"mtl": self.steps, "fomaml": self.meta_steps}
        kinds = {"plm": (MODEL, MODEL_RATES), "pe": (LORA, LORA_RATES)}
        return {
            f"{name}-{kind}": Stage((*flags, *trained), rates, max(1, sizes[name] // self.checks), sizes[name])
            for name, flags in (("mtl", _MTL), ("fomaml", (*_FOMAML, "--inner_learning_rate", "1e-2")))
            for kind, (trained, rates) in kinds.items()
        }


def run(settings: PrimedSeq2Seq, study: Study) -> None:
    """Runs what is missing.

    Raises:
      InputError: if a command fails, its last line being the message; or if there are not enough targets.
      Preempted: if the program was asked to stop.
    """
    upstream, dev, candidates = (names[: settings.tasks] for names in (UPSTREAM, DEV, CANDIDATES))
    write_tasks(settings, [*upstream, *dev, *candidates])
    folder = study.root / "partitions"
    tuned_on_dev = write_partition(folder / "dev.json", upstream, [], dev)
    partition = write_partition(folder / "candidates.json", upstream, dev, candidates)
    rate = best_tuning_rate(settings, study, tuned_on_dev)
    tune(settings, study, "gym", partition, rate, candidates, [])
    gym = load_gym(str(study.root / "tasks"), tasks=list(candidates))
    gains = direct_gains(settings, study, gym)
    for name in gains:
        say(study.console, f"{name}: direct tuning {100 * gains[name]:+.1f} points against a constant answer")
    if settings.direct_only:
        return
    names = choose_targets(settings, gym, gains)
    say(study.console, f"targets: {', '.join(names)}")
    stages = settings.stages()
    rates = study.best_rates(stages, 1, ("--partition", partition))
    study.prime({name: (*stage.command(rates[name]), "--partition", partition) for name, stage in stages.items()})
    primed = ["--primed", *(str(study.root / name) for name in stages)]
    tune(settings, study, "gym", partition, rate, names, primed)
    say(study.console, f"report: {study.root / 'gym' / 'report' / 'report.html'}")


def write_tasks(settings: PrimedSeq2Seq, names: Sequence[str]) -> None:
    """Writes the tasks' files with all answers as the model's tokenizer writes them.

    Raises:
      InputError: if a task is missing, or a file is damaged.
    """
    tokenizer = load_tokenizer(settings.model)

    def written(text: str) -> str:
        return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip()

    for name in names:
        source, target = (pathlib.Path(root) / name for root in (settings.data_dir, f"{settings.output_dir}/tasks"))
        paths = sorted(source.glob("*.jsonl"))
        if not paths:
            raise InputError(f"{source}: no files of the task {name}")
        files.make_folder(target)
        for path in paths:
            rows = []
            for number, row in json_lines(path, read_text(path)):
                row.check(f"{path}:{number}", ("input", "output"))
                options = [written(option) for option in row.get("options") or []]
                rows.append({**row, "output": written(row["output"]), "options": options})
            files.write_text(target / path.name, "".join(json.dumps(row) + "\n" for row in rows))


def best_tuning_rate(settings: PrimedSeq2Seq, study: Study, partition: str) -> str:
    """The rate with which direct LoRA tuning has the best mean test score on the dev tasks, on the first sample."""
    scores = {}
    for rate in TUNING_RATES:
        tune(settings, study, f"rates/lora-{rate}", partition, rate, [], [], settings.samples[:1])
        scores[rate] = float(np.mean([record["test"] for record in study.tunings(f"rates/lora-{rate}")]))
    say(study.console, f"mean test score on dev tasks by LoRA rate: {scores}")
    return max(scores, key=lambda rate: scores[rate])


def direct_gains(settings: PrimedSeq2Seq, study: Study, gym: Mapping[str, FewShotTask]) -> dict[str, float]:
    """What direct tuning scores more than a constant answer, mean over samples; the largest gain first."""
    gains = collections.defaultdict(list)
    for record in study.tunings("gym"):
        if record["algorithm"] == "direct":
            constant = constant_score(gym[record["task"]], record["sample"], settings.test_rows)
            gains[record["task"]].append(record["test"] - constant)
    means = {name: float(np.mean(values)) for name, values in gains.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def choose_targets(settings: PrimedSeq2Seq, gym: Mapping[str, FewShotTask], gains: Mapping[str, float]) -> list[str]:
    """The tasks with the largest gains of direct tuning.

    Args:
      settings: say how many, and how many of them are text to text at least.
      gym: the tasks.
      gains: from `direct_gains`.

    Raises:
      InputError: if there are not enough with a gain.
    """
    better = [name for name, gain in gains.items() if gain > 0]
    texts = [name for name in better if gym[name].kind == TEXT_TO_TEXT]
    for found, count, kind in (
        (texts, settings.text_targets, "text-to-text tasks"),
        (better, settings.targets, "tasks"),
    ):
        if len(found) < count:
            raise InputError(f"direct tuning beats a constant answer on {len(found)} {kind}; {count} are needed")
    first = texts[: settings.text_targets]
    return sorted([*first, *(name for name in better if name not in first)][: settings.targets])


def constant_score(task: FewShotTask, seed: int, test_rows: int) -> float:
    """The score of the most frequent training answer on a tuning's test rows, or of an empty one if that is better.

    Of multiple choice, whose answers are all different, it is the score of a guess.
    """
    sample = task.sample(seed)
    test = rows_to_test(task, sample, test_rows)
    if task.kind == MULTIPLE_CHOICE:
        return float(np.mean([1 / len(row.options) for row in test]))
    ((frequent, _),) = collections.Counter(row.output for row in sample.train).most_common(1)
    right = [row.right_answers for row in test]
    return max(score_answers(task.answer_metric, [answer] * len(right), right).value for answer in (frequent, ""))


def tune(
    settings: PrimedSeq2Seq,
    study: Study,
    name: str,
    partition: str,
    rate: str,
    tasks: Sequence[str],
    more: Sequence[str],
    samples: Sequence[int] = (),
) -> None:
    """Makes the missing tunings of a gym."""
    flags = ["--kinds", "lora", "--grid", f"lora={rate}", "--max_steps", str(settings.tuning_steps)]
    flags += ["--eval_steps", str(max(1, settings.tuning_steps // 4)), "--max_test_rows", str(settings.test_rows)]
    flags += ["--layers", "stacked", "--partition", partition, *(["--tasks", *tasks] if tasks else [])]
    study.gym(name, [*flags, "--samples", *map(str, samples or settings.samples), *more])


def main(args: list[str] | None = None) -> None:
    """Runs the study; see `priming_study.main`."""
    priming_study.main(PrimedSeq2Seq, run, args, "primed_seq2seq", __doc__)


if __name__ == "__main__":
    main()
