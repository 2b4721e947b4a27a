"""``--peft``: the flags in which two adapters differ, and the methods that work with one."""

from collections.abc import Sequence
from typing import Any

import jax

from pats_jax.core.settings import entries
from pats_jax.errors import InputError, shown
from pats_jax.methods import Method
from pats_jax.models import peft
from pats_jax.models.patterns import compile_pattern
from pats_jax.run.settings import TrainingSettings
from pats_jax.train_state import parameter_name


def differing_flags(ours: peft.PeftConfig | None, theirs: peft.PeftConfig | None) -> list[str]:
    """The flags in which two adapters of one kind differ, such as ``--lora_rank was 4 and is 8``."""
    if ours is None or theirs is None or ours == theirs:
        return []
    of_both = {flag: e.name for flag, e in entries(type(ours)).items() if e.name not in ours.of_training}
    pairs = {flag: (getattr(theirs, name), getattr(ours, name)) for flag, name in of_both.items()}
    return [f"--{flag} was {shown(was)} and is {shown(now)}" for flag, (was, now) in pairs.items() if was != now]


def add_adapter(settings: TrainingSettings, model: Any, params: Any) -> tuple[Any, Any]:
    """A plain model and its parameters, with the adapter of ``--peft`` if there is one."""
    if settings.adapter:
        model, params = peft.add_peft(model, params, settings.adapter, key=settings.seed)
        check_methods(settings.peft, settings.methods, params)
    return model, params


def in_training(model: Any, total_steps: int) -> Any:
    """The same model; the config of its adapter, if it has one, says how many steps it is trained for."""
    adapter = getattr(model, "peft", None)
    return model if adapter is None else model.clone(peft=adapter.in_training(total_steps))


def check_methods(kind: str | None, chosen: Sequence[Method], params: Any) -> None:
    """Raises InputError if one of the methods does not work with the adapter of a kind in ``params``."""
    leaves = jax.tree_util.tree_leaves_with_path(params["peft"])
    names = [f"peft.{parameter_name(path)}" for path, _ in leaves]
    for method in chosen:
        reason = method.why_not_with(str(kind))
        if reason:
            raise InputError(f"--peft {kind} --method {method.name}: {reason}")
    for method in chosen:
        pattern, has_setting = method.matched_paths(), "noise_layers" in entries(type(method))
        matches = compile_pattern(pattern, "--noise_layers")
        if not method.has("objective") and not any(map(matches, names)):
            where, hint = f"--peft {kind} --method {method.name}", "; set --noise_layers" if has_setting else ""
            raise InputError(f"{where}: no adapter parameter matches {shown(pattern)}; one path is {names[-1]}{hint}")
