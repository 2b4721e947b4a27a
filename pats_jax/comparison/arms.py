"""The arms of a grid: what it compares, a method each, under the settings for which the grid lists several values.

``--methods finetune pats --learning_rate 1e-4 2e-4 --noise_scale 1e-3 1e-2`` are six arms: plain fine-tuning, which has
no noise, with each learning rate, and PATS with each pair.
"""

import dataclasses
import itertools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Literal

from pats_jax.core.settings import Entry
from pats_jax.errors import InputError, shown
from pats_jax.run import flags
from pats_jax.run.settings import FineTuningSettings, Settings

Value = int | float | str | None
Lists = Mapping[str, tuple[Value, ...]]  # flag -> the values that the grid lists


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method, and settings by which the grid's arms differ.

    Attributes:
      method: as in ``--method``.
      overrides: (flag, value) pairs: of the settings with several values, those that the method reads.
    """

    method: str
    overrides: tuple[tuple[str, Value], ...] = ()

    @property
    def label(self) -> str:
        """Its name in a report.

        Examples:
          >>> Arm("pats", (("noise_scale", 0.01), ("peft", "lora"))).label
          'pats noise_scale=0.01 peft=lora'
        """
        return " ".join(self._words())

    @property
    def folder(self) -> str:
        """The name of its folder: the label, with commas."""
        return ",".join(self._words())

    def settings(self) -> dict[str, Value]:
        """Flag -> value, of its settings."""
        return {"method": self.method, **dict(self.overrides)}

    def flags(self) -> list[str]:
        """The arguments of a run for it."""
        return ["--method", self.method, *(f"--{flag}={value}" for flag, value in self.overrides)]

    def _words(self) -> list[str]:
        return [self.method, *(f"{flag}={'none' if value is None else value}" for flag, value in self.overrides)]


def split_lists(args: Sequence[str], kind: type[FineTuningSettings] = Settings) -> tuple[Lists, list[str]]:
    """Takes the flags with several values out of the arguments for a grid's runs.

    Args:
      args: flags of the runs; one that expects a number or one of several words may have several of them.
      kind: the settings of the runs.

    Returns:
      Flag -> values, and the other arguments.

    Raises:
      InputError: a listed setting cannot make a difference, or a value is wrong or occurs twice.

    Examples:
      >>> split_lists(["--learning_rate", "1e-4", "2e-4", "--max_steps", "9", "--peft", "none", "lora"])
      ({'learning_rate': (0.0001, 0.0002), 'peft': (None, 'lora')}, ['--max_steps', '9'])
    """
    known, lists, others = kind.all_entries(), {}, []
    for argument, *words in _by_flag(args):
        name, has_value, first = argument.partition("=")
        entry, values = known.get(name.lstrip("-").replace("-", "_")), [first, *words] if has_value else words
        if len(values) > 1 and entry is not None and _is_listed(entry):
            lists[entry.flag] = _parsed(entry, values, kind)
        else:
            others += [argument, *words]
    return lists, others


def make_arms(
    methods: Sequence[str], lists: Lists, peft: str | None, kind: type[FineTuningSettings] = Settings
) -> list[Arm]:
    """Each method under each combination of the listed values that it reads.

    Args:
      methods: names, as in ``--method``.
      lists: of `split_lists`.
      peft: the PEFT kind of all arms if the lists have none.
      kind: the settings of the runs.

    Raises:
      InputError: no arm reads one of the listed settings.
    """
    found: dict[Arm, None] = {}
    for method, values in itertools.product(methods, itertools.product(*lists.values())):
        chosen: dict[str, Value] = dict(zip(lists, values, strict=True))
        read = flags.read_by(kind, {"peft": peft, **chosen, "method": method})
        found[Arm(method, tuple((flag, value) for flag, value in chosen.items() if flag in read))] = None
    taken = {flag for arm in found for flag, _ in arm.overrides}
    for flag in lists:
        if flag not in taken:
            raise InputError(f"--{flag}: no method or PEFT kind of this grid has this setting; omit it")
    return list(found)


def baselines(arms: Sequence[Arm]) -> dict[Arm, Arm | None]:
    """Arm -> the arm that it is compared with.

    The baseline method is ``finetune`` or, without it, the first arm's. An arm of another method is compared with the
    baseline method under the same settings, as far as that has them; an arm of the baseline method with the first such
    arm, which itself is compared with none.

    Examples:
      >>> low, high = (("learning_rate", 1e-4),), (("learning_rate", 2e-4),)
      >>> found = baselines([Arm("finetune", low), Arm("finetune", high), Arm("pats", low), Arm("pats", high)])
      >>> [one and one.label for one in found.values()]
      [None, 'finetune learning_rate=0.0001', 'finetune learning_rate=0.0001', 'finetune learning_rate=0.0002']
    """
    method = "finetune" if any(arm.method == "finetune" for arm in arms) else arms[0].method
    plain = [arm for arm in arms if arm.method == method]
    found: dict[Arm, Arm | None] = {}
    for arm in arms:
        own = dict(arm.overrides)
        if arm.method == method:
            found[arm] = None if arm == plain[0] else plain[0]
        else:
            found[arm] = max(plain, key=lambda one: _agreement(dict(one.overrides), own))
    return found


def _agreement(theirs: Mapping[str, Value], ours: Mapping[str, Value]) -> tuple[int, int]:
    """The settings that differ, negative, and those that are equal: the larger, the more alike."""
    common = theirs.keys() & ours.keys()
    equal = sum(theirs[flag] == ours[flag] for flag in common)
    return equal - len(common), equal


def _by_flag(args: Sequence[str]) -> list[list[str]]:
    """The arguments, each flag with the words after it."""
    found: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or not found:
            found.append([])
        found[-1].append(arg)
    return found


def _is_listed(entry: Entry) -> bool:
    """Whether a grid may list several values of a setting: numbers and choices."""
    return all(kind in (int, float, type(None)) or typing.get_origin(kind) is Literal for kind in _types(entry))


def _parsed(entry: Entry, words: Sequence[str], kind: type[FineTuningSettings]) -> tuple[Value, ...]:
    """The values of a list; raises InputError."""
    what = f"--{entry.flag} {shown(' '.join(words), quoted=False)}"
    if entry.flag in kind.groups()["data"]:
        raise InputError(f"{what}: a grid's runs share their data; set one value")
    if entry.about.free_on_resume or entry.about.of_one_start:
        hint = "list --train_batch_size instead" if entry.flag in _BATCH else "set one value"
        raise InputError(f"{what}: changes no result, so there is nothing to compare; {hint}")
    values = tuple(_value(entry, word) for word in words)
    if len(set(values)) < len(values):
        raise InputError(f"{what}: list each only once")
    return values


_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _value(entry: Entry, word: str) -> Value:
    kinds = _types(entry)
    if word.lower() == "none" and type(None) in kinds:
        return None
    value: Value = word
    for kind in (int, float):
        if kind in kinds:
            try:
                value = kind(word)
            except ValueError:
                continue
            break
    entry.check(value)
    return value


def _types(entry: Entry) -> tuple[type, ...]:
    """The types of a setting: those of a union, or its one."""
    is_union = typing.get_origin(entry.type) in (types.UnionType, typing.Union)
    return typing.get_args(entry.type) if is_union else (entry.type,)
