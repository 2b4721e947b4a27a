"""The docstrings of the whole repository are written in one dialect, which CONTRIBUTING.md describes."""

import ast
import inspect
import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("pats_jax", "benchmarks", "examples", "tests")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples", "References")  # in this order
WITH_NAMES = ("Args", "Attributes", "Raises")
HEADER = re.compile(r"([A-Z]\w*(?: \w+)?):")
ENTRY = re.compile(r"  (\*{0,2}\w+): (\S.*)")
CAPITAL = re.compile(r"[A-Z][a-z]*(?![\w-])")
PROPER_NAMES = {"Bernoulli", "False", "Flax", "None", "Optax", "Orbax", "Python", "Transformers", "True"}


def read_sections(docstring):
    """Section -> its lines, as far as the next line that is not indented, in the order of the docstring."""
    sections, current = {}, None
    lines = inspect.cleandoc(docstring).splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        header = HEADER.fullmatch(line)
        if header and below.startswith(" "):
            current = sections.setdefault(header[1], [])
        elif line and not line.startswith(" "):
            current = None
        elif line and current is not None:
            current.append(line)
    return sections


def read_entries(lines):
    """Name -> the first line of its text, for the entries of a section."""
    return {entry[1]: entry[2] for entry in map(ENTRY.fullmatch, lines) if entry}


def parameters(function):
    """The names of a function's parameters as Args writes them."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    starred = [f"*{given.vararg.arg}"] if given.vararg else []
    keywords = [f"**{given.kwarg.arg}"] if given.kwarg else []
    names = [*(x.arg for x in plain), *starred, *(x.arg for x in given.kwonlyargs), *keywords]
    return [name for name in names if name not in ("self", "cls")]


def faults_of_docstring(docstring):
    sections = read_sections(docstring)
    faults = [f"{name} is no section of ours" for name in sections if name not in SECTIONS]
    if not faults and list(sections) != sorted(sections, key=SECTIONS.index):
        faults.append(f"the order of the sections is {', '.join(sections)}")
    for name, lines in sections.items():
        indents = {len(line) - len(line.lstrip()) for line in lines}
        if min(indents) != 2:
            faults.append(f"{name} is indented by {min(indents)}")
        elif name in WITH_NAMES:
            faults += [f"{name}: {line.strip()!r} has no name" for line in lines if _lacks_name(line)]
            entries = read_entries(lines)
            faults += [f"{name}: {entry} has a capital" for entry, text in entries.items() if _has_capital(text)]
    return faults


def _lacks_name(line):
    return len(line) - len(line.lstrip()) < 4 and not ENTRY.fullmatch(line)


def _has_capital(text):
    word = CAPITAL.match(text)
    return word is not None and word[0] not in PROPER_NAMES


def faults_of_code(code):
    """Each fault of the docstrings in a module's code, with its line."""
    faults = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        found = faults_of_docstring(docstring)
        documented = list(read_entries(read_sections(docstring).get("Args", [])))
        if documented and isinstance(node, ast.FunctionDef) and documented != parameters(node):
            found.append(f"Args are {', '.join(documented)}, parameters {', '.join(parameters(node))}")
        faults += [f"{getattr(node, 'lineno', 1)}: {fault}" for fault in found]
    return faults


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_in_one_dialect(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    faults = {path: faults_of_code(path.read_text(encoding="utf-8")) for path in files}
    assert not [f"{path.relative_to(ROOT)}:{fault}" for path in files for fault in faults[path]]


def test_what_is_not_in_the_dialect_is_found():
    def faults(docstring):
        body = textwrap.indent(f'"""Scales x.\n\n{docstring}"""', "    ")
        return faults_of_code(f"def scale(x, *rest, by=1):\n{body}\n")

    good = "Args:\n  x: an array.\n  *rest: more.\n  by: Python's number.\n    Or none.\n\nReturns:\n  An array.\n"
    assert not faults(good)
    assert faults(good.replace("\n  ", "\n    ")) == ["1: Args is indented by 4", "1: Returns is indented by 4"]
    assert faults(good.replace("an array", "An array")) == ["1: Args: x has a capital"]
    assert faults(good.replace("by:", "to:")) == ["1: Args are x, *rest, to, parameters x, *rest, by"]
    assert faults(good.replace("  *rest: more.\n", "")) == ["1: Args are x, by, parameters x, *rest, by"]
    assert faults(good.replace("    Or", "  Or")) == ["1: Args: 'Or none.' has no name"]
    assert faults(good.replace("Returns", "Output")) == ["1: Output is no section of ours"]
    assert faults("Returns:\n  One.\n\n" + good.partition("\n\n")[0]) == [
        "1: the order of the sections is Returns, Args"
    ]
