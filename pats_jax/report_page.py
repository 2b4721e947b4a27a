"""A page of text, tables and pictures in two forms, Markdown and HTML, and tables as lines of a console."""

import base64
import html
import pathlib
import re

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
    """A text that grows by blocks, in Markdown and in HTML. `Back-quoted` words of a text are code in both."""

    def __init__(self, title: str):
        self._title = title
        self._markdown: list[str] = [f"# {title}"]
        self._html: list[str] = [f"<h1>{_rich(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        self._add(f"{'#' * level} {text}", f"<h{level}>{_rich(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._add(text, f"<p>{_rich(text)}</p>")

    def bullets(self, texts: list[str]) -> None:
        items = "".join(f"<li>{_rich(text)}</li>\n" for text in texts)
        self._add("\n".join(f"- {text}" for text in texts), f"<ul>\n{items}</ul>")

    def code(self, text: str) -> None:
        self._add(f"```\n{text}\n```", f"<pre>{html.escape(text)}</pre>")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Columns of numbers beside a first column of names."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
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
            f"![{text}]({path.relative_to(root).as_posix()})",
            f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>',
        )

    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"

    def html(self) -> str:
        return "\n".join(
            [
                '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{html.escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
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


def _rich(text):
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
