"""Data: the GLUE task table, readers and batches.

Names are resolved on first use (PEP 562), so that asking for a task's name does not import NumPy or ``datasets``.
"""

import importlib

_HOMES = {
    "TASKS": "tasks",
    "Task": "tasks",
    "get_task": "tasks",
    "own_task": "tasks",
    "Split": "readers",
    "load_files": "readers",
    "load_task": "readers",
    "read_file": "readers",
    "read_glue": "readers",
    "read_hub": "readers",
    "read_texts": "readers",
    "Tokens": "batches",
    "bucket_boundaries": "batches",
    "epoch_plan": "batches",
    "eval_batches": "batches",
    "fill_batch": "batches",
    "padding_share": "batches",
    "tokenize": "batches",
    "train_batches": "batches",
    "load_out_of_domain": "out_of_domain",
    "prefetch": "prefetch",
    "stratified_rows": "low_resource",
    "write_builtin": "builtin",
    "FewShotTask": "few_shot",
    "load_gym": "gym",
    "load_partition": "partitions",
    "load_partitioned_gym": "partitions",
    "write_builtin_gym": "builtin_gym.files",
}

__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"pats_jax.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pats_jax.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
