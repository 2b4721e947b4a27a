"""The report on priming: its files, its tables against the summary's numbers, its pictures."""

import base64
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from pats_jax.priming import gym_report
from pats_jax.priming.relative_gain import summarise
from pats_jax.reporting import plots, report_page

TASKS = ("alpha", "beta", "cola", "delta")
SCORES = {  # arm -> mean test scores of TASKS; samples lie 0.1 below and above
    "direct/full": (0.50, 0.40, 0.00, 0.80),
    "direct/lora": (0.40, 0.50, 0.00, 0.80),
    "mtl/plm/lora": (0.50, 0.60, 0.10, 0.80),  # +25, +20, -, 0: ARG 15 against direct, 0, +50, -, 0 against full
    "maml/plm/lora": (0.30, 0.50, 0.00, 0.80),  # -25, 0, -, 0
    "direct/odd|kind": (0.50, 0.50, 0.00, 0.50),
    "maml/plm+pe/odd|kind": (0.60, 0.60, 0.00, 0.60),  # +20, +20, -, +20
}


def records():
    made = []
    for number, (arm, scores) in enumerate(SCORES.items()):
        algorithm, *trained, peft = arm.split("/")
        for task, score in zip(TASKS, scores, strict=True):
            for sample in (13, 21):
                dev = [0.2, 0.6, 0.5] if algorithm == "direct" else [0.3, 0.4 + 0.3 * (sample == 13), 0.5]
                made.append(
                    {
                        "algorithm": algorithm,
                        "trained": trained[0] if trained else None,
                        "peft": peft,
                        "upstream_seed": None if algorithm == "direct" else 1,
                        "task": task,
                        "sample": sample,
                        "metric": "matthews_correlation" if task == "cola" else "accuracy",
                        "chance": 0.0 if task == "cola" else 0.5,
                        "learning_rate": 1e-3,
                        "curve": {"step": [0, 25, 50], "dev": dev},
                        "step": 25,
                        "dev": max(dev),
                        "test": score + (0.1 if sample == 13 else -0.1),
                        "seconds": 1.5 + number,
                    }
                )
    return made


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported") / "new" / "folder"
    about = ["pats-jax prime --x 'a <b>'", "2 cores"]
    gym_report.write_report(folder, summarise(records()), title="Priming <a> model", about=about)
    return folder


class Page(html.parser.HTMLParser):
    """Tables, as lists of rows, and images of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.images, self.tags, self.in_cell = [], [], set(), False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.images += [value for name, value in attrs if name == "src"]
        assert not any(name == "href" for name, _ in attrs)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        self.in_cell = tag in ("th", "td") or (tag == "code" and self.in_cell)

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag == "code"

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def markdown_tables(text):
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    split = re.compile(r"(?<!\\)\|")
    return [
        [
            [cell.strip().replace("\\|", "|") for cell in split.split(line)[1:-1]]
            for line in block
            if "| ---" not in line
        ]
        for block in blocks
    ]


def test_the_page_is_one_file_that_loads_nothing(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and not page.tags & {"script", "link", "iframe", "object"}
    assert len(page.images) == 5
    for image in page.images:
        head, _, data = image.partition("base64,")
        assert head == "data:image/png;" and base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")
    assert "Priming &lt;a&gt; model" in text and "pats-jax prime --x 'a &lt;b&gt;'\n2 cores" in text


def test_both_forms_have_the_same_tables(reported):
    of_html = Page((reported / "report.html").read_text(encoding="utf-8")).tables
    of_markdown = markdown_tables((reported / "report.md").read_text(encoding="utf-8"))
    assert of_html == of_markdown and len(of_html) == 7


def tables(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8")).tables


def starts(cell, text):
    found = re.fullmatch(re.escape(text) + r" \[([+-]\d+\.\d), ([+-]\d+\.\d)\]", cell)
    return found is not None and float(found[1]) < float(text) < float(found[2])


def test_the_main_tables(reported):
    against_direct, against_full = tables(reported)[:2]
    assert against_direct[0] == against_full[0] == ["upstream", "lora", "odd|kind"]
    assert [row[0] for row in against_direct[1:]] == ["mtl, plm", "maml, plm", "maml, plm+pe"]
    (mtl, none), (maml, other), (both, odd) = (row[1:] for row in against_direct[1:])
    assert starts(mtl, "+15.0") and starts(maml, "-8.3") and none == other == both == "–"
    assert odd == "+20.0", "equal gains have no interval"
    assert [row[0] for row in against_full[1:]] == ["direct", "mtl, plm", "maml, plm", "maml, plm+pe"]
    assert starts(against_full[2][1], f"+{50 / 3:.1f}") and starts(against_full[1][1], f"+{(-20 + 25 + 0) / 3:.1f}")


def test_the_details_of_the_gains(reported):
    header, *rows = tables(reported)[2]
    assert header[-3:] == ["left out", "tunings", "wins, ties, losses"]
    mtl, maml = rows[0], rows[1]
    assert (
        [mtl[0], mtl[2]] == ["mtl/plm/lora", "direct/lora"]
        and starts(mtl[1], "+15.0")
        and mtl[3:] == ["–", "1", "3", "1", "8", "3/1/0"]
    )
    assert maml[0] == "maml/plm/lora" and maml[3:] == ["–", "1", "3", "1", "8", "0/3/1"]
    assert [row[2] for row in rows] == ["direct/lora"] * 2 + ["direct/odd|kind"] + ["direct/full"] * 5
    text = (reported / "report.md").read_text(encoding="utf-8")
    assert "- `mtl/plm/lora` against direct tuning with the same PEFT method: `cola`" in text


def test_steps_scores_and_time(reported):
    _, _, _, steps, lora, odd, time = tables(reported)
    assert steps[1] == ["mtl/plm/lora", "8", "50 %", "25", "25"]
    columns = ["task", "metric", "chance", "direct/full", "direct", "mtl, plm", "maml, plm"]
    assert lora[0] == columns and odd[0] == [*columns[:5], "maml, plm+pe"]
    spread = f"± {100 * np.std([0.1, -0.1], ddof=1):.1f}"
    assert lora[2] == ["beta", "accuracy", "50.0", *(f"{score} {spread}" for score in ("40.0", "50.0", "60.0", "50.0"))]
    assert lora[3][:3] == ["cola", "matthews_correlation", "0.0"]
    assert lora[-1] == ["column mean", "", "37.5", "42.5", "42.5", "50.0", "40.0"]
    assert time[1] == ["direct/full", "8", "1.5", "12"] and time[3] == ["mtl/plm/lora", "8", "3.5", "28"]


def test_the_numbers_are_there_for_programs(reported):
    found = json.loads((reported / "report.json").read_text(encoding="utf-8"))
    assert found.pop("title") == "Priming <a> model" and found.pop("about") == ["pats-jax prime --x 'a <b>'", "2 cores"]
    assert found == dataclasses.asdict(summarise(records()))
    assert not list(reported.glob("*.new"))


def assert_drawn(path):
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 100 and 0.001 < np.mean(pixels.min(-1) < 0.9) < 0.6
    return pixels


def test_the_pictures_are_linked_and_not_blank(reported):
    linked = re.findall(r"!\[.*\]\((.*)\)", (reported / "report.md").read_text(encoding="utf-8"))
    kinds = ("lora", "odd_kind")
    expected = [
        "plots/average-gains.png",
        *(f"plots/{what}-{kind}.png" for what in ("steps", "gains") for kind in kinds),
    ]
    assert linked == expected and {f"plots/{path.name}" for path in (reported / "plots").iterdir()} == set(linked)
    for name in linked:
        assert_drawn(reported / name)


def test_the_console_has_the_main_tables():
    lines = gym_report.table_lines(summarise(records()))
    assert lines[0] == "ARG in percent against direct tuning with the same PEFT method [95 % interval over tasks]"
    assert lines[1].split() == ["upstream", "lora", "odd|kind"] and lines[2].startswith("  mtl, plm ")
    assert "+15.0 [" in lines[2] and len({len(line) for line in lines[1:5]}) == 1
    assert lines[5].endswith("direct tuning of the whole model [95 % interval over tasks]") and len(lines) == 11


@pytest.mark.parametrize("arms", [["direct/full"], ["direct/lora"], ["mtl/plm/lora"]], ids=lambda arms: arms[0])
def test_a_report_with_nothing_to_compare(tmp_path, arms):
    summary = summarise(
        [r for r in records() if "/".join(filter(None, (r["algorithm"], r["trained"], r["peft"]))) in arms]
    )
    gym_report.write_report(tmp_path, summary, title="Tunings", about=[])
    scores, time = tables(tmp_path)
    assert scores[0][-1] in (*arms, "direct", "mtl, plm") and [row[0] for row in scores[1:-1]] == list(TASKS)
    assert time[1][:2] == [arms[0], "8"] and not (tmp_path / "plots").exists()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("Nothing to compare") == 2
    assert gym_report.table_lines(summary) == ["nothing to compare: no arm shares a task and sample with direct tuning"]


def test_an_unfinished_run_is_told_as_such(tmp_path):
    def is_there(record):
        return (record["algorithm"], record["task"]) != ("mtl", "delta")

    whole, part = summarise(records()), summarise(list(filter(is_there, records())))
    for summary in (whole, part):
        gym_report.write_report(tmp_path, summary, title="Tunings", about=[])
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert ("lack tasks or samples that others have: `mtl/plm/lora`." in text) == (summary is part)
    header, *rows = gym_report.task_table(part, "lora")
    column = header.index("mtl, plm")
    assert [row[column] for row in rows[0]][3] == "–" and rows[0][-1][column] == "40.0"


def test_an_arm_with_every_task_left_out(tmp_path):
    only = [record for record in records() if record["task"] == "cola"]
    summary = summarise(only)
    assert gym_report.gain_table(summary, "against_direct")[1][0] == ["mtl, plm", "–", "–"]
    gym_report.write_report(tmp_path, summary, title="Tunings", about=[])
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"steps-lora.png", "steps-odd_kind.png"}
    page = (tmp_path / "report.md").read_text()
    assert gym_report.answer(summary).startswith("There is no relative gain: the baseline scores at most 0") and (
        "`mtl/plm/lora` against direct tuning with the same PEFT method: `cola` (0.0, 10.0)" in page
    )


def test_odd_samples_and_answers_are_named():
    """Samples that CrossFit does not draw so, and answers that were no numbers."""
    odd = [
        {**one, "crossfits_sampling": one["task"] != "beta", "unparsable": int(one["task"] == "delta")}
        for one in records()
    ]
    facts = summarise(odd).tasks
    assert {name: (one.crossfits_sampling, one.unparsable) for name, one in facts.items()} == {
        "alpha": (True, 0),
        "beta": (False, 0),
        "cola": (True, 0),
        "delta": (True, 2 * len(SCORES)),
    }
    page = report_page.Page("title")
    gym_report._write_limits(page, summarise(odd))
    assert "The samples of 1 of 4 tasks are not drawn as CrossFit draws them" in page.markdown()
    assert f"{2 * len(SCORES)} answers to `delta` were no numbers" in page.markdown()


# what is drawn


def drawn(monkeypatch, plot, *args):
    """The figure that a plot saves."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    plot(None, *args)
    return kept[0]


def test_the_steps_are_an_empirical_distribution(monkeypatch):
    first = {"direct": [50, 25, 25, 50], "mtl": [None, 0, 25, None]}
    (axes,) = drawn(monkeypatch, plots.plot_steps_to_score, first, 100, "title").axes
    for line, steps in zip(axes.lines, first.values(), strict=True):
        x, y = line.get_data()
        for step in (0, 10, 25, 49, 50, 100):
            expected = np.mean([one is not None and one <= step for one in steps])
            assert y[np.searchsorted(x, step, side="right") - 1] == expected
        assert line.get_drawstyle() == "steps-post" and x[-1] == 100


def test_effects_and_intervals_stand_at_their_names(monkeypatch):
    panels = {"two": {"b": (1.0, None)}, "one": {"a": (10.0, [5.0, 20.0]), "c": (-4.0, None)}}
    first, second = drawn(monkeypatch, plots.plot_effects, panels, "percent").axes
    assert second.get_xlim() == first.get_xlim()
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["a", "c", "b"] and second.get_ylim() == first.get_ylim()
    for axes, dots in ((first, [(1, 2)]), (second, [(10, 0), (-4, 1)])):
        zero, *points = axes.lines
        assert list(zero.get_xdata()) == [0, 0]
        assert [(*one.get_xdata(), *one.get_ydata()) for one in points] == dots
    (segment,) = second.collections[0].get_segments()
    assert segment.tolist() == [[5, 0], [20, 0]] and not first.collections


@pytest.mark.parametrize(
    "arms, said",
    [
        (list(SCORES), "The best of 3 arms, `maml/plm+pe/odd|kind`, scores 20.0 % above direct tuning with the same"),
        (
            ["direct/lora", "maml/plm/lora"],
            "`maml/plm/lora` scores 8.3 % below direct tuning with the same PEFT method",
        ),
        (["direct/lora"], "Nothing is compared yet"),
    ],
)
def test_the_page_begins_with_its_answer(tmp_path, arms, said):
    """Against gains worked out by hand: +20 on three tasks, which show no spread; -25, 0 and 0."""
    kept = [r for r in records() if "/".join(filter(None, (r["algorithm"], r["trained"], r["peft"]))) in arms]
    summary = summarise(kept)
    text = gym_report.answer(summary)
    assert text.startswith(said)
    assert ("interval" in text) == ("below" in text) and ": shown to differ" not in text
    gym_report.write_report(tmp_path, summary, title="Tunings", about=[])
    title, first, *_ = (tmp_path / "report.md").read_text(encoding="utf-8").split("\n\n")
    assert title == "# Tunings" and first.startswith(said.partition("`maml/plm+pe")[0])


@pytest.mark.parametrize("factors, ending", [((1.1, 1.2, 1.3), "shown"), ((0.9, 1.2, 1.3), "not shown")])
def test_gains_with_spread_on_one_side_are_shown(factors, ending):
    of_lora = [r for r in records() if r["peft"] == "lora" and r["task"] != "cola" and r["algorithm"] != "mtl"]
    direct = {(r["task"], r["sample"]): r["test"] for r in of_lora if r["algorithm"] == "direct"}
    factor = dict(zip(("alpha", "beta", "delta"), factors, strict=True))
    kept = [
        r if r["algorithm"] == "direct" else r | {"test": direct[r["task"], r["sample"]] * factor[r["task"]]}
        for r in of_lora
    ]
    assert gym_report.answer(summarise(kept)).endswith(f": {ending} to differ.")


def test_gains_are_sorted_by_task(monkeypatch):
    gains = {"mtl": {"a": 10.0, "b": -5.0, "c": 0.0}, "maml": {"a": 0.0, "c": 20.0}}  # means 5, -5, 10
    (axes,) = drawn(monkeypatch, plots.plot_task_gains, gains, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "c"]
    zero, mtl, maml = axes.lines
    assert sorted(zip(mtl.get_ydata(), mtl.get_xdata(), strict=True)) == [(0, -5), (1, 10), (2, 0)]
    assert sorted(zip(maml.get_ydata(), maml.get_xdata(), strict=True)) == [(1, 0), (2, 20)]
    assert mtl.get_label() == "mtl" and mtl.get_color() != maml.get_color()
