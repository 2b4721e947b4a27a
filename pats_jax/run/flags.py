"""Reads the flags of the programs from the command line and from config.json, and writes both."""

import dataclasses
import difflib
import os
from typing import Annotated, Any, TypeVar

import tyro

from pats_jax.core import files
from pats_jax.core.settings import Composed, Entry, Flat, as_json, converted, entries, spelled
from pats_jax.errors import InputError, shown
from pats_jax.reporting.console import parse_flags
from pats_jax.run.settings import Program

Part = TypeVar("Part", bound=Composed)


def _parse_yes_or_no(words: list[str]) -> bool | None:
    named = {"true": True, "false": False, "none": None}
    if [word for word in words[1:]] or (words and words[0].lower() not in named):
        raise ValueError(f"expected true or false, got {shown(' '.join(words))}")
    return named[words[0].lower()] if words else True


# A flag that may stand alone, or with true or false in any case, as in run_classification.
_YES_OR_NO = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[{true,false}]",
    instance_from_str=_parse_yes_or_no,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [str(value).lower()],
)

# Flags of the run_glue examples that are not supported here -> what to use instead.
FOREIGN_FLAGS = {
    "adafactor": "use any Optax optimizer from Python",
    "attn_implementation": "use --attention",
    "bf16": "use --dtype bfloat16",
    "cache_dir": "set the environment variable HF_HOME",
    "config_name": "the config is read from --model_name_or_path",
    "dataloader_num_workers": "the training process builds the batches",
    "eval_strategy": "evaluation follows each epoch; use --eval_steps to change that",
    "evaluation_strategy": "evaluation follows each epoch; use --eval_steps to change that",
    "fp16": "use --dtype bfloat16, which needs no scaling of the loss",
    "group_by_length": "batches are always grouped by length; see --length_buckets",
    "hub_token": "log in with huggingface_hub",
    "label_column_names": "use --label_column_name",
    "label_names": "labels are read from the training data",
    "learning_rate_scheduler": "use --lr_scheduler_type",
    "logging_dir": "metrics.jsonl, plots/ and tensorboard/ are written to --output_dir",
    "logging_strategy": "use --logging_steps",
    "max_length": "use --max_seq_length",
    "max_train_steps": "use --max_steps",
    "model_revision": "download the revision and set --model_name_or_path to its folder",
    "no_cuda": "set the environment variable JAX_PLATFORMS=cpu",
    "num_warmup_steps": "use --warmup_ratio",
    "optim": "the optimizer is AdamW; use other Optax optimizers from Python",
    "overwrite_cache": "tokens are not cached on disk",
    "overwrite_output_dir": "use --overwrite",
    "pad_to_max_length": "batches are padded to buckets of length; use --length_buckets",
    "preprocessing_num_workers": "the tokenizer always uses all cores",
    "run_name": "use --output_dir",
    "resume_from_checkpoint": "use --resume, which loads the newest checkpoint in --output_dir",
    "save_strategy": "use --save_steps",
    "token": "log in with huggingface_hub",
    "tokenizer_name": "the tokenizer is read from --model_name_or_path",
    "trust_remote_code": "remote code is never run",
    "use_auth_token": "log in with huggingface_hub",
    "use_cpu": "set the environment variable JAX_PLATFORMS=cpu",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "use_slow_tokenizer": "the fast tokenizer is always used",
    "warmup_steps": "use --warmup_ratio",
}


def path_of_flag(flag: str, text: str) -> str:
    """The path that a flag names, with a leading ``~`` expanded; shells expand it only in ``--x ~/y``.

    Raises:
      InputError: if the path is not valid on this system, or ``~`` is followed by the name of an unknown user.
    """
    what, path = f"{flag} {shown(text, quoted=False)}", os.path.expanduser(text)
    if not text:
        raise InputError(f"{flag}: empty; set a path, or omit the flag")
    if path.startswith("~"):
        user = shown(path.split("/")[0][1:], quoted=False)
        raise InputError(f"{what}: there is no user {user}; if the name starts with ~, write ./~...")
    if "\0" in path:
        raise InputError(f"{what}: must be a path without null bytes")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise InputError(f"{what}: must be a path that this system can encode") from None
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise InputError(f"{what}: the path is too long")
    return path


_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux and macOS (whose paths end at 1023)


def parse(args: list[str], prog: str, kind: type[Program], others_read: frozenset[str] = frozenset()) -> Program:
    """Reads settings from command-line arguments; ``--config`` supplies those that are not given.

    Args:
      args: the arguments.
      prog: the program's name, for its help.
      kind: the program's settings.
      others_read: flags of methods and adapters that are accepted although these are not chosen.

    Raises:
      InputError: if the program does not read a flag, or the config file or a value is invalid.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help`` and ``--help_all``.
    """
    given = flag_names(args)
    if {"help", "h", "help_all"} & set(given):
        show_help(prog, kind, everything="help_all" in given)
    _refuse_foreign(given, prog, kind)
    path = value_of("--config", args)
    saved = {} if path is None else _given(path, kind)
    saved |= _preset(args, kind, has_config=path is not None)
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(given):
        saved.pop("train_batch_size", None)  # the flags given now count, not the saved product
    parsed = parse_flags(parser(kind, defaults=saved, only=_known(given, kind)), args=args, prog=prog)
    values = kind.defaults() | saved | vars_of(parsed)
    values.pop("preset", None)  # its values are settings of their own now
    known, values = kind.all_entries(), _with_paths(values, kind)
    names = read_by(kind, values)
    read = {flag: value for flag, value in values.items() if flag in names}
    for flag, value in read.items():
        known[flag].check(value)
    settings = kind(**read)
    _refuse_unread(given, settings, others_read)
    settings.check()
    return settings


def parse_part(args: list[str], prog: str, kind: type[Part], others: type[Composed]) -> tuple[Part, list[str]]:
    """Reads the settings of a program that passes its other flags on to runs of another program.

    Args:
      args: the arguments.
      prog: the program's name.
      kind: the settings that it reads itself.
      others: the settings of the runs.

    Returns:
      Its settings, and the arguments for the runs.

    Raises:
      InputError: if the program itself sets a flag in its runs, or a value is invalid.
      SystemExit: as for `parse`.
    """
    given = flag_names(args)
    if {"help", "h", "help_all"} & set(given):
        show_help(prog, kind, others, everything="help_all" in given)
    _refuse_foreign(given, prog, kind, others)
    own = parser(kind, defaults={}, has_config=False, only=frozenset(given))
    parsed, left = parse_flags(own, args=args, prog=prog, return_unknown_args=True)
    settings = kind(**_with_paths(kind.defaults() | vars_of(parsed), kind))
    settings.check()
    return settings, left


def show_help(prog: str, *kinds: type[Composed], everything: bool) -> None:
    """Prints the flags of a program, by group, and exits: the most used ones, or all.

    Args:
      prog: the program's name.
      *kinds: its settings, and those of the runs that it starts.
      everything: whether to show all.
    """
    hint = "" if everything else "  --help_all shows all flags."
    flags, kind = parser(*kinds, defaults={}, basic=not everything), kinds[0]
    parse_flags(flags, args=["--help"], prog=prog, description=f"{(kind.__doc__ or '').strip()}{hint}")


def _known(given, kind):
    """The flags to parse, which is quicker the fewer there are; None, for all, if one is given that is not known."""
    known = kind.all_entries().keys() | {"config"}
    unknown = any(name not in known and name.removeprefix("no_") not in known for name in given)
    return None if unknown else frozenset(given)


def parser(
    *kinds: type[Composed],
    defaults: Flat,
    basic: bool = False,
    has_config: bool = True,
    only: frozenset[str] | None = None,
) -> type:
    """A class that tyro parses: the settings of a program, in its groups.

    Args:
      *kinds: the program's settings; of further ones, only flags that the first neither has nor refuses.
      defaults: the values of flags that are not given.
      basic: whether to include only the settings that ``--help`` shows.
      has_config: whether there is a flag ``--config``, which is not one of the settings.
      only: the flags to include; None for all.
    """
    fields: dict[str, list[tuple[str, Any, Any]]] = {}
    if has_config and not basic:
        fields["saved"] = [("config", _CONFIG, dataclasses.field(default=None))]
    taken = set(kinds[0].elsewhere)
    for kind in kinds:
        for title, known in kind.groups(basic=basic).items():
            own = [e for e in known.values() if (e.about.is_basic or not basic) and e.flag not in taken]
            own = [e for e in own if only is None or e.flag in only]
            fields.setdefault(title, []).extend(_flag(entry, defaults) for entry in own)
            taken |= {entry.flag for entry in own}
    made = []
    for title, of_group in fields.items():
        if of_group:
            group: Any = dataclasses.make_dataclass(title, of_group, frozen=True)
            flat = tyro.conf.OmitArgPrefixes[group]  # type: ignore[misc]
            made.append((title, flat, dataclasses.field(default=group())))
    return dataclasses.make_dataclass("Flags", made, frozen=True)


_CONFIG = Annotated[str | None, tyro.conf.arg(metavar="JSON", help="read settings from a saved run's config.json")]


def _flag(entry: Entry, defaults: Flat) -> tuple[str, Any, Any]:
    kind: Any = Annotated[entry.type, _YES_OR_NO] if entry.type == bool | None else entry.type
    documented = Annotated[kind, tyro.conf.arg(help=entry.about.help)]
    return entry.flag, documented, dataclasses.field(default=defaults.get(entry.flag, entry.default))


def vars_of(parsed: Any) -> Flat:
    """Flag -> value, of an instance of a class from `parser`."""
    found: Flat = {}
    for group in vars(parsed).values():
        found |= vars(group)
    found.pop("config", None)
    return found


def read_by(kind: type[Composed], values: Flat) -> set[str]:
    """The flags that have an effect with these values; for a choice, only those of the chosen groups."""
    read = set(kind.all_entries())
    for choice in kind.choices.values():
        kinds = choice.chosen(values.get(choice.entry.flag, choice.entry.default))
        read -= choice.entries().keys() - {flag for chosen in kinds for flag in entries(chosen)}
    return read


def as_flags(settings: Composed) -> list[str]:
    """The arguments that `parse` converts to these settings: one for each that differs from its default."""
    known, args = settings.all_entries(), []
    for flag, value in settings.flat().items():
        if value == known[flag].default:
            continue
        if isinstance(value, bool) and known[flag].type is bool:
            args.append(f"--{flag}" if value else f"--no_{flag}")
        elif isinstance(value, (list, tuple)):
            args += [f"--{flag}", *map(str, value)]
        else:
            args.append(f"--{flag}={value}")
    return args


def flag_names(args: list[str]) -> list[str]:
    """The names of the flags among arguments, with underscores; ``--no_x`` counts as ``x`` too."""
    names = [arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in args if _is_flag(arg)]
    return names + [name.removeprefix("no_") for name in names if name.startswith("no_")]


def _is_flag(arg):
    return arg.startswith("--") or arg == "-h"


def _refuse_foreign(given, prog, kind, others=None):
    known = kind.all_entries() | (others.all_entries() if others else {})
    elsewhere = {**(others.elsewhere if others else {}), **kind.elsewhere}
    for name in given:
        if name in elsewhere:
            raise InputError(f"--{name}: {elsewhere[name]}")
        if name in FOREIGN_FLAGS and name not in known:
            raise InputError(f"--{name} is not supported: {FOREIGN_FLAGS[name]}")
        if name in kind.former and name not in known:
            raise InputError(f"--{name}: {prog} does not read it; omit it")


def _refuse_unread(given, settings, others_read):
    """Refuses flags of methods and adapters that are not chosen."""
    read = settings.flat()
    for choice in settings.choices.values():
        for name in given:
            if name in choice.entries() and name not in read and name not in others_read:
                raise InputError(choice.refusal(name, read[choice.entry.flag]))


def _preset(args: list[str], kind: type[Composed], *, has_config: bool) -> Flat:
    """The defaults that ``--preset`` sets."""
    name = value_of("--preset", args)
    if name is None or name not in kind.presets:  # another name is refused by the parser
        return {}
    if has_config:
        raise InputError("--preset: cannot be used with --config, which holds every setting; omit one")
    return kind.presets[name](lambda flag: value_of(f"--{flag}", args))


def _given(path, kind):
    try:
        return read_values(path_of_flag("--config", path), kind)
    except InputError as error:
        raise InputError(f"--config {error}") from None


def read_config(path: str, kind: type[Program]) -> Program:
    """Reads the settings from a run's config.json, of this version or an earlier one.

    Raises:
      InputError: if the file is missing, damaged or not a JSON object, or has an unknown key or a value of the wrong
        type or out of range; the message names the file and the key.
    """
    values = read_values(path, kind)
    try:
        return kind(**{flag: value for flag, value in values.items() if flag in read_by(kind, values)})
    except InputError as error:  # a method that is not here, or two that cannot be combined
        raise InputError(f"{path}: {error}") from None


def read_values(path: str, kind: type[Composed]) -> Flat:
    """The values for `read_config`: flag -> value, including those of groups that are not chosen."""
    saved = files.read_json(path)
    if not isinstance(saved, dict):
        raise InputError(f"{path}: not a JSON object with settings")
    known, values = kind.all_entries(), {}
    for key, value in kind.renamed(saved).items():
        if key not in known:
            if key in kind.former:
                continue
            near = difflib.get_close_matches(key[:80], known, 1)
            raise InputError(f"{path}: unknown setting {shown(key)}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            values[key] = converted(known[key].type, value)
        except TypeError:
            what = spelled(known[key].type)
            raise InputError(f"{path}: {key} is {as_json(value)}; it must be {what}") from None
        asked = known[key].fault(values[key])
        if asked:
            raise InputError(f"{path}: {key} is {as_json(value)}; it must be {asked}")
    return values


def _with_paths(values, kind):
    """The values with ``~`` expanded in every path."""
    known = kind.all_entries()
    return {flag: _as_path(flag, value) if known[flag].about.is_path else value for flag, value in values.items()}


def _as_path(flag, value):
    """A value of a flag that names files, with ``~`` expanded."""
    if isinstance(value, str):
        return path_of_flag(f"--{flag}", value)
    return tuple(path_of_flag(f"--{flag}", each) for each in value) if isinstance(value, tuple) else value


def value_of(flag: str, args: list[str]) -> str | None:
    """The value of a flag, such as ``--config``, among arguments; None if it is not given."""
    for position, arg in enumerate(args):
        if _is_flag(arg) and flag_names([arg])[0] == flag.lstrip("-"):
            _, has_value, value = arg.partition("=")
            return value if has_value else next(iter(args[position + 1 :]), None)
    return None
