"""Metadata of the built package that pyproject.toml cannot say alone: addresses, and README as the package's page.

`tool.pats-jax.repository` in pyproject.toml is the one place that has the project's address. While it is empty, the
package has no addresses, and README's links to files of the repository are plain text on the package's page.
"""

import pathlib
import re
import tomllib
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)")
_COMMENT = re.compile(r"^<!--.*?-->\n", re.DOTALL | re.MULTILINE)


class CustomMetadataHook(MetadataHookInterface):
    """Adds ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = pathlib.Path(self.root)
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        repository, version = project["tool"]["pats-jax"]["repository"], version_of(root)
        text = package_page((root / "README.md").read_text(encoding="utf-8"), repository, f"v{version}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(repository, f"v{version}")


def version_of(root: pathlib.Path) -> str:
    """The version that the package states of itself."""
    found = re.search(r'^__version__ = "(.+)"$', (root / "pats_jax" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "pats_jax/__init__.py: no version"
    return found[1]


def urls(repository: str, tag: str) -> dict[str, str]:
    """Name -> address; none without a repository."""
    if not repository:
        return {}
    return {
        "Source": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Documentation": f"{repository}/blob/{tag}/docs/index.md",
    }


def package_page(readme: str, repository: str, tag: str) -> str:
    """README as it stands on its own: links to files are absolute or, without a repository, plain text.

    Args:
      readme: its text.
      repository: the project's address; empty if it has none.
      tag: of the version that the links lead to.
    """

    def absolute(match: re.Match[str]) -> str:
        image, text, target = match["image"], match["text"], match["target"]
        if re.match(r"\w+:", target):
            return match[0]
        if target.startswith("#"):
            return match[0]
        if not repository:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/{tag}/{target})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(absolute, _COMMENT.sub("", readme)))
