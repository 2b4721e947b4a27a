"""A Griffe extension: the few marks of reStructuredText in docstrings become Markdown on the site's pages."""

import re
from typing import Any

import griffe

_MARKS = (
    (re.compile(r"`([^`<>]+?)\s+<(https?://[^>\s]+)>`_"), r"[\1](\2)"),
    (re.compile(r"^\s*::$", re.MULTILINE), ""),
    (re.compile(r"::$", re.MULTILINE), ":"),  # a formula follows, indented
)


class Markdown(griffe.Extension):
    """See `_MARKS`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            for mark, markdown in _MARKS:
                obj.docstring.value = mark.sub(markdown, obj.docstring.value)
