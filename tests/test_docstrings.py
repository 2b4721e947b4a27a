"""The docstrings of the whole repository are written in one dialect, which CONTRIBUTING.md describes."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("pats_jax", "benchmarks", "examples", "tests")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples", "References")  # in this order
WITH_NAMES = ("Args", "Attributes", "Raises")
HEADER = re.compile(r"([A-Z]\w*(?: \w+)?):")
ENTRY = re.compile(r"  (\*{0,2}\w+): (\S.*)")
CAPITAL = re.compile(r"[A-Z][a-z]*(?![\w-])")
PROPER_NAMES = {"Bernoulli", "False", "Flax", "None", "Optax", "Orbax", "Python", "Transformers", "True"}
ROLE = re.compile(r":\w+:`")  # of reStructuredText, such as :func:`f`


def read_sections(docstring):
    """Section -> its lines, up to the next line that is not indented, in the order of the docstring."""
    sections, current = {}, None
    lines = docstring.splitlines()
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
    """The names of a function's parameters, as Args writes them."""
    given = function.args
    starred = [f"*{given.vararg.arg}"] if given.vararg else []
    keywords = [f"**{given.kwarg.arg}"] if given.kwarg else []
    plain = [x.arg for x in (*given.posonlyargs, *given.args)]
    names = [*plain, *starred, *(x.arg for x in given.kwonlyargs), *keywords]
    return [name for name in names if name not in ("self", "cls")]


def faults_of_docstring(docstring):
    lines, sections = docstring.splitlines(), read_sections(docstring)
    faults = [] if len(lines) == 1 or not lines[1] else ["the summary is not one line"]
    faults += ["a role of reStructuredText"] if ROLE.search(docstring) else []
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        return [*faults, *(f"{name} is no section of ours" for name in unknown)]
    if list(sections) != sorted(sections, key=SECTIONS.index):
        faults.append(f"the order of the sections is {', '.join(sections)}")
    for name, content in sections.items():
        indent = min(len(line) - len(line.lstrip()) for line in content)
        if indent != 2:
            faults.append(f"{name} is indented by {indent}")
        elif name in WITH_NAMES:
            faults += [f"{name}: {line.strip()!r} has no name" for line in content if _lacks_name(line)]
            entries = read_entries(content)
            faults += [f"{name}: {entry} has a capital" for entry, text in entries.items() if _has_capital(text)]
    return faults


def _lacks_name(line):
    return not line.startswith(" " * 4) and not ENTRY.fullmatch(line)


def _has_capital(text):
    word = CAPITAL.match(text)
    return word is not None and word[0] not in PROPER_NAMES


def faults_of_code(code):
    """Each fault of the docstrings in a module's code, with its line."""
    faults, lines = [], code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        found, place = faults_of_docstring(docstring), node.body[0]
        if place.end_lineno > place.lineno and lines[place.end_lineno - 1].strip() != '"""':
            found.append("the closing quotes are not on a line of their own")
        documented = list(read_entries(read_sections(docstring).get("Args", [])))
        if documented and isinstance(node, ast.FunctionDef) and documented != parameters(node):
            found.append(f"Args are {', '.join(documented)}, parameters {', '.join(parameters(node))}")
        faults += [f"{place.lineno}: {fault}" for fault in found]
    return faults


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_in_one_dialect(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    faults = {path: faults_of_code(path.read_text(encoding="utf-8")) for path in files}
    assert not [f"{path.relative_to(ROOT)}:{fault}" for path in files for fault in faults[path]]


def test_the_example_is_in_the_dialect():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert '"""' in example and not faults_of_code(example)


GOOD = '''
def scale(x, *rest, by=1):
    """Scales x.

    Args:
      x: an array.
      *rest: more of
        them.
      by: Python's number.

    Returns:
      An array.
    """
'''


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("x: an", "x: An", "Args: x has a capital"),
        ("by: ", "to: ", "Args are x, *rest, to, parameters x, *rest, by"),
        ("      x: an array.\n", "", "Args are *rest, by, parameters x, *rest, by"),
        ("        them", "      them", "Args: 'them.' has no name"),
        ("      An array", "        An array", "Returns is indented by 4"),
        ("Returns:", "Output:", "Output is no section of ours"),
        ("Returns:", "Attributes:", "Attributes: 'An array.' has no name"),
        ("Args:", "Raises:", "the order of the sections is Raises, Returns"),
        ("x.\n\n", "x\n    and rest.\n\n", "the summary is not one line"),
        ("An array", "A :class:`Array`", "a role of reStructuredText"),
        ('array.\n    """', 'array."""', "the closing quotes are not on a line of their own"),
    ],
)
def test_what_is_not_in_the_dialect_is_found(old, new, fault):
    assert not faults_of_code(GOOD)
    assert GOOD.count(old) == 1
    assert f"3: {fault}" in faults_of_code(GOOD.replace(old, new))
