"""``--peft``: the adapter of a run from its flags, and the methods that work with it."""

from typing import Any

import jax

from pats_jax.errors import InputError, shown
from pats_jax.methods import METHODS
from pats_jax.models import peft
from pats_jax.models.patterns import compile_pattern
from pats_jax.run.settings import TrainingSettings
from pats_jax.train_state import parameter_name

_WHY_NOT = {
    "bitfit": "both select the parameters to train",
    "sift": "both select the parameters to train",
    "noisytune": "it changes the base model's weights, which must stay fixed",
}


def chosen_config(settings: TrainingSettings) -> peft.PeftConfig | None:
    """The config of ``settings.peft`` from its flags; None without one."""
    flags: dict[str, dict[str, Any]] = {
        "lora": {
            "rank": settings.lora_rank,
            "alpha": settings.lora_alpha,
            "dropout": settings.lora_dropout,
            "layers": settings.lora_layers,
        },
        "ia3": {"output_layers": settings.ia3_output_layers, "input_layers": settings.ia3_input_layers},
        "adapters": {"size": settings.adapter_size, "place": settings.adapter_place},
        "prompt": {"length": settings.prompt_length},
        "prefix": {"length": settings.prefix_length},
    }
    if settings.peft is None:
        return None
    return peft.KINDS[settings.peft](**flags.get(settings.peft, {}), train_pooler=settings.peft_pooler)


def differing_flags(ours: TrainingSettings, theirs: TrainingSettings) -> list[str]:
    """The flags in which two settings of one adapter kind differ, such as ``--lora_rank was 4 and is 8``."""
    if chosen_config(ours) == chosen_config(theirs):
        return []
    flags = [name for name in vars(ours) if name.startswith((_PREFIXES[str(ours.peft)], "peft_"))]
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in flags}
    return [f"--{name} was {shown(was)} and is {shown(now)}" for name, (was, now) in pairs.items() if was != now]


_PREFIXES = {kind: f"{kind}_" for kind in peft.KINDS} | {"adapters": "adapter_"}


def check_methods(settings: TrainingSettings, params: Any) -> None:
    """Raises InputError if a method of ``settings.method`` does not work with the adapter in ``params``."""
    leaves = jax.tree_util.tree_leaves_with_path(params["peft"])
    names = [f"peft.{parameter_name(path)}" for path, _ in leaves]
    chosen = settings.method.split("+")
    for name in chosen:
        if name in _WHY_NOT:
            raise InputError(f"--peft {settings.peft} --method {name}: {_WHY_NOT[name]}")
    for name in chosen:
        where = f"--peft {settings.peft} --method {name}"
        if (settings.peft, name) == ("prompt", "lnsr"):
            raise InputError(f"{where}: LNSR cannot handle the prompt's tokens among the hidden states")
        method = METHODS[name]
        pattern = settings.noise_layers if "noise_layers" in method.flags else method.layers
        matches = compile_pattern(pattern, "--noise_layers")
        if method.objective is None and not any(map(matches, names)):
            hint = "; set --noise_layers" if "noise_layers" in method.flags else ""
            raise InputError(f"{where}: no adapter parameter matches {shown(pattern)}; one path is {names[-1]}{hint}")
