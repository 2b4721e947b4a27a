"""The JSON files of a run, a grid and a gym: the fields that programs read, for `files.read_record` to check.

A file may have more fields than its record. A field that is `NotRequired` is missing in files of some versions or some
runs. Scores are finite, and every number is small enough to compute with. A name that becomes part of a path is one of
a fixed set, or is checked by `files.checked_name`.
"""

from typing import Annotated, Literal, NotRequired

import annotated_types
from typing_extensions import TypedDict

Count = Annotated[int, annotated_types.Interval(ge=0, le=2**53)]  # exact as a float, too
Seed = Annotated[int, annotated_types.Interval(ge=0, lt=2**63)]
Score = Annotated[float, annotated_types.Interval(ge=-1e6, le=1e6)]  # NaN is outside, too
Seconds = Annotated[float, annotated_types.Interval(ge=0, le=1e12)]

Algorithm = Literal["mtl", "maml", "fomaml", "reptile"]
Part = Literal["plm", "pe", "plm+pe"]
PeftKind = Literal["lora", "adalora", "bitfit", "ia3", "adapters", "prompt", "prefix"]
Stage = Literal["direct", Algorithm]  # direct: none
Tuned = Literal["full", PeftKind]


# results.json


class Scores(TypedDict):
    """Metric -> score."""

    metrics: dict[str, Score]


class Evaluation(Scores):
    """The scores after a step."""

    step: Count


class Accuracy(TypedDict):
    """The metric of out-of-domain sets, and of all few-shot tasks together."""

    accuracy: Score


class AccuracyScores(TypedDict):
    """`Scores` that have an accuracy."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    metrics: Accuracy


Share = Annotated[float, annotated_types.Interval(ge=0, le=1)]


class ScoreInterval(TypedDict):
    """A bootstrap interval, see `diagnosis.Interval`."""

    low: Score
    high: Score
    level: Share
    resamples: Count


class ClassRecord(TypedDict):
    """How well one class is recognised, see `diagnosis.ClassFigures`."""

    label: str
    precision: Share
    recall: Share
    f1: Share
    support: Count
    predicted: Count


class MajorityClass(TypedDict):
    """The most frequent class of the validation rows, its share, and the scores of always predicting it."""

    label: str
    share: Share
    metrics: dict[str, Score]


class MeanAnswer(TypedDict):
    """The mean score of the validation rows, and the errors of always predicting it."""

    value: float
    loss: float
    mean_absolute_error: float


class Examined(TypedDict):
    """Shared by the examinations of classes and of scores: rows, main score and its interval, loss."""

    rows: Count
    metric: str
    score: Score
    interval: ScoreInterval
    loss: float


class ClassificationDiagnosis(Examined):
    """The examination of a classifier, see `diagnosis.Classification`."""

    macro_f1: Share
    micro_f1: Share
    calibration_error: Share
    classes: list[ClassRecord]
    majority_class: MajorityClass


class RegressionDiagnosis(Examined):
    """The examination of a model that predicts scores, see `diagnosis.Regression`."""

    mean_absolute_error: float
    explained_variance: float
    mean_answer: MeanAnswer


class SeveralLabelsDiagnosis(Examined):
    """The examination of a model that may give a text several labels, see `diagnosis.SeveralLabels`."""

    macro_f1: Share
    micro_f1: Share
    exact_match: Share
    classes: list[ClassRecord]


class GlueResults(TypedDict):
    """Results of any run of `pats-jax glue`, as its summary prints them."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    method: str
    data: str
    peft: NotRequired[str | None]
    final: NotRequired[Evaluation]
    out_of_domain: NotRequired[dict[str, AccuracyScores]]
    diagnosis: NotRequired[ClassificationDiagnosis | RegressionDiagnosis | SeveralLabelsDiagnosis]


class PrimedScores(TypedDict):
    """The mean over dev tasks, each by its own metric; earlier versions called it accuracy where there are options."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    metrics: dict[Literal["accuracy", "score"], Score]


class PrimedResults(TypedDict):
    """Results of a run of `pats-jax prime`; algorithm, train, seed and peft name the folders of its tunings."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    model_name_or_path: str
    algorithm: Algorithm
    train: Part
    peft: PeftKind | None
    head: Literal["embedding", "pair", "mlm", "generate", "likelihood"]
    seed: Seed
    upstream_tasks: list[str]
    final: NotRequired[PrimedScores]


class Figures(TypedDict):
    """Three figures of concentration, see `concentration.concentration`."""

    gini: Score
    entropy: Score
    top_10_percent_share: Score


class FiguresOfAll(TypedDict):
    """The figures of all parameters together."""

    all: Figures


class Histogram(TypedDict):
    """The shares of the values between edges; there is one more edge than shares."""

    edges: list[Score]
    before: list[Score]
    after: list[Score]


class Concentration(TypedDict):
    """How sensitivity was spread before and after training."""

    before: FiguresOfAll
    after: FiguresOfAll
    log10_histogram: NotRequired[Histogram]


class ComparedResults(TypedDict):
    """Results of a trained and evaluated run, as `pats-jax compare` reads them."""

    data: str
    main_metric: str
    versions: dict[str, str]
    train_examples: Count
    eval_examples: Count
    steps: Count
    model_step: NotRequired[Count]
    final: Evaluation
    best: Evaluation
    majority_class: NotRequired[Scores]  # where there are classes
    concentration: NotRequired[Concentration | None]


# metrics.jsonl


class Timing(TypedDict):
    """What depends on the clock."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    seconds: NotRequired[Seconds]
    lanes: NotRequired[Annotated[int, annotated_types.Interval(ge=1, le=100_000)]]  # runs that share these seconds


class MetricsLine(TypedDict):
    """A line of metrics.jsonl, for some steps or an evaluation. Early versions wrote losses that are not finite."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    step: Count
    loss: NotRequired[float]
    eval: NotRequired[dict[str, Score]]
    timing: NotRequired[Timing]


# grid.json


GridProgram = Literal["glue", "text2text"]
Overridden = (
    Annotated[int, annotated_types.Interval(ge=-(2**63), lt=2**63)]
    | Annotated[float, annotated_types.Interval(ge=-3.5e38, le=3.5e38)]
    | str
    | None
)


class GridRun(TypedDict):
    """A run of a grid, see `seed_statistics.Run`; overrides are those of its arm, see `arms.Arm`."""

    task: str
    method: str
    overrides: NotRequired[dict[str, Overridden]]
    seed: Seed


class LaneSetFile(TypedDict):
    """lanes/NAME/lanes.json: a set of runs in lanes that was begun, and what stays as it is when it is resumed.

    Without ``in_turns``, its lanes do not take turns.
    """

    runs: list[GridRun]
    lanes: Annotated[int, annotated_types.Interval(ge=1, le=100_000)]
    layers: Literal["auto", "separate", "stacked"]
    in_turns: NotRequired[bool]


class GridFile(TypedDict):
    """The content of grid.json: all starts of `pats-jax compare` in its folder; without a program, that of glue."""

    program: NotRequired[GridProgram]
    runs: list[GridRun]
    commands: list[str]
    machines: list[dict[str, str]]


# tunings/ARM/TASK-SAMPLE.json


class Curve(TypedDict):
    """The dev scores of a tuning by step, lists of the same length."""

    step: list[Count]
    dev: list[Score]


class TuningRecord(TypedDict):
    """A finished tuning of `pats-jax gym`, see `relative_gain`."""

    algorithm: Stage
    trained: Part | None
    peft: Tuned
    upstream_seed: Seed | None
    upstream_digest: NotRequired[str | None]
    task: str
    sample: Seed
    metric: str
    chance: Score
    learning_rates: NotRequired[list[float]]
    diverged: NotRequired[list[float]]
    learning_rate: NotRequired[float]
    batch_sizes: NotRequired[list[Count]]
    batch_size: NotRequired[Count]
    curve: Curve
    step: NotRequired[Count]
    dev: NotRequired[Score]
    test: Score
    test_rows: NotRequired[Count]
    unparsable: NotRequired[Count]
    crossfits_sampling: NotRequired[bool | None]
    seconds: NotRequired[Seconds | None]


# config.json, as `pats-jax submission` reads it


class RunColumns(TypedDict):
    """The columns that a run was told; `pats-jax predict` looks for them first."""

    text_column_names: NotRequired[list[str] | None]


class SubmittedConfig(TypedDict):
    """The settings that say what a run predicts; the config.json of a saved model has no task."""

    task_name: NotRequired[str | None]
    data_dir: NotRequired[str | None]
