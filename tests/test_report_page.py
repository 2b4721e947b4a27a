"""Reports and cards show every name and value as it is: rendered as Markdown and as HTML, read back as text."""

import html.parser

import huggingface_hub
import markdown_it
import pytest

from pats_jax.reporting.console import visible
from pats_jax.reporting.report_page import Page, code, markdown_block, markdown_code, markdown_text, plain
from pats_jax.run import model_card

AWKWARD = [
    "query|key",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b`c``d",
    r"\.(query|value)$ \| \\",
    "*a* **b** _c_ __d__ ~~e~~ ~f~",
    "[a](http://x) [b][c] ![d](e) <http://x>",
    "&lt;b&gt; &amp; &#35;",
    "# h",
    "1. one",
    "-- +",
    "> q",
    "$x$ 5$",
    "line\nbreak\r\n\ttab\x1b[2J",
    "snake_case_name and _this_",
    "`",
    "``",
    "a`",
    " padded ",
    "é 中 🙂",
    "lone \udcff surrogate",
]


class Reader(html.parser.HTMLParser):
    """The text of a page, and the tags in it."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.texts += [value for name, value in attributes if name == "alt"]

    def handle_data(self, data):
        self.texts.append(data)


def rendered(markdown):
    """What a reader of Markdown sees, by an independent renderer, with GitHub's tables and strikethrough."""
    return Reader(
        markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    )


def seen(reader):
    return " ".join("".join(reader.texts).split())


def as_seen(value):
    return " ".join(visible(value).split())


@pytest.mark.parametrize("value", AWKWARD)
def test_a_value_in_markdown_is_what_it_was(value):
    for written, tags in (
        (markdown_text(value) + " end", ["p"]),
        (f"# {markdown_text(value)} end", ["h1"]),
        (f"start {markdown_code(value)}", ["p", "code"]),
    ):
        if tags == ["p"]:
            written = "start " + written
        reader = rendered(written)
        assert as_seen(value) in seen(reader) and reader.tags == tags, written
    cells = rendered(f"| a | b |\n| --- | --- |\n| {markdown_text(value)} | {markdown_code(value)} |")
    assert cells.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "code"]
    assert seen(cells).count(as_seen(value)) == 2


@pytest.mark.parametrize("value", AWKWARD)
def test_a_page_shows_a_value_as_it_is_in_both_forms(value, tmp_path):
    page = Page(plain(value))
    page.heading(plain(value))
    page.paragraph(plain(value))
    page.paragraph(f"by {code(value)}")
    page.bullets([plain(value), code(value)])
    page.table([plain(value), "n"], [[plain(value), code(value)]])
    page.code(f"```\n{value}")
    (tmp_path / "x.png").write_bytes(b"")
    page.image(tmp_path / "x.png", tmp_path, plain(value))
    in_html, in_markdown = Reader(page.html().partition("<body>")[2]), rendered(page.markdown())
    for reader in (in_html, in_markdown):
        assert seen(reader).count(as_seen(value)) >= 9
        assert not {"script", "a", "em", "strong", "s", "ol", "blockquote", "hr"} & set(reader.tags)
        assert reader.tags.count("img") == 1 and reader.tags.count("code") >= 3 and reader.tags.count("li") == 2
    assert page.html().partition("</title>")[0].count("<script") == 0
    page.markdown().encode(), page.html().encode()


def test_back_quoted_words_are_code_and_nothing_else_has_a_meaning():
    page = Page("Title")
    page.paragraph("A `Gini_x` of 0 *is* even")
    assert page.markdown() == "# Title\n\nA `Gini_x` of 0 \\*is\\* even\n"
    assert "<p>A <code>Gini_x</code> of 0 *is* even</p>" in page.html()


def test_a_block_holds_fences():
    reader = rendered(markdown_block("a\n```\n````\n<b>"))
    assert "".join(reader.texts).rstrip() + "\n" == "a\n```\n````\n<b>\n" and reader.tags == ["pre", "code"]


@pytest.mark.parametrize("value", AWKWARD)
def test_a_card_shows_a_value_as_it_is(value, tmp_path):
    scores = {"metrics": {value: 0.5}}
    results = {
        "model_name_or_path": value,
        "data": value,
        "method": value,
        "peft": value,
        "seed": 3,
        "num_labels": 2,
        "eval_examples": 7,
        "main_metric": value,
        "majority_class": scores,
        "final": scores,
        "best": scores,
        "versions": {"python": value},
    }
    folder = tmp_path / "a run; rm -rf $HOME"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "a b](c.png").write_bytes(b"")
    model_card.write_fine_tuned(folder, {"noise_layers": value}, results)
    written = huggingface_hub.ModelCard.load(folder / "README.md")
    assert written.data.model_name == folder.name and visible(value) in written.data.tags
    (score,) = written.data.eval_results
    assert (score.dataset_name, score.metric_type, score.metric_value) == (visible(value), visible(value), 0.5)
    card = rendered(written.text)
    assert seen(card).count(as_seen(value)) >= 9
    assert not {"script", "a", "em", "strong", "s", "ol", "blockquote"} & set(card.tags)
    assert card.tags.count("img") == 1 and card.tags.count("table") == 2
    assert f"pats-jax predict '{folder}/adapter' --file" in seen(card)
