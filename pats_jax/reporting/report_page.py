"""A page of text, tables and pictures, written in Markdown and rendered as HTML; and tables as console lines."""

import base64
import contextlib
import html
import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import markdown_it
from markdown_it.token import Token

from pats_jax.reporting.console import visible

_STYLE = """
:root { color-scheme: light dark; --text: #222; --ground: #fff; --soft: #f3f4f6; --line: #ccc; --accent: #0b6e99; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --ground: #16181d; --soft: #262a31; --line: #4a505a; --accent: #6cc4e8; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--ground); overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
h1 + p { font-size: 1.15rem; border-left: 4px solid var(--accent); padding-left: .8rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
caption span { display: block; width: max-content; max-width: calc(100vw - 1.6rem); }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
th[scope=row] { font-weight: 400; }
td code { white-space: normal; overflow-wrap: anywhere; }
pre, code { background: var(--soft); border-radius: 3px; }
pre { padding: .7rem; white-space: pre-wrap; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 3px; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 480px) {
  body { font-size: 15px; margin: 1rem auto; padding: 0 .7rem; }
  h1 { font-size: 1.5rem; }
  th, td { font-size: .82rem; padding: .25rem .35rem; }
}
"""


class Page:
    """A text in Markdown that grows by blocks, and its rendering as one HTML file.

    `Back-quoted` words of a text are code, and nothing else has a special meaning: Markdown or HTML syntax is shown as
    it is. Pass values from outside through `plain` or `code`, because they may contain a back quote.
    """

    def __init__(self, title: str):
        self._title = title
        self._blocks: list[str] = [f"# {_markdown(title)}"]
        self._pictures: dict[str, bytes] = {}  # link -> the file

    def heading(self, text: str, level: int = 2) -> None:
        self._blocks.append(f"{'#' * level} {_markdown(text)}")

    def paragraph(self, text: str) -> None:
        self._blocks.append(markdown_paragraph(_markdown(text)))

    def bullets(self, texts: list[str]) -> None:
        self._blocks.append("\n".join(f"- {markdown_paragraph(_markdown(text))}" for text in texts))

    def code(self, text: str) -> None:
        self._blocks.append(markdown_block(visible(text, keep="\n\t")))

    def table(self, header: list[str], rows: list[list[str]], caption: str | None = None) -> None:
        """Adds a table: a first column of names, then columns of numbers."""
        if caption is not None:
            self._blocks.append(f"**{_markdown(caption)}**")
        lines = [f"| {' | '.join(map(_markdown, row))} |" for row in (header, *rows)]
        rule = "| --- |" + " ---: |" * (len(header) - 1)
        self._blocks.append("\n".join([lines[0], rule, *lines[1:]]))

    def image(self, path: pathlib.Path, root: pathlib.Path, text: str) -> None:
        """Adds a PNG file below root, linked in the Markdown and embedded in the HTML; the text says what it shows."""
        block = markdown_image(text, path.relative_to(root).as_posix())
        self._blocks.append(block)
        self._pictures[path.relative_to(root).as_posix()] = path.read_bytes()

    @contextlib.contextmanager
    def folded(self, title: str) -> Iterator[None]:
        """Makes the blocks added meanwhile a section that the reader opens by its title."""
        self._blocks.append(f"<details>\n<summary>{html.escape(visible(title))}</summary>")
        yield
        self._blocks.append("</details>")

    def markdown(self) -> str:
        return "\n\n".join(self._blocks) + "\n"

    def html(self) -> str:
        title = html.escape(visible("".join(said for _, said in _pieces(self._title))))
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"{_render(self.markdown(), self._pictures)}</body>\n</html>\n"
        )


def _render(markdown: str, pictures: dict[str, bytes]) -> str:
    """The HTML of a page's Markdown: tables have captions and scopes, pictures are embedded."""
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = _with_captions(parser.parse(markdown))
    _set_scopes(tokens)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                picture = pictures[urllib.parse.unquote(str(child.attrs["src"]))]
                child.attrs["src"] = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
    return parser.renderer.render(tokens, parser.options, {})


def _with_captions(tokens: list[Token]) -> list[Token]:
    """Moves an entirely bold paragraph into the table that follows it, as its caption, and lets wide tables scroll."""
    found: list[Token] = []
    for token in tokens:
        if token.type == "table_open":
            found.append(_html('<div class="table" tabindex="0">\n'))
            caption = _caption(found[-4:-1])
            if caption is not None:
                del found[-4:-1]
                caption.children = (caption.children or [])[1:-1]
                found += [token, _html("<caption><span>"), caption, _html("</span></caption>\n")]
                continue
        found.append(token)
        if token.type == "table_close":
            found.append(_html("</div>\n"))
    return found


def _caption(tokens: list[Token]) -> Token | None:
    """The text of an entirely bold paragraph, given by its tokens; else None."""
    if [token.type for token in tokens] != ["paragraph_open", "inline", "paragraph_close"]:
        return None
    kinds = [child.type for child in tokens[1].children or () if child.type != "text" or child.content]
    tokens[1].children = [child for child in tokens[1].children or () if child.type != "text" or child.content]
    whole = kinds[:1] == ["strong_open"] and kinds.index("strong_close") == len(kinds) - 1
    return tokens[1] if whole else None


def _html(text: str) -> Token:
    return Token("html_block", "", 0, content=text)


def _set_scopes(tokens: list[Token]) -> None:
    """Sets the scope of each header cell; the first cell of a row is its header."""
    in_body = first = False
    for token in tokens:
        if token.type in ("tbody_open", "thead_open"):
            in_body = token.type == "tbody_open"
        elif token.type == "tr_open":
            first = in_body
        elif token.type == "th_open":
            token.attrs["scope"] = "col"
        elif token.type == "td_open" and first:
            token.tag, token.attrs["scope"] = "th", "row"
        elif token.type == "td_close" and first:
            token.tag, first = "th", False


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
    """The parts of a page's text: (whether it is code, its text)."""
    for part in re.findall(r"`(?:[^`\\]|\\.)*`|(?:[^`\\]|\\.)+|.", text, re.DOTALL):
        is_code = len(part) > 1 and part[0] == part[-1] == "`"
        yield is_code, re.sub(r"\\([\\`])", r"\1", part[1:-1] if is_code else part)


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
      <code>query&#124;key</code> <code>a&#96;b</code>
    """
    text = visible(str(value))
    if text and text.strip() == text and not {"`", "|"} & set(text):  # | has an escape in tables only
        return f"`{text}`"
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
