"""The built-in data: the same bytes everywhere, GLUE's layout, labels that are right and that no word count tells."""

import hashlib
import itertools
import pathlib
import re
import runpy

import numpy as np
import pytest

from pats_jax.data.builtin import generate, inference, words, write_builtin
from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.readers import read_glue
from pats_jax.data.tasks import TASKS
from pats_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
NINE = [name for name in TASKS if name != "ax"]

# SHA-256 of every task's files with seed 0. They change only with the grammars: then say so in the release notes, since
# scores before and after are not comparable.
DIGESTS = {
    "cola": "61143fb3838e5ce277df0fd66206845e166af5ddcc26caca82d823a1c8e46de9",
    "sst2": "76fe83e6ff1343c6acb003f53e234fa842c96187ed7c8ef7740128352ff09304",
    "mrpc": "700385f9fc5786db0b412adcb800aa327941309bd5a59abedd688338fb5f0142",
    "stsb": "b74d78f3dcda541afa3e0c98a6b88db8f9e15fa7423a1c21c463a9bf44b2370b",
    "qqp": "d420909220550a9be61d6d0118bd9e136027ee348e3c68537ae24cdbca8f8b12",
    "mnli": "cf99bb15a42e9d906a4582c56fb9d8f888f8ec99b71b17348a5125cc78e18e32",
    "qnli": "5cdc584696e347db229b17a5d1e7d5eb8517ad9fefc05db65a512ed83928df14",
    "rte": "b2177dd1c75d1d2302de1a1b1eba51fca150dbe8a992a21828b9b372666b1c24",
    "wnli": "ecf805863f51a3e7ace2982d92c2b4e5ae72a92b045b6a9a5da1c18e8c5641f9",
    "ax": "10d74b9da6904108f6e72af2b3c62618df325a33955861e217cda9c684468216",
}

PAIR = "index sentence1 sentence2"
MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2"
)
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
# The header of every file of the GLUE distribution (one column name or more a cell; MRPC's names hold spaces).
HEADERS = {
    "CoLA/train.tsv": None,
    "CoLA/dev.tsv": None,
    "CoLA/test.tsv": "index sentence",
    "SST-2/train.tsv": "sentence label",
    "SST-2/dev.tsv": "sentence label",
    "SST-2/test.tsv": "index sentence",
    "MRPC/train.tsv": "\ufeffQuality #1 ID #2 ID #1 String #2 String",
    "MRPC/dev.tsv": "\ufeffQuality #1 ID #2 ID #1 String #2 String",
    "MRPC/test.tsv": "index #1 ID #2 ID #1 String #2 String",
    "STS-B/train.tsv": f"{STSB} score",
    "STS-B/dev.tsv": f"{STSB} score",
    "STS-B/test.tsv": STSB,
    "QQP/train.tsv": "id qid1 qid2 question1 question2 is_duplicate",
    "QQP/dev.tsv": "id qid1 qid2 question1 question2 is_duplicate",
    "QQP/test.tsv": "id question1 question2",
    "MNLI/train.tsv": f"{MNLI} label1 gold_label",
    "MNLI/dev_matched.tsv": f"{MNLI} label1 label2 label3 label4 label5 gold_label",
    "MNLI/dev_mismatched.tsv": f"{MNLI} label1 label2 label3 label4 label5 gold_label",
    "MNLI/test_matched.tsv": MNLI,
    "MNLI/test_mismatched.tsv": MNLI,
    "QNLI/train.tsv": "index question sentence label",
    "QNLI/dev.tsv": "index question sentence label",
    "QNLI/test.tsv": "index question sentence",
    "RTE/train.tsv": f"{PAIR} label",
    "RTE/dev.tsv": f"{PAIR} label",
    "RTE/test.tsv": PAIR,
    "WNLI/train.tsv": f"{PAIR} label",
    "WNLI/dev.tsv": f"{PAIR} label",
    "WNLI/test.tsv": PAIR,
    "diagnostic/diagnostic.tsv": PAIR,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All tasks, written once."""
    folder = tmp_path_factory.mktemp("builtin") / "data"
    write_builtin(folder)
    return folder


@pytest.fixture(scope="module")
def difficulty():
    """The functions of benchmarks/builtin_difficulty.py."""
    return runpy.run_path(str(ROOT / "benchmarks" / "builtin_difficulty.py"))


def digest(folder: pathlib.Path) -> str:
    """SHA-256 over the names and bytes of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", TASKS)
def test_same_bytes_on_every_python_and_platform(folder, name):
    assert digest(folder / TASKS[name].folder) == DIGESTS[name]


def test_seed_and_task_decide_the_bytes(folder, tmp_path):
    write_builtin(tmp_path / "other", seed=1, tasks=["rte", "WNLI"])
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["README.txt", "RTE", "WNLI"]
    assert digest(tmp_path / "other" / "RTE") != digest(folder / "RTE")


def test_files_and_columns_are_those_of_glue(folder):
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.tsv")} == set(HEADERS)
    for name, header in HEADERS.items():
        lines = (folder / name).read_bytes().decode().split("\n")
        assert lines.pop() == ""
        cells = [line.split("\t") for line in lines]
        if header is not None:
            assert " ".join(cells.pop(0)) == header
        assert len(cells) == (2000 if "train" in name else 400)
        assert len({len(row) for row in cells}) == 1
        if header is None:
            assert all(len(row) == 4 and row[1] in "01" and row[2] == ("*" if row[1] == "0" else "") for row in cells)


@pytest.mark.parametrize("name", NINE)
def test_readers_find_balanced_labels(folder, name):
    splits = read_glue(name, folder, splits=["train", "validation", "test"])
    for split, rows in splits.items():
        assert len(rows) == (2000 if split == "train" else 400)
        if split.startswith("test"):
            assert rows.labels is None
        elif TASKS[name].is_regression:
            assert 0 <= rows.labels.min() < 0.5 and 4.5 < rows.labels.max() <= 5
            assert 1.2 < rows.labels.std() < 1.8 and abs(rows.labels.mean() - 2.5) < 0.5
        else:
            assert np.ptp(np.bincount(rows.labels, minlength=TASKS[name].num_labels)) <= 1


@pytest.mark.parametrize("name", TASKS)
def test_no_row_occurs_twice_in_or_across_splits(name):
    texts = [row[:2] for rows in generate(name).values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_every_fifth_word_is_kept_from_training():
    splits = generate("mnli")

    def people(split: str) -> set[str]:
        text = " ".join(f"{row.sentence1} {row.sentence2}".lower() for row in splits[split])
        return set(re.findall(r"\w+", text)) & set(words.PEOPLE)

    unseen = set(words.PEOPLE[4::5])
    assert people("train") == set(words.PEOPLE) - unseen
    assert people("validation_mismatched") == people("test_mismatched") == unseen
    assert people("validation") & unseen and people("validation") - unseen


def word_accuracy(difficulty, folder, name: str, kind: str) -> float:
    """Accuracy on the dev rows of a logistic regression on words and pairs of neighbouring words."""
    from sklearn.linear_model import LogisticRegression

    splits = read_glue(name, folder)
    train, dev = splits["train"], splits["validation"]
    features, dev_features = difficulty["word_features"](train, dev, kind)
    return LogisticRegression(C=0.3, max_iter=500).fit(features, train.labels).score(dev_features, dev.labels)


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "qnli", "wnli"])
def test_counting_words_does_not_solve_a_task(difficulty, folder, name):
    """A bound on word counting only; benchmarks/builtin_difficulty.py sets fine-tuned models beside it."""
    kinds = ["one text"] if len(TASKS[name].tsv_texts) == 1 else ["together", "separately with overlap"]
    assert max(word_accuracy(difficulty, folder, name, kind) for kind in kinds) < 0.7


@pytest.mark.parametrize("name", ["mnli", "rte"])
def test_hypothesis_alone_tells_nothing(difficulty, folder, name):
    assert word_accuracy(difficulty, folder, name, "second only") < 1 / TASKS[name].num_labels + 0.08


def test_runs_enter_the_table_of_difficulty(difficulty, tmp_path):
    for seed, score in enumerate((0.8, 0.9)):
        (tmp_path / str(seed)).mkdir()
        results = f'{{"task_name": "rte", "best": {{"metrics": {{"accuracy": {score}}}}}}}'
        (tmp_path / str(seed) / "results.json").write_text(results)
    assert difficulty["run_scores"]([tmp_path / "0", tmp_path / "1"]) == {"rte": [80.0, 90.0]}


# Worlds against which the tables of inference are checked: the numbers of those of the kind who did it, those of the
# kind who did not, others who did and others who did not, with somebody of the kind and somebody else.
GROUPS = [
    counts
    for counts in itertools.product(range(3), repeat=4)
    if counts[0] + counts[1] > 0 and counts[2] + counts[3] > 0
]
QUANTIFIERS = {
    "all the": lambda did, total: did == total,
    "each and every one of the": lambda did, total: did == total,
    "not all the": lambda did, total: did < total,
    "most of the": lambda did, total: 2 * did > total,
    "some of the": lambda did, total: did > 0,
    "none of the": lambda did, total: did == 0,
    "not a single one of the": lambda did, total: did == 0,
}


def quantified(phrase: str, world: tuple[int, int, int, int]) -> bool:
    """Whether "all the {kind} {who}" and the like did it in a world."""
    only_kind = "{kind}" in phrase
    did, total = (world[0], world[0] + world[1]) if only_kind else (world[0] + world[2], sum(world))
    return QUANTIFIERS[phrase.replace("{kind} ", "").removesuffix(" {who}")](did, total)


def exists(noun: str, world: tuple[bool, bool, bool]) -> bool:
    """Whether there is such a thing: a poodle of the colour, another poodle, another dog."""
    coloured, low, high = world[0], world[0] or world[1], any(world)
    there = coloured if "{colour}" in noun else low if "{low}" in noun else high
    return there != noun.startswith(("no ", "not a single "))


@pytest.mark.parametrize(
    "table, holds, worlds",
    [
        (inference.QUANTITY, quantified, GROUPS),
        (inference.EXISTENCE, exists, list(itertools.product((False, True), repeat=3))),
    ],
    ids=["quantity", "existence"],
)
def test_labels_follow_from_the_meaning(table, holds, worlds):
    """A hypothesis is true in all, in none or in some of the worlds in which its premise is true."""
    for hypothesis, premises in table.items():
        assert tuple(premises) == inference.LABELS
        for label, premise in ((label, premise) for label, group in premises.items() for premise in group):
            truths = {holds(hypothesis, world) for world in worlds if holds(premise, world)}
            expected = {"entailment": {True}, "contradiction": {False}, "neutral": {True, False}}[label]
            assert truths == expected, (premise, hypothesis)


def test_refuses_what_it_cannot_do_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="full: not empty"):
        write_builtin(tmp_path / "full")
    with pytest.raises(InputError, match="squad: no such task"):
        write_builtin(tmp_path / "new", tasks=["rte", "squad"])
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_readme_says_what_it_is(folder):
    text = (folder / "README.txt").read_text()
    assert "NOT the GLUE benchmark" in text and "generated" in text


def test_draw_uses_random_only_and_covers_all_choices():
    draw = Draw("seed", "all")
    assert {draw.below(3) for _ in range(100)} == {0, 1, 2}
    assert sorted(draw.shuffled(range(10))) == list(range(10))
    assert len({tuple(draw.shuffled(range(3))) for _ in range(200)}) == 6
    with pytest.raises(ValueError, match="vocabulary must be one of"):
        Draw("seed", "most")


def test_articles_and_capitals():
    assert sentence("a oak and a used piano and a hour") == "An oak and a used piano and a hour."
    assert sentence("where is a eel", end="?") == "Where is an eel?"
