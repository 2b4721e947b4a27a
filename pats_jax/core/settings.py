"""Settings: fields of frozen dataclasses with a help text and a range, in groups that belong to whoever reads them.

A group is a `Group` whose fields are made by `setting`. A program's settings are a `Composed`: a group of groups, built
from flat names and converted back to them; these are the names of the flags and of the keys in config.json::

    @dataclasses.dataclass(frozen=True)
    class Optimizer(Group):
        learning_rate: float = setting(5e-5, "peak learning rate", POSITIVE)

    @dataclasses.dataclass(frozen=True, init=False)
    class Program(Composed):
        optimizer: Optimizer = Optimizer()

    Program(learning_rate=1e-4).optimizer.learning_rate
"""

import dataclasses
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

from pats_jax.errors import InputError, shown

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
_INT32_MAX = 2**31 - 1

Flat = dict[str, Any]  # flag -> value


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a setting may have; None, where its type allows it, is always valid.

    Attributes:
      holds: whether a value is in the range.
      text: the range in words, after "must be".
      largest: a bound far above any real run, so that a message comes before memory or time runs out; None: the largest
        number that compiled programs can hold.
    """

    holds: Callable[[Any], bool]
    text: str
    largest: int | None = None


def at_least(least: int, largest: int | None = None) -> Range:
    """All finite numbers that are at least ``least``."""
    return Range(lambda x: least <= x < math.inf, f"at least {least}", largest)


POSITIVE = Range(lambda x: 0 < x < math.inf, "greater than 0")
FRACTION = Range(lambda x: 0 < x <= 1, "in (0, 1]")  # a part that is not empty
PROBABILITY = Range(lambda x: 0 <= x < 1, "in [0, 1)")
SEED = Range(lambda x: 0 <= x < 2**63, "in [0, 2^63)", 2**63 - 1)


@dataclasses.dataclass(frozen=True)
class About:
    """What is known about a setting besides its type and default.

    Attributes:
      help: one line for ``--help``.
      range: its valid values.
      flag: its name as a flag and in config.json, if that differs from the field's name.
      is_path: whether it names files or folders.
      is_basic: whether ``--help`` shows it; ``--help_all`` shows every setting.
      of_one_start: whether it belongs to one start of the program rather than to the run; config.json then omits it.
      free_on_resume: whether it may change when a run is resumed, because it concerns only where and how the run is
        computed, saved and logged.
      chosen_by_run: whether a run chooses it if it is None; a resumed run then keeps the choice.
    """

    help: str
    range: Range | None = None
    flag: str | None = None
    is_path: bool = False
    is_basic: bool = False
    of_one_start: bool = False
    free_on_resume: bool = False
    chosen_by_run: bool = False


def setting(default: Any, help: str, range: Range | None = None, **about: Any) -> Any:
    """A field of a group, with its default and the fields of its `About`."""
    return dataclasses.field(default=default, metadata={"about": About(help, range, **about)})


@dataclasses.dataclass(frozen=True)
class Entry:
    """A setting of a class.

    Attributes:
      name: the name of the field.
      flag: its name as a flag and in config.json.
      owner: the class that first defined the field.
      type: its type.
      default: its default.
      about: see `About`.
    """

    name: str
    flag: str
    owner: type
    type: Any
    default: Any
    about: About

    def with_default(self, default: Any) -> "Entry":
        """The same setting with another default."""
        return self if self.default == default else dataclasses.replace(self, default=default)

    def fault(self, value: Any) -> str | None:
        """What the value must be, if it is not valid; else None."""
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, str) and not is_text(one):
                return "text without null bytes and lone surrogates"
        try:
            converted(self.type, value)
        except TypeError:
            return spelled(self.type)
        if value is None:
            return None
        allowed = self.about.range
        if allowed is not None and not allowed.holds(value):
            return allowed.text
        largest = (allowed and allowed.largest) or (FLOAT32_MAX if type(value) is float else _INT32_MAX)
        if type(value) in (int, float) and not value <= largest:
            return f"at most {largest:.2g}" if largest == FLOAT32_MAX else f"at most {largest}"
        return None

    def check(self, value: Any, prefix: str = "--") -> None:
        """Raises InputError, naming the setting, if the value is not valid."""
        expected = self.fault(value)
        if expected:
            raise InputError(f"{prefix}{self.flag} {shown(value, quoted=False)}: must be {expected}")


def entries(kind: type) -> dict[str, Entry]:
    """Flag -> setting, for the fields of a group, in order; groups within a `Composed` are skipped."""
    return _entries(kind)


@functools.cache
def _entries(kind):
    found = {}
    for field in dataclasses.fields(kind):
        about = field.metadata.get("about")
        if about is not None:
            owner = next(c for c in reversed(kind.__mro__) if field.name in c.__dict__.get("__annotations__", {}))
            flag = about.flag or field.name
            found[flag] = Entry(field.name, flag, owner, field.type, field.default, about)
    return found


def is_text(value: str) -> bool:
    """Whether a string can be written and read as text: no null bytes, no lone surrogates."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def converted(kind: Any, value: Any) -> Any:
    """Converts a JSON value to a setting's type; raises TypeError if it does not fit."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and isinstance(value, str) and value in choices:
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(converted(choices[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        for choice in choices:
            try:
                return converted(choice, value)
            except TypeError:
                continue
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if origin is None and type(value) is kind:
        return value
    raise TypeError


def spelled(kind: Any) -> str:
    """A setting's type in words."""
    choices = typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(as_json, choices))
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each {spelled(choices[0])}"
    return " or ".join(map(spelled, choices))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
}


class Group:
    """Settings that belong together; its subclasses are frozen dataclasses."""

    title: ClassVar[str] = ""  # the heading in ``--help``

    def check(self) -> None:
        """Raises InputError, naming the setting, if a value is invalid or conflicts with another."""
        check_fields(self)


def check_fields(group: Any, prefix: str = "--") -> None:
    """Raises InputError, naming the setting, if a value of a group is not in its range."""
    for entry in entries(type(group)).values():
        entry.check(getattr(group, entry.name), prefix)


def as_json(value: Any) -> str:
    """A value as config.json has it, for an error message."""
    return shown(value) if isinstance(value, str) else shown(json.dumps(value), quoted=False)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Groups that a flag chooses from: the methods of ``--method``, the PEFT kinds of ``--peft``.

    Attributes:
      entry: the flag.
      kinds: all groups that can be chosen, by name.
      chosen: returns the classes that a value of the flag chooses; raises InputError if the value is not valid.
      name: returns the value of the flag for the chosen groups.
      has_basic: whether `--help` shows any of their settings; otherwise it does not import them.
    """

    entry: Entry
    kinds: Callable[[], Mapping[str, type]]
    chosen: Callable[[Any], Iterable[type]]
    name: Callable[[tuple], Any]
    has_basic: bool = True

    def refusal(self, flag: str, chosen: Any) -> str:
        """The error message for a flag of a group that is not chosen."""
        words = " ".join(chosen) if isinstance(chosen, tuple) else chosen
        owner = f"--{self.entry.flag} {shown(words, quoted=False)}" if words else f"a run without --{self.entry.flag}"
        return f"--{flag}: not a setting of {owner}; omit it"

    def entries(self) -> dict[str, Entry]:
        """Flag -> setting, of all groups that can be chosen.

        Raises:
          TypeError: if two groups define a flag of the same name without inheriting it from a common class.
        """
        found: dict[str, Entry] = {}
        for kind in self.kinds().values():
            for flag, entry in entries(kind).items():
                known = found.setdefault(flag, entry)
                if known.owner is not entry.owner:
                    raise TypeError(f"{kind.__name__} and {known.owner.__name__} both have a setting {flag}")
        return found


Preset = Callable[[Callable[[str], str | None]], Flat]  # of a function: flag -> the text given for it, or None


@dataclasses.dataclass(frozen=True, init=False)
class Composed(Group):
    """A program's settings: a group of groups, which may have fields of its own, and choices of groups.

    The field of a choice holds the tuple of the chosen groups. Any setting can be given by its flat name.
    """

    choices: ClassVar[Mapping[str, Choice]] = {}  # field -> how its groups are chosen
    elsewhere: ClassVar[Mapping[str, str]] = {}  # flag of another program -> what to use here instead
    former: ClassVar[frozenset[str]] = frozenset()  # keys that config.json of earlier versions holds, without meaning
    presets: ClassVar[Mapping[str, "Preset"]] = {}  # value of --preset -> the defaults that it sets

    def __init__(self, **values: Any):
        """Takes fields, or settings by their flat names, which override those of a given group.

        Raises:
          TypeError: if there is no setting with that name.
          InputError: if a setting belongs to a group that is not chosen.
        """
        for field in dataclasses.fields(self):
            if field.name in self.choices:
                made: Any = self._chosen(field.name, values)
            elif isinstance(field.default, Group):
                group = values.pop(field.name, field.default)
                own = {e.name: values.pop(flag) for flag, e in entries(type(group)).items() if flag in values}
                made = dataclasses.replace(group, **own) if own else group
            else:
                made = values.pop(field.name, field.default)
            object.__setattr__(self, field.name, made)
        for name in values:
            for choice in self.choices.values():
                if name in choice.entries():
                    raise InputError(choice.refusal(name, choice.name(getattr(self, self._field_of(choice)))))
            raise TypeError(f"{type(self).__name__} has no setting {name!r}")

    def _chosen(self, field, values):
        choice = self.choices[field]
        before = {type(group): group for group in values.pop(field, ())}
        kinds = choice.chosen(values.pop(choice.entry.flag)) if choice.entry.flag in values else None
        if kinds is None:
            kinds = tuple(before) or tuple(choice.chosen(choice.entry.default))
        taken, made = set(), []
        for kind in kinds:
            own = {e.name: values[flag] for flag, e in entries(kind).items() if flag in values}
            taken |= entries(kind).keys() & values.keys()
            known = before.get(kind)
            kept = (
                {} if known is None else {field.name: getattr(known, field.name) for field in dataclasses.fields(kind)}
            )
            made.append(kind(**kept | own))
        for flag in taken:
            del values[flag]
        return tuple(made)

    def _field_of(self, choice):
        return next(name for name, each in self.choices.items() if each is choice)

    @classmethod
    def all_entries(cls) -> dict[str, Entry]:
        """Flag -> setting, of the program, its groups and all groups that can be chosen."""
        found: dict[str, Entry] = {}
        for group in cls.groups().values():
            found |= group
        return found

    @classmethod
    def defaults(cls) -> Flat:
        """Flag -> default, of every setting."""
        return {flag: entry.default for flag, entry in cls.all_entries().items()}

    @classmethod
    def renamed(cls, saved: Flat) -> Flat:
        """The content of a config.json, of this version or an earlier one, under the current names."""
        return saved

    @classmethod
    def groups(cls, *, basic: bool = False) -> dict[str, dict[str, Entry]]:
        """Title -> settings by flag, in order; the flag of a choice comes before the settings that it chooses.

        Args:
          basic: whether to leave out what only `--help_all` shows, where that saves imports.
        """
        found: dict[str, dict[str, Entry]] = {cls.title or "run": dict(entries(cls))}
        for field in dataclasses.fields(cls):
            if field.name in cls.choices:
                choice = cls.choices[field.name]
                of_kinds = {} if basic and not choice.has_basic else choice.entries()
                found[choice.entry.flag] = {choice.entry.flag: choice.entry} | of_kinds
            elif isinstance(field.default, Group):
                group = field.default
                own = {f: e.with_default(getattr(group, e.name)) for f, e in entries(type(group)).items()}
                found.setdefault(group.title or field.name, {}).update(own)
        return found

    def check(self) -> None:
        check_fields(self)
        for group in self._all_groups():
            group.check()

    def flat(self) -> Flat:
        """Flag -> value, of all settings; for a choice, only those of the chosen groups."""
        found = {flag: getattr(self, entry.name) for flag, entry in entries(type(self)).items()}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.choices:
                choice = self.choices[field.name]
                found[choice.entry.flag] = choice.name(value)
            for group in value if isinstance(value, tuple) else (value,):
                if isinstance(group, Group) or field.name in self.choices:
                    found |= {flag: getattr(group, e.name) for flag, e in entries(type(group)).items()}
        return found

    def to_dict(self) -> Flat:
        """Every setting of the run; those of a single start of the program, such as --resume, are left out."""
        known = self.all_entries()
        return {flag: value for flag, value in self.flat().items() if not known[flag].about.of_one_start}

    def replace(self, **changes: Any) -> Self:
        """A copy with changed settings, by field or by flat name."""
        return type(self)(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes)

    def _all_groups(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            yield from (g for g in (value if isinstance(value, tuple) else (value,)) if isinstance(g, Group))
