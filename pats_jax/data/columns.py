"""The columns of your own data: those that you name, and those that are looked for."""

import dataclasses

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
    ("sentence1",),
)
LABEL_COLUMNS = ("label", "gold_label", "score")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of your own data, and how its files separate them.

    Attributes:
      texts: the one or two columns of the texts; if empty, found by name.
      labels: the column of the labels; if empty, found by name. Several: a column of 0 and 1 for each label, of which
        a text may have several.
      delimiter: the character between the cells of CSV and TSV files, which are then both read as CSV; None: commas in
        CSV, tabs in TSV.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    delimiter: str | None = None


BY_NAME = Columns()


PAIR_COLUMNS = (
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("input", "output"),
    ("question", "answer"),
)


@dataclasses.dataclass(frozen=True)
class PairColumns:
    """The columns of texts to read and of texts to write.

    Attributes:
      source: the column of the sources; None: both are found by name, the first pair of PAIR_COLUMNS that is there.
      target: the column of the targets.
      delimiter: as in `Columns`.
    """

    source: str | None = None
    target: str | None = None
    delimiter: str | None = None
