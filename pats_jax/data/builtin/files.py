"""The text of the built-in files: columns and headers as in the GLUE distribution."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pats_jax.data.builtin.draw import Example
from pats_jax.data.tasks import Task


class Layout(NamedTuple):
    """The columns of a task's files, separated by bars; the dev files are like train where nothing else is said."""

    train: str
    test: str
    dev: str = ""


_PAIR_TEST = "index|sentence1|sentence2"
_MNLI_TEST = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse|"
    "sentence1|sentence2"
)
_STSB_TEST = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"

LAYOUTS = {
    "cola": Layout("source|label|author_mark|sentence", "index|sentence"),
    "sst2": Layout("sentence|label", "index|sentence"),
    "mrpc": Layout("Quality|#1 ID|#2 ID|#1 String|#2 String", "index|#1 ID|#2 ID|#1 String|#2 String"),
    "stsb": Layout(f"{_STSB_TEST}|score", _STSB_TEST),
    "qqp": Layout("id|qid1|qid2|question1|question2|is_duplicate", "id|question1|question2"),
    "mnli": Layout(
        f"{_MNLI_TEST}|label1|gold_label", _MNLI_TEST, f"{_MNLI_TEST}|label1|label2|label3|label4|label5|gold_label"
    ),
    "qnli": Layout("index|question|sentence|label", "index|question|sentence"),
    "rte": Layout(f"{_PAIR_TEST}|label", _PAIR_TEST),
    "wnli": Layout(f"{_PAIR_TEST}|label", _PAIR_TEST),
    "ax": Layout("", _PAIR_TEST),
}

# What stands in the columns that are neither text nor label, from the row's number; elsewhere "none".
_FILLINGS: dict[str, Callable[[int], object]] = {
    **dict.fromkeys(("index", "id", "promptID", "pairID", "old_index"), lambda number: number),
    **dict.fromkeys(("#1 ID", "qid1"), lambda number: 2 * number),
    **dict.fromkeys(("#2 ID", "qid2"), lambda number: 2 * number + 1),
    **dict.fromkeys(("source", "genre", "filename"), lambda number: "builtin"),
}


def file_text(task: Task, split: str, examples: Sequence[Example]) -> str:
    """Returns the whole text of one file.

    Args:
      task: a row of the task table.
      split: one of the task's splits; the labels of a test split are left out.
      examples: the rows.
    """
    layout = LAYOUTS[task.name]
    columns = layout.test if split.startswith("test") else layout.train
    if split.startswith("validation"):
        columns = layout.dev or layout.train
    names = columns.split("|")
    lines = [[_cell(task, name, number, example) for name in names] for number, example in enumerate(examples)]
    if task.files[split][0] not in task.headerless:
        lines.insert(0, names)
    # The distribution's MRPC files begin with a byte-order mark where they were cut from the corpus' own.
    mark = "\ufeff" if task.name == "mrpc" and split != "test" else ""
    return mark + "".join("\t".join(line) + "\n" for line in lines)


def _cell(task: Task, column: str, number: int, example: Example) -> str:
    if column in task.tsv_texts:
        return str(example[task.tsv_texts.index(column)])
    if column == task.tsv_label or column.startswith("label"):
        return example.label
    if column == "author_mark":
        return "*" if example.label == "0" else ""
    return str(_FILLINGS[column](number)) if column in _FILLINGS else "none"
