"""A page of text, tables and pictures in two forms, Markdown and HTML, and tables as lines of a console."""

import base64
import html
import pathlib
import re
import urllib.parse
from typing import Any

from pats_jax.reporting.console import visible

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre, code { background: #f3f4f6; border-radius: 3px; }
pre { padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
"""


class Page:
    """A text that grows by blocks, in Markdown and in HTML.

    `Back-quoted` words of a text are code in both, and nothing else has a special meaning: Markdown or HTML syntax
    is shown as it is. Pass values from outside through `plain` or `code`, because they may contain a back quote.
    """

    def __init__(self, title: str):
        self._title = title
        self._markdown: list[str] = [f"# {_markdown(title)}"]
        self._html: list[str] = [f"<h1>{_rich(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        self._add(f"{'#' * level} {_markdown(text)}", f"<h{level}>{_rich(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._add(markdown_paragraph(_markdown(text)), f"<p>{_rich(text)}</p>")

    def bullets(self, texts: list[str]) -> None:
        items = "".join(f"<li>{_rich(text)}</li>\n" for text in texts)
        self._add("\n".join(f"- {markdown_paragraph(_markdown(text))}" for text in texts), f"<ul>\n{items}</ul>")

    def code(self, text: str) -> None:
        text = visible(text, keep="\n\t")
        self._add(markdown_block(text), f"<pre>{html.escape(text)}</pre>")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Columns of numbers beside a first column of names."""
        cells = [list(map(_markdown, row)) for row in (header, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        rule = "| --- |" + " ---: |" * (len(header) - 1)
        head = "".join(f"<th>{_rich(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{_rich(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        self._add(
            "\n".join([lines[0], rule, *lines[1:]]),
            f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>",
        )

    def image(self, path: pathlib.Path, root: pathlib.Path, text: str) -> None:
        """A PNG file below root: linked from the Markdown, held by the HTML."""
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        self._add(
            markdown_image(text, path.relative_to(root).as_posix()),
            f'<p><img alt="{html.escape(visible(text))}" src="data:image/png;base64,{data}"></p>',
        )

    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"

    def html(self) -> str:
        title = html.escape(visible("".join(said for _, said in _pieces(self._title))))
        return "\n".join(
            [
                '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
                *self._html,
                "</body>\n</html>\n",
            ]
        )

    def _add(self, markdown, as_html):
        self._markdown.append(markdown)
        self._html.append(as_html)


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table with its columns aligned, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


# values in a text of a page


def plain(value: Any) -> str:
    """A value from outside as plain text of a page, whatever it contains."""
    return re.sub(r"([\\`])", r"\\\1", visible(str(value)))


def code(value: Any) -> str:
    """A value from outside as code in a page's text."""
    return f"`{plain(value)}`"


def _pieces(text):
    """The parts of a page's text: (is it code, what it says)."""
    for part in re.findall(r"`(?:[^`\\]|\\.)*`|(?:[^`\\]|\\.)+|.", text, re.DOTALL):
        is_code = len(part) > 1 and part[0] == part[-1] == "`"
        yield is_code, re.sub(r"\\([\\`])", r"\1", part[1:-1] if is_code else part)


def _rich(text):
    return "".join(
        f"<code>{html.escape(visible(said))}</code>" if is_code else html.escape(visible(said))
        for is_code, said in _pieces(text)
    )


def _markdown(text):
    return "".join(markdown_code(said) if is_code else markdown_text(said) for is_code, said in _pieces(text))


# values in Markdown


def markdown_text(value: Any) -> str:
    r"""A value that Markdown, as GitHub reads it, shows as it is; on one line, and fit for a cell of a table.

    Examples:
      >>> print(markdown_text("a_b <b> *c* | [1](2)"))
      a_b \<b> \*c\* \| [1\](2)
    """
    text = re.sub(r"[\\`*<|~$#]|](?=[\[(:])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(str(value)))
    return re.sub(r"&(?=#?\w+;)", r"\&", text)


def markdown_paragraph(text: str) -> str:
    """Markdown of a paragraph that would otherwise begin a list, a quotation or a rule."""
    return re.sub(r"^(\s*\d*)([-+=>.)])", r"\1\\\2", text)


def markdown_code(value: Any) -> str:
    """A value as code in Markdown, on one line, and fit for a cell of a table.

    Examples:
      >>> print(markdown_code("query|key"), markdown_code("a`b"))
      `query\\|key` <code>a&#96;b</code>
    """
    text = visible(str(value))
    if text and text.strip() == text and "`" not in text and "\\|" not in text:
        return "`" + text.replace("|", "\\|") + "`"
    return "<code>" + "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text) + "</code>"


def markdown_block(text: str) -> str:
    """Lines of code in Markdown."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def markdown_image(text: str, path: str) -> str:
    """A picture by its relative path."""
    alternative = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", markdown_text(text))  # else it may end early
    return f"![{alternative}]({urllib.parse.quote(path)})"
