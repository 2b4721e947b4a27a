"""What README and docs/ name is there: files, links, modules and their names."""

import contextlib
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
FILE = re.compile(r"(?:pats_jax|tests|docs|benchmarks|examples|\.ci)/[\w./-]*|(?:README|CONTRIBUTING|CHANGELOG)\.md")
NAME = re.compile(r"\b(?:pats_jax|benchmarks)(?:\.[A-Za-z_]\w*)+")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def stale_files(text):
    """Files of the repository that are named, as code or in a command, and not there."""
    codes = CODE.findall(text)
    named = [path for code in codes for path in FILE.findall(code) if code.startswith((path, "python "))]
    return [path for path in named if not (ROOT / path).exists()]


def stale_names(text):
    return [name for name in NAME.findall(text) if not resolves(name)]


def resolves(name):
    with contextlib.suppress(ModuleNotFoundError):  # of a parent
        if importlib.util.find_spec(name):  # a module, which may need torch to be imported
            return True
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pages
def test_files_that_a_page_names_exist(page):
    assert not stale_files(page.read_text(encoding="utf-8"))


@pages
def test_links_of_a_page_lead_somewhere(page):
    """Also from README and CONTRIBUTING, which the site does not check as files of the repository."""
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not re.match(r"\w+:|#", link)]
    assert not [link for link in links if not (page.parent / link.partition("#")[0]).exists()]


@pages
def test_names_of_the_library_on_a_page_exist(page):
    assert not stale_names(page.read_text(encoding="utf-8"))


def test_what_is_stale_is_found():
    assert stale_files("`tests/test_docs.py` and `pats_jax/gone.py`, `python benchmarks/gone.py RUN`") == [
        "pats_jax/gone.py",
        "benchmarks/gone.py",
    ]
    assert stale_names(
        "pats_jax.pats, pats_jax.models.peft.LoraConfig, pats_jax.gone, pats_jax.random.gone, benchmarks.gone"
    ) == [
        "pats_jax.gone",
        "pats_jax.random.gone",
        "benchmarks.gone",
    ]
