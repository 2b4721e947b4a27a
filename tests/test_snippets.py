"""Every Python snippet of README.md and docs/ runs, a page's one after the other in one namespace.

A comment before a snippet may prepare what it names, or make rows, steps and model small; it never skips one::

    <!-- test: params, grads = {"w": jnp.ones(3)}, {"w": jnp.ones(3)} -->

``<!-- test with torch: ... -->`` leaves the snippet to `make parity`, with a namespace of its own. An expression with
a literal in a comment behind it must have that value.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(
    r"(?:<!-- test(?P<torch> with torch)?:\s(?P<setup>(?:(?!-->).)*)-->\s*)?^```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Snippet:
    page: pathlib.Path
    line: int  # of the page, where the code begins
    setup_line: int  # and the comment before it
    setup: str
    code: str
    torch: bool

    def run(self, names):
        exec(compile("\n" * (self.setup_line - 1) + self.setup, self.page, "exec"), names)
        lines = self.code.splitlines()
        for statement in ast.parse(self.code).body:
            source = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
            ast.increment_lineno(statement, self.line - 1)
            if isinstance(statement, ast.Expr):
                value = eval(compile(ast.Expression(statement.value), self.page, "eval"), names)
                expected = literal_behind(source)
                assert expected is None or value == expected, source
            else:
                exec(compile(ast.Module([statement], []), self.page, "exec"), names)


def literal_behind(source):
    """The value in a comment at the end of a line, or None where that is in words."""
    try:
        return ast.literal_eval(source.rpartition("  # ")[2].strip()) if "  # " in source else None
    except (SyntaxError, ValueError):
        return None


def snippets_of(page):
    text = page.read_text(encoding="utf-8")

    def line(match, group):
        return text.count("\n", 0, match.start(group)) + 1

    return [
        Snippet(
            page,
            line(match, "code"),
            line(match, "setup") if match["setup"] else 1,
            (match["setup"] or "").strip(),
            match["code"],
            bool(match["torch"]),
        )
        for match in SNIPPET.finditer(text)
    ]


SNIPPETS = {str(page.relative_to(ROOT)): snippets_of(page) for page in PAGES}
COUNT = sum(map(len, SNIPPETS.values()))


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pages(torch):
    chosen = {page: [s for s in found if s.torch is torch] for page, found in SNIPPETS.items()}
    return [pytest.param(found, id=f"{page}, {len(found)} of {COUNT}") for page, found in chosen.items() if found]


@pytest.mark.parametrize("snippets", pages(torch=False))
def test_snippets_of_a_page(snippets):
    names = {}
    for snippet in snippets:
        snippet.run(names)


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="parity needs torch: pip install .[parity]")
@pytest.mark.parametrize("snippets", pages(torch=True))
def test_snippets_with_torch(snippets):
    for snippet in snippets:
        snippet.run({})


def test_no_snippet_is_missed():
    assert COUNT >= 19, {page: len(found) for page, found in SNIPPETS.items()}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```python") == len(snippets_of(page)), page
        prepared = [snippet for snippet in snippets_of(page) if snippet.setup]
        assert len(re.findall("^<!-- test.*:", text, re.MULTILINE)) == len(prepared), (
            f"{page}: a comment before no snippet"
        )
        rest = SNIPPET.sub("", text)
        assert not re.search(r"^\s*(import \w+|from [\w.]+ import \w+)", rest, re.MULTILINE), (
            f"{page}: a block without a language"
        )


@pytest.mark.parametrize(
    ("source", "value"),
    [("f(x)  # 3", 3), ('a, b  # ("x", 1)', ("x", 1)), ("f(x)  # in words", None), ("f(x)", None), ('"#"', None)],
)
def test_a_literal_behind_an_expression_is_its_value(source, value):
    assert literal_behind(source) == value


def test_a_snippet_that_is_wrong_fails_at_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- test: x = 1 -->\n```python\ny = x + 1\ny  # 3\n```\n\n```python\nnowhere()\n```\n")
    wrong_value, wrong_name = snippets_of(page)
    names = {}
    with pytest.raises(AssertionError, match="y  # 3"):
        wrong_value.run(names)
    assert names["y"] == 2
    with pytest.raises(NameError, match="nowhere") as caught:
        wrong_name.run(names)
    assert caught.traceback[-1].lineno + 1 == 10
