"""A strict checker of the archive that the GLUE server takes, written from the server's rules, not from the program.

It knows the test sets' sizes and answers by itself and reads each file as one regular expression over its bytes.
"""

import re
import zipfile
from pathlib import Path

BUILTIN_ROWS = 400
ZERO_ONE, TWO_WAY, THREE_WAY = "0|1", "entailment|not_entailment", "entailment|neutral|contradiction"
FILES = {
    "CoLA.tsv": (1063, ZERO_ONE),
    "SST-2.tsv": (1821, ZERO_ONE),
    "MRPC.tsv": (1725, ZERO_ONE),
    "STS-B.tsv": (1379, r"[0-4]\.[0-9]+|5\.0+|[0-5]"),
    "MNLI-m.tsv": (9796, THREE_WAY),
    "MNLI-mm.tsv": (9847, THREE_WAY),
    "QQP.tsv": (390965, ZERO_ONE),
    "QNLI.tsv": (5463, TWO_WAY),
    "RTE.tsv": (3000, TWO_WAY),
    "WNLI.tsv": (146, ZERO_ONE),
    "AX.tsv": (1104, THREE_WAY),
}


class Refused(Exception):
    """The archive is not one that the server takes."""


def check(path: Path, *, builtin: bool = False) -> dict[str, list[str]]:
    """The answers in each file of an archive, by the file's name.

    Args:
      path: the archive.
      builtin: whether its rows are those of the built-in data.

    Raises:
      Refused: if anything in it is not as the server wants it.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(FILES):
            raise Refused(f"the archive holds {names}")
        if archive.testzip() is not None:
            raise Refused("the archive is damaged")
        return {name: _answers(name, archive.read(name), builtin) for name in names}


def _answers(name: str, data: bytes, builtin: bool) -> list[str]:
    rows, answer = FILES[name]
    row = rf"(0|[1-9][0-9]*)\t({answer})\n".encode()
    if not re.fullmatch(b"index\tprediction\n(?:%s)*" % row, data):
        raise Refused(f"{name}: not of the form of a prediction file")
    found = re.findall(row, data.removeprefix(b"index\tprediction\n"))
    if [int(index) for index, _ in found] != list(range(BUILTIN_ROWS if builtin else rows)):
        raise Refused(f"{name}: the indices are not those of the test set")
    return [answer.decode() for _, answer in found]
