"""The work of a grid, for a first guess of its time: from its data, its model and its settings; see `run.forecast`."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pats_jax import models
from pats_jax.comparison.run_sets import RunSet, program_of
from pats_jax.comparison.seed_statistics import Run
from pats_jax.data import readers, tasks
from pats_jax.errors import InputError
from pats_jax.models.sources import PACKAGES
from pats_jax.run import forecast, own_data
from pats_jax.run.forecast import TextLengths, Work
from pats_jax.run.machine import Devices
from pats_jax.run.settings import FineTuningSettings, Settings


def guess_seconds(
    sets: Iterable[RunSet], settings_of: Callable[[Run], FineTuningSettings | None], devices: Devices, jobs: int
) -> float | None:
    """The seconds that the sets of a grid take; None if they cannot be told, as those of texts that are written.

    Nothing is downloaded for it: of data and models on the hub, only what the local cache holds is read. Nor is
    anything reported that is wrong with them: the runs themselves say it.

    Args:
      sets: the sets to run.
      settings_of: the settings of a run; None if the grid does not know them.
      devices: of this machine.
      jobs: how many sets run at a time.
    """
    known = [(one, settings) for one in sets if isinstance(settings := settings_of(one.runs[0]), Settings)]
    if not known or not devices.rates:
        return None
    try:
        with _without_network(settings for _, settings in known):
            work = _work_of_sets(known, devices)
    except InputError:
        return None
    return forecast.rough_seconds(work, devices, known[0][1].model.dtype, jobs)


def _work_of_sets(known: Sequence[tuple[RunSet, Settings]], devices: Devices) -> Work:
    """The work of all sets; a program that an earlier set has compiled is only traced anew."""
    kinds = {_kind(one, settings): settings for one, settings in known}
    texts_of = {kind: _lengths(settings) for kind, settings in kinds.items()}
    work, compiled = Work(), set[Any]()
    for one, settings in known:
        costs, texts = forecast.costs_of(settings, devices.platform), texts_of[_kind(one, settings)]
        split_over = 1 if one.name is not None else settings.devices.num_devices or devices.count
        of_one = forecast.work_of_run(settings, costs, texts["train"], texts["validation"], split_over)
        program = program_of(one.runs[0], settings), len(one.runs)
        compiling = of_one.compiling * (forecast.REPEATED_COMPILATION if program in compiled else 1.0)
        compiled.add(program)
        work += dataclasses.replace(of_one, compiling=compiling, operations=of_one.operations * len(one.runs))
    return work


def _kind(one: RunSet, settings: Settings) -> tuple[str, int]:
    """What the lengths of a set's texts depend on."""
    return one.runs[0].task, settings.model.max_seq_length


def _lengths(settings: Settings) -> Mapping[str, TextLengths]:
    """The texts of the splits that a comparison reads.

    Raises:
      InputError: if they, or the model's files, cannot be read.
    """
    name, data = settings.model.model_name_or_path, settings.data
    names = ["train", "validation"]
    if data.task_name:
        splits = readers.load_task(tasks.get_task(data.task_name, "--task_name"), data.data_dir, splits=names)
    else:
        splits = own_data.read_own(settings, names, regression=data.do_regression)
    rows = {split: len(found) for split, found in splits.items()}
    if "validation" not in splits:  # held out
        splits["validation"] = splits["train"]
        rows["validation"] = round(rows["train"] * (data.validation_split_percentage or 0) / 100) or 1
        rows["train"] = max(1, rows["train"] - rows["validation"])
    rows["train"] = min(rows["train"], data.max_train_samples or rows["train"], data.low_resource or rows["train"])
    rows["validation"] = min(rows["validation"], data.max_eval_samples or rows["validation"])
    config = models.read_encoder_config(models.checkpoint_folder(name, check_weights=False))
    tokenizer, length = models.load_tokenizer(name), min(settings.model.max_seq_length, config.max_length)
    return {split: TextLengths.of(splits[split], rows[split], tokenizer, length) for split in names}


def _without_network(all_settings: Iterable[Settings]) -> contextlib.AbstractContextManager[None]:
    """Keeps the hub's libraries to their caches if data or a model is on the hub."""
    return readers.cache_alone_if(True) if any(map(_is_on_hub, all_settings)) else contextlib.nullcontext()


def _is_on_hub(settings: Settings) -> bool:
    data, model = settings.data, settings.model.model_name_or_path
    of_hub = data.dataset_name or (data.task_name and data.data_dir is None)
    return bool(of_hub) or (model not in PACKAGES and not Path(model).expanduser().is_dir())
