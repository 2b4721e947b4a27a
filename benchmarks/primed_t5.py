"""Does priming help a small T5 on real few-shot tasks? Multi-task learning against first-order MAML, model or LoRA.

::

    python -m benchmarks.primed_t5 --model tiny_t5 --data_dir ../shared/data/gym --output_dir primed_t5

It runs `pats-jax prime` and `pats-jax gym` one after another, and repeats nothing that is finished: the same command
resumes. What each stage decides is kept in ``plan.json`` and not decided again::

    tuning rate      the LoRA rate with the best mean test score of direct tuning on the dev tasks
    upstream rates   of each upstream stage, the rate with the best dev score after ``--search_steps``
    targets          8 candidates, 2 of them text to text, on which direct tuning beats a constant answer by the most
    upstream         the four stages
    gym              LoRA from each stage and from the unprimed model, on 3 samples of each target

So rates and steps are fixed on upstream and dev tasks before a target is tuned from a primed start; targets are chosen
by direct tuning alone. A constant answer is the most frequent one of a sample's training rows, or an empty one. The
tasks are MetaICL's files of CrossFit's: 16 rows in all, so the ARG is not CrossFit's. A model of this size cannot
settle the paper's finding.
"""

import collections
import dataclasses
import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import rich.console
import tyro

from pats_jax.core import files
from pats_jax.data import load_gym
from pats_jax.data.few_shot import MULTIPLE_CHOICE, TEXT_TO_TEXT, FewShotTask
from pats_jax.errors import InputError
from pats_jax.reporting.console import say
from pats_jax.run import run_folder
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
STAGES = {  # folder -> flags, rates to try
    "mtl-plm": (["--algorithm", "mtl", "--train", "plm"], ("3e-4", "1e-3")),
    "mtl-pe": (["--algorithm", "mtl", "--train", "pe", "--peft", "lora"], ("1e-3", "3e-3")),
    "fomaml-plm": (["--algorithm", "fomaml", "--train", "plm", "--inner_learning_rate", "1e-2"], ("3e-4", "1e-3")),
    "fomaml-pe": (
        ["--algorithm", "fomaml", "--train", "pe", "--peft", "lora", "--inner_learning_rate", "1e-2"],
        ("1e-3", "3e-3"),
    ),
}
TUNING_RATES = ("1e-3", "3e-3", "1e-2")


@dataclasses.dataclass(frozen=True)
class PrimedT5:
    """What to run, and how long."""

    model: str  # folder of the T5
    data_dir: str  # folder of the task files
    output_dir: str  # folder of all runs
    steps: int = 3000  # upstream steps of multi-task learning
    meta_steps: int = 1000  # upstream steps of first-order MAML, which reads four times as many rows
    search_steps: int = 300  # upstream steps per rate tried
    tuning_steps: int = 100  # steps per tuning
    test_rows: int = 200  # of each target
    targets: int = 8
    text_targets: int = 2  # of them
    samples: tuple[int, ...] = (13, 21, 42)
    max_seq_length: int = 96
    max_target_length: int = 16
    jobs: int = 2
    tasks: int | None = None  # take only the first N upstream, dev and candidate tasks; to try the script


def run(settings: PrimedT5, console: rich.console.Console) -> None:
    """Runs what is missing, stage by stage.

    Raises:
      InputError: if a command fails; its last line is the message.
    """
    root = pathlib.Path(settings.output_dir)
    plan = Plan(root / "plan.json")
    upstream, dev, candidates = (names[: settings.tasks] for names in (UPSTREAM, DEV, CANDIDATES))
    search = write_partition(root / "search.json", upstream, [], dev)
    if "tuning_rate" not in plan:
        plan["tuning_rate"] = best_tuning_rate(settings, root, search, console)
        say(console, f"LoRA rate of tunings: {plan['tuning_rate']}")
    watched = write_partition(root / "watched.json", upstream, dev, candidates)
    for stage in STAGES:
        if stage not in plan:
            plan[stage] = best_upstream_rate(settings, root, watched, stage, console)
            say(console, f"upstream rate of {stage}: {plan[stage]}")
    if "targets" not in plan:
        plan["targets"] = choose_targets(settings, root, watched, candidates, plan["tuning_rate"], console)
    say(console, f"targets: {', '.join(plan['targets'])}")
    partition = write_partition(root / "partition.json", upstream, dev, plan["targets"])
    for stage in STAGES:
        prime(settings, root / stage, partition, stage, plan[stage], upstream_steps(settings, stage), console)
    primed = ["--primed", *(str(root / stage) for stage in STAGES)]
    samples = ["--samples", *map(str, settings.samples)]
    tune(settings, root / "gym", partition, plan["tuning_rate"], [*primed, *samples], console)
    say(console, f"report: {root / 'gym' / 'report' / 'report.html'}")


class Plan(collections.UserDict):
    """What was decided; every decision is written at once, and counts from then on."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path = path
        self.data = files.read_json(path) if path.exists() else {}

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        files.make_folder(self.path.parent)
        files.write_json(self.path, self.data)


def write_partition(path: pathlib.Path, train: Sequence[str], dev: Sequence[str], test: Sequence[str]) -> pathlib.Path:
    """Writes a partition and returns its path."""
    files.make_folder(path.parent)
    files.write_json(path, {"train": list(train), "dev": list(dev), "test": list(test)})
    return path


def best_tuning_rate(
    settings: PrimedT5, root: pathlib.Path, partition: pathlib.Path, console: rich.console.Console
) -> str:
    """The rate with which direct LoRA tuning has the best mean test score on the dev tasks."""
    scores = {}
    for rate in TUNING_RATES:
        folder = root / "rates" / f"lora-{rate}"
        tune(settings, folder, partition, rate, ["--samples", *map(str, settings.samples[:2])], console)
        scores[rate] = float(np.mean([record["test"] for record in records(folder)]))
    say(console, f"mean test score on dev tasks by rate: {scores}")
    return max(scores, key=lambda rate: scores[rate])


def best_upstream_rate(
    settings: PrimedT5, root: pathlib.Path, partition: pathlib.Path, stage: str, console: rich.console.Console
) -> str:
    """The rate with which a short stage has the best score on the dev tasks."""
    scores = {}
    for rate in STAGES[stage][1]:
        folder = root / "rates" / f"{stage}-{rate}"
        prime(settings, folder, partition, stage, rate, settings.search_steps, console)
        (scores[rate],) = run_folder.read_results(folder)["final"]["metrics"].values()
    say(console, f"dev score of {stage} by rate: {scores}")
    return max(scores, key=lambda rate: scores[rate])


def choose_targets(
    settings: PrimedT5,
    root: pathlib.Path,
    partition: pathlib.Path,
    candidates: Sequence[str],
    rate: str,
    console: rich.console.Console,
) -> list[str]:
    """The candidates on which direct tuning beats a constant answer by the most.

    Raises:
      InputError: if there are not enough of them.
    """
    folder = root / "rates" / "candidates"
    tune(settings, folder, partition, rate, ["--samples", *map(str, settings.samples[:2])], console)
    gym, gains = load_gym(settings.data_dir, tasks=list(candidates)), collections.defaultdict(list)
    for record in records(folder):
        gains[record["task"]].append(record["test"] - constant_score(gym[record["task"]], record["sample"]))
    means = {name: float(np.mean(values)) for name, values in gains.items()}
    for name in sorted(means, key=lambda name: -means[name]):
        say(console, f"{name}: direct tuning scores {100 * means[name]:+.1f} points against a constant answer")
    chosen: list[str] = []
    for is_text, count in ((True, settings.text_targets), (False, settings.targets - settings.text_targets)):
        own = [name for name in means if (gym[name].kind == TEXT_TO_TEXT) == is_text and means[name] > 0]
        if len(own) < count:
            kind = "text-to-text" if is_text else "other"
            raise InputError(f"direct tuning beats a constant answer on {len(own)} {kind} tasks; {count} are needed")
        chosen += sorted(own, key=lambda name: -means[name])[:count]
    return sorted(chosen)


def constant_score(task: FewShotTask, seed: int) -> float:
    """The test score of the most frequent training answer, or of an empty one, whichever is better.

    Of multiple choice, whose answers are all different, it is the score of a guess.
    """
    sample = task.sample(seed)
    if task.kind == MULTIPLE_CHOICE:
        return float(np.mean([1 / len(row.options) for row in sample.test]))
    ((frequent, _),) = collections.Counter(row.output for row in sample.train).most_common(1)
    right = [row.right_answers for row in sample.test]
    return max(score_answers(task.answer_metric, [answer] * len(right), right).value for answer in (frequent, ""))


def upstream_steps(settings: PrimedT5, stage: str) -> int:
    """The steps of a stage."""
    return settings.steps if stage.startswith("mtl") else settings.meta_steps


def prime(
    settings: PrimedT5,
    folder: pathlib.Path,
    partition: pathlib.Path,
    stage: str,
    rate: str,
    steps: int,
    console: rich.console.Console,
) -> None:
    """Runs or resumes an upstream stage."""
    if run_folder.read_results(folder) is None:
        flags = [*STAGES[stage][0], "--learning_rate", rate, "--max_steps", str(steps), "--max_grad_norm", "1"]
        flags += ["--eval_steps", str(max(1, steps // 5)), "--save_steps", str(max(1, steps // 5)), "--resume"]
        flags += ["--num_devices", "1", "--seed", "1", "--save_total_limit", "1"]
        command(settings, "prime", folder, partition, flags, console)


def tune(
    settings: PrimedT5,
    folder: pathlib.Path,
    partition: pathlib.Path,
    rate: str,
    more: Sequence[str],
    console: rich.console.Console,
) -> None:
    """Makes the missing tunings of a gym."""
    flags = ["--kinds", "lora", "--grid", f"lora={rate}", "--max_steps", str(settings.tuning_steps)]
    flags += ["--eval_steps", str(max(1, settings.tuning_steps // 4)), "--max_test_rows", str(settings.test_rows)]
    command(settings, "gym", folder, partition, [*flags, "--jobs", str(settings.jobs), *more], console)


def command(
    settings: PrimedT5,
    program: str,
    folder: pathlib.Path,
    partition: pathlib.Path,
    flags: Sequence[str],
    console: rich.console.Console,
) -> None:
    """Runs `pats-jax` in a process of its own; its output goes to a log beside the folder."""
    common = ["--model_name_or_path", settings.model, "--data_dir", settings.data_dir, "--partition", str(partition)]
    common += ["--head", "generate", "--max_seq_length", str(settings.max_seq_length)]
    common += ["--max_target_length", str(settings.max_target_length), "--output_dir", str(folder)]
    log = folder.with_name(f"{folder.name}.log")
    files.make_folder(folder.parent)
    say(console, f"{program} {folder} ...")
    with log.open("a", encoding="utf-8") as out:
        ended = subprocess.run([sys.executable, "-m", "pats_jax", program, *common, *flags], stdout=out, stderr=out)
    if ended.returncode:
        raise InputError(f"{log}: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")


def records(folder: pathlib.Path) -> list[dict]:
    """The records of a gym's tunings."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("tunings/*/*.json"))]


def main(args: list[str] | None = None) -> None:
    """Exits with code 2 and one line on stderr when the input is wrong."""
    settings = tyro.cli(PrimedT5, args=args, prog="python -m benchmarks.primed_t5", description=__doc__)
    logging.getLogger("pats_jax").setLevel(logging.ERROR)
    try:
        run(settings, rich.console.Console(highlight=False))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
