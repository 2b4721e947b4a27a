"""METHODS, name -> method, and the choice by ``--method``."""

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pats_jax.core.settings import About, Choice, Entry
from pats_jax.errors import InputError, shown
from pats_jax.methods.method import Method

if TYPE_CHECKING:
    import rich.table

# Every method of this package, as module:class, in the order of `pats-jax methods`.
BUILTIN = (
    "finetune:FineTune",
    "pats:Pats",
    "perturbed:Perturbed",
    "dps_dense:DpsDense",
    "dps_mix:DpsMix",
    "sage:Sage",
    "noisytune:NoisyTune",
    "child_f:ChildTuningF",
    "child_d:ChildTuningD",
    "mixout:Mixout",
    "l2_sp:L2Sp",
    "r3f:R3F",
    "r_drop:RDrop",
    "smart:Smart",
    "lnsr:Lnsr",
    "neftune:NefTune",
    "hype:HyPe",
    "sift:Sift",
    "rose:Rose",
    "sam:Sam",
    "asam:Asam",
    "bitfit:BitFit",
)
GROUP = "pats_jax.methods"  # of entry points, by which other packages add methods


class _Methods(Mapping[str, type[Method]]):
    """All methods by name, imported on first use."""

    @functools.cached_property
    def _found(self) -> dict[str, type[Method]]:
        found: dict[str, type[Method]] = {}
        for place in BUILTIN:
            module, _, name = place.partition(":")
            method = getattr(importlib.import_module(f"pats_jax.methods.{module}"), name)
            found[method.name] = method
        for entry_point in importlib.metadata.entry_points(group=GROUP):
            method = entry_point.load()
            if not (isinstance(method, type) and issubclass(method, Method)) or method.name in found:
                raise TypeError(f"entry point {entry_point.value}: not a new Method")
            found[method.name] = method
        return found

    def __getitem__(self, name: str) -> type[Method]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


METHODS: Mapping[str, type[Method]] = _Methods()


def get_methods(names: str) -> tuple[type[Method], ...]:
    """The methods of ``--method``: one name, or several joined by ``+``.

    Raises:
      InputError: if there is no such method, or two of them cannot be combined; the message says why.
    """
    chosen = names.split("+")
    for name in chosen:
        if name not in METHODS:
            what = f"method {shown(name, quoted=False)}"
            raise InputError(f"{what}: no such method; choose one of {', '.join(METHODS)}, or join several with +")
    for position, name in enumerate(chosen):
        for other in chosen[:position]:
            reason = _conflict(METHODS[name], METHODS[other])
            if reason:
                raise InputError(f"method {names}: {other} and {name} cannot be combined: {reason}")
    return tuple(METHODS[name] for name in chosen)


def joined_names(methods: Sequence[Method]) -> str:
    """The value of ``--method`` that chooses these methods."""
    return "+".join(method.name for method in methods)


METHOD_CHOICE = Choice(
    Entry(
        "method",
        "method",
        Method,
        str,
        "finetune",
        About("a method listed by `pats-jax methods`, or several joined with +", is_basic=True),
    ),
    kinds=lambda: METHODS,
    chosen=get_methods,
    name=joined_names,
)


def _conflict(one, other):
    """Why two methods exclude each other, or None."""
    kinds = {one.kind, other.kind}
    if one is other:
        return "they are the same"
    if "plain" in kinds:
        return "finetune adds nothing; omit it"
    if len(kinds) == 1 and not kinds & {"noise", "objective"}:
        return _WHY_ONE.get(one.kind, f"both are of the kind {one.kind}")
    return one.conflicts.get(other.name) or other.conflicts.get(one.name)


_WHY_ONE = {
    "subnetwork": "both select the parameters to update",
    "anchor": "both pull weights back to their pretrained values",
    "scaling": "both rescale Adam's step",
    "ascent": "both choose where the gradient is taken",
}


def as_table() -> "rich.table.Table":
    """A table of all methods: what each does, its settings with defaults, its costs and its source."""
    import rich.markup
    import rich.table

    from pats_jax.core.settings import entries

    table = rich.table.Table(show_lines=True)
    for title in ("method", "what it does", "settings", "beyond AdamW"):
        table.add_column(title, overflow="fold")
    for name, method in METHODS.items():
        what = f"{method.summary}\n{method.layers or 'all parameters'}\n{method.source}"
        flags = "\n".join(f"--{flag} {entry.default}" for flag, entry in entries(method).items())
        costs = f"{method.state_bytes} bytes of state per parameter\nextra passes: {method.passes}"
        table.add_row(*map(rich.markup.escape, (name, what, flags, costs)))
    return table
