"""Sound but odd texts, numbers and labels, and the ways to write a table of them."""

import json
import random
from collections.abc import Sequence

WORDS = (
    "the a film is good bad Ann said that she goes not never café Straße 映画 фильм ταινία 123 3.5 U.S. don't".split()
)
ODD = [
    *('"', "'", '""', ",", ";", "|", "\\", "\\n", "\\t", "#", "//", "%s", "{}", "{0}", "$x$", "<b>", "&amp;", "=1+1"),
    *("NaN", "null", "None", "-", "--", "[SEP]", "[CLS]", "<s>", "</s>", "##ing", "[", "]", "{", "}", "true"),
    *(
        "\x85",
        "\u2028",
        "\u2029",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1e",
        "\x7f",
        "\xa0",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u202e",
    ),
    *("e\u0301", "\ufb00", "\u0130", "😀", "👨‍👩‍👧", "\U0001d4b3", "\U0010ffff", "\u0663", "\ufffd", "\x00", "\x01"),
]
# Only where quotes or escapes protect them.
BREAKS = ["\n", "\r\n", "\n\n", "\t", "\r"]


def text(rng: random.Random, *, breaks: Sequence[str] = (), odd: float = 0.3) -> str:
    """A text of a few words, or none, or very many."""
    if rng.random() < 0.01:
        return rng.choice(("x" * 132_000, "word " * 30_000, "\u6620" * 50_000))
    words = [
        rng.choice(ODD) if rng.random() < odd else rng.choice(WORDS) for _ in range(rng.choice((0, 1, 2, 3, 5, 9)))
    ]
    if breaks and rng.random() < 0.2:
        words.insert(rng.randint(0, len(words)), rng.choice(breaks))
    return rng.choice((" ", " ", "")).join(words) + rng.choice(("", "", "", " "))


def labels(rng: random.Random, rows: int) -> list[str]:
    """A column of labels: classes by number or name, scores in many spellings, with a wrong or missing one at times."""
    kinds = (
        ("0", "1"),
        ("0", "1", "2"),
        ("1", "2", "3", "4", "5"),
        ("-1", "0", "1"),
        ("10", "9"),
        ("pos", "neg"),
        ("entailment", "neutral", "contradiction"),
        ("Positive", "positive", "-"),
        ("a, b", 'c "d"', "é"),
        ("0.5", "1.25", "3", "-2.5", "1e-3", "2.5E2", "+1.5", ".5", "4."),
        ("0.0", "1.0"),
        ("0.1", "0.2", "0.3"),
        ("00", "1", "01"),
        ("1e39", "0.5", "2"),
        ("1_000", "2.5"),
        ("\u0661", "\u0662"),
        ("1", " 1", "2"),
        ("yes", "no", "none"),
        ("True", "False"),
        ("same",),
        ("",),
    )
    kind = rng.choice(kinds)
    cells = [rng.choice(kind) for _ in range(rows)]
    if rng.random() < 0.12:
        odd = ("", "nan", "NaN", "None", "NULL", "null", "inf", "-inf", "1e999", "9" * 5000, "?", "N/A", " ")
        cells[rng.randrange(rows)] = rng.choice(odd)
    return cells


def header(rng: random.Random, *, label: bool | None = None) -> list[str]:
    """Names of columns as people's own files have them, in any order."""
    texts = rng.choice(
        (
            *(
                ("sentence1", "sentence2"),
                ("premise", "hypothesis"),
                ("question1", "question2"),
                ("question", "sentence"),
            ),
            *(("text1", "text2"), ("sentence",), ("text",), ("sentence1",), ("text", "sentence")),
            *(("sentence",), ("text",), ("sentence1", "sentence2"), ("sentence",), ("Sentence",)),
        )
    )
    names = [*texts, *rng.choice(((), (), ("idx",), ("id",), ("index",), ("idx", "id")))]
    if label or (label is None and rng.random() < 0.85):
        names += rng.choice((("label",), ("label",), ("label",), ("gold_label",), ("score",), ("label", "score")))
    names += rng.choice(((), (), (), ("genre",), ("", "é"), ("a b", "Label"), ("sentence2",), ("label",)))
    rng.shuffle(names)
    return names


def write_csv(rng: random.Random, names: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    """A CSV file; what needs quotes gets them, other cells at times."""
    often, end = rng.choice((0.0, 0.2, 1.0)), rng.choice(("\n", "\r\n"))

    def cell(value: str, alone: bool) -> str:
        needed = any(char in value for char in ',"\r\n') or (alone and not value)
        return '"' + value.replace('"', '""') + '"' if needed or rng.random() < often else value

    lines = []
    for row in (names, *rows):
        lines.append(",".join(cell(value, len(row) == 1) for value in row) + end)
        if lines[1:] and rng.random() < 0.03:
            lines.append(end)  # blank lines do not count
    return finish(rng, "".join(lines), end)


def write_tsv(rng: random.Random, names: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> bytes:
    """A TSV file, without a header line if there are no names."""
    end = rng.choice(("\n", "\n", "\r\n"))
    lines = rows if names is None else [names, *rows]
    return finish(rng, "".join("\t".join(row) + end for row in lines), end)


def write_json_lines(rng: random.Random, names: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """JSON lines, their keys in any order."""
    end = rng.choice(("\n", "\n", "\r\n"))
    lines = [json_object(rng, names, row) + end for row in rows]
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines)) + 1, end)  # blank lines do not count
    return finish(rng, "".join(lines), end)


def write_json_array(rng: random.Random, names: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """One array of objects."""
    between = rng.choice((",", ",\n", ",\n  ", " , "))
    return finish(rng, "[" + between.join(json_object(rng, names, row) for row in rows) + "]", "\n")


def json_object(rng: random.Random, names: Sequence[str], row: Sequence[object]) -> str:
    items = list(zip(names, row, strict=True))
    rng.shuffle(items)
    return json.dumps(dict(items), ensure_ascii=rng.random() < 0.5)


def finish(rng: random.Random, written: str, end: str) -> bytes:
    """As UTF-8, with a byte-order mark at times and without the last line's end at others."""
    if rng.random() < 0.15:
        written = written.removesuffix(end)
    marked = rng.random() < 0.15 or written.startswith("\ufeff")  # that of a text would be taken for the file's
    return (b"\xef\xbb\xbf" if marked else b"") + written.encode()
