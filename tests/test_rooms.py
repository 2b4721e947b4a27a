"""The rooms of the package: how many there are, and that their imports run downwards only, without a circle.

All import statements are read, those inside functions and of the stub files too, and the modules that the command line
imports by their names. What stands under ``if __name__ == "__main__"`` is a program, not an import.
"""

import ast
import dataclasses
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import pats_jax
from pats_jax.comparison.compare import Grid
from pats_jax.core.settings import Group, entries
from pats_jax.methods import METHODS
from pats_jax.models import peft
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run.settings import Settings
from pats_jax.run.text2text_settings import Text2TextSettings

ROOT = pathlib.Path(pats_jax.__file__).parent

# From the ground up: a room imports from the rooms that stand before it.
ORDER = """
    errors core random trees transforms companions train_state objectives models data reporting
    methods training run comparison priming glue programs __main__
""".split()

ALIASES = ["metrics", "option_scoring"]  # modules under their names in earlier versions

# They work on any pytree of parameters, so they know neither Flax nor the rooms above.
OPTIMIZER_ROOMS = {"random", "trees", "transforms", "companions"}
NUMERICS = {"jax", "optax", "numpy"}


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1]


def is_program(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def statements(node: ast.AST):
    """All nodes below one, without those that run only when the module is a program."""
    for child in ast.iter_child_nodes(node):
        if not is_program(child):
            yield child
            yield from statements(child)


def imported_names(path: pathlib.Path):
    """The dotted names that a file's import statements ask for: ``from a import b`` gives ``a.b``."""
    package = module_name(path).split(".") if path.stem == "__init__" else module_name(path).split(".")[:-1]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_module":  # of cli.py
            yield f"pats_jax.{ast.literal_eval(node.args[0])}"


def files_of(module: str) -> list[pathlib.Path]:
    """A module's own file, and its room's stub, which says what ``from pats_jax.models import ...`` imports."""
    path = MODULES[module]
    stub = path.with_suffix(".pyi")
    return [path, stub] if stub.exists() and module != "pats_jax" else [path]


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports."""
    found = {}
    for module in MODULES:
        names = {name for path in files_of(module) for name in imported_names(path)}
        ours = {name for name in names if name.split(".")[0] == "pats_jax"}
        found[module] = {name if name in MODULES else name.rpartition(".")[0] for name in ours} - {"", module}
    return found


def test_few_rooms():
    aliases = [f"{name}.py" for name in ALIASES]
    entries = {path.name for path in ROOT.iterdir()} - {"__init__.pyi", "py.typed", "__pycache__", *aliases}
    assert len(entries) <= 20, sorted(entries)
    assert {name.removesuffix(".py") for name in entries} == {"__init__", *ORDER}


def test_the_map_shows_every_room():
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = page.partition("## Where things are")[2].partition("\n## ")[0]
    own = {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`(\w+(?:/|\.py))`", shown)}
    assert {*ORDER, *ALIASES} - {"__main__"} <= own


def test_the_reader_of_imports_sees_every_kind():
    assert {"pats_jax.companions.ranking", "pats_jax.random"} <= imports()["pats_jax.companions.dps"]
    assert "pats_jax.models.pretrained" in imports()["pats_jax.models"]  # by the stub alone
    assert (
        "pats_jax.glue" in imports()["pats_jax.programs.cli"]
        and "pats_jax.programs.cli" not in imports()["pats_jax.glue"]
    )
    assert all(imported in MODULES for found in imports().values() for imported in found)


def test_functions_fit_on_a_screen():
    """At most 60 lines without the docstring."""
    long = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)
                long += [f"{path.name}: {node.name} has {lines} lines"] if lines > 60 else []
    assert long == []


def test_settings_come_in_small_groups():
    """At most 20 in a group; a program's own fields count, those of its groups do not."""
    kinds = [Settings, Text2TextSettings, PrimingSettings, GymSettings, Grid, *METHODS.values(), *peft.KINDS.values()]
    kinds += [type(field.default) for kind in kinds for field in dataclasses.fields(kind) if is_group(field.default)]
    assert max(len(entries(kind)) for kind in kinds) <= 20 and len(kinds) > 30


def is_group(value):
    return isinstance(value, Group)


def test_no_circle_of_modules():
    order = list(graphlib.TopologicalSorter(imports()).static_order())  # a CycleError names the circle
    assert len(order) == len(MODULES)


def test_imports_run_downwards():
    upwards = {
        (module, imported)
        for module, found in imports().items()
        for imported in found - {"pats_jax"}
        if module != "pats_jax" and room(module) not in ALIASES
        if room(imported) in ALIASES or ORDER.index(room(imported)) > ORDER.index(room(module))
    }
    assert upwards == set(), "move what they need to a room below"


def test_the_package_itself_gives_the_library_its_version_only():
    """Everything else that it gives comes from a room above, so the room is named."""
    for module, path in MODULES.items():
        if module == "pats_jax":
            assert not {name for name in imported_names(path) if name.startswith("pats_jax")}
            continue
        taken = {name for name in imported_names(path) if name.startswith("pats_jax.") and name.count(".") == 1}
        assert taken <= {*MODULES, "pats_jax.__version__"}, module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pats_jax":
                assert node.attr == "__version__", f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "pats_jax" and room(name) in OPTIMIZER_ROOMS])
def test_optimizer_rooms_need_jax_and_optax_only(module):
    assert {room(imported) for imported in imports()[module]} <= OPTIMIZER_ROOMS
    others = {name.split(".")[0] for name in imported_names(MODULES[module])} - {"pats_jax"}
    assert others - sys.stdlib_module_names <= NUMERICS


def test_no_private_name_of_another_file_is_imported():
    for module, path in MODULES.items():
        private = [name for name in imported_names(path) if name.startswith("pats_jax.") and "._" in name]
        assert [name for name in private if not name.endswith("__")] == [], module


def test_an_objective_keeps_its_name_when_its_file_is_imported():
    """The function and its file have one name: `pats_jax.objectives.r3f` stays the function, whatever came first."""
    code = """
import importlib, pats_jax
files = {name: importlib.import_module(f"pats_jax.objectives.{name}") for name in ("r3f", "r_drop", "smart", "lnsr")}
for name, file in files.items():
    assert getattr(pats_jax.objectives, name) is getattr(pats_jax, name) is getattr(file, name), name
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
