"""The built-in few-shot gym: small tasks in English, generated, with nothing to download.

This is not a benchmark. It is for tests, the demo and first experiments; its scores say nothing about a model's scores
on other few-shot tasks.

The tasks come in families that ask the same kind of question about other things, with other wordings and options:
opinions, meanings of two sentences, words, topics, short texts with a question, forms of sentences. So what a model
learns on some tasks of a family helps it with new tasks of that family, of which it sees only a few rows; this is what
priming needs. The partition ``builtin`` divides each family into upstream and target tasks.

Every task has five samples of 16 training and 16 dev rows, and 200 test rows for all of them. All rows differ, with
equally many rows per option or, in multiple choice, with the right option equally often in each position.
"""

from collections.abc import Sequence

from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin_gym import forms, meanings, opinions, reading, topics, vocabulary
from pats_jax.data.builtin_gym.shapes import Classification, Grammar
from pats_jax.data.few_shot import FewShotTask, Row, Sample, build_task, chosen_names

SEEDS = (13, 21, 42, 87, 100)
SHOTS = 16
TEST_ROWS = 200

FAMILIES: dict[str, dict[str, Grammar]] = {
    family.__name__.rsplit(".", 1)[-1]: dict(family.TASKS)
    for family in (opinions, meanings, vocabulary, topics, reading, forms)
}
GRAMMARS: dict[str, Grammar] = {name: grammar for family in FAMILIES.values() for name, grammar in family.items()}


def generate_gym(
    *, seed: int = 0, tasks: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> dict[str, FewShotTask]:
    """Generates the built-in gym.

    Args:
      seed: any whole number; the same seed gives the same rows on every machine.
      tasks: names of tasks; None: all.
      seeds: the seeds of the samples, of ``SEEDS``; None: all.

    Returns:
      Task name -> task, in alphabetical order.

    Raises:
      InputError: if there is no such task or sample.
    """
    names = chosen_names(GRAMMARS, tasks, "builtin")
    return {name: _task(name, GRAMMARS[name], seed).choose(seeds) for name in names}


def _task(name: str, grammar: Grammar, seed: int) -> FewShotTask:
    """Returns a task with all samples; no row of one is a row of another."""
    seen: set[tuple[str, tuple[str, ...]]] = set()

    def rows(number: int, part: str) -> tuple[Row, ...]:
        return tuple(_rows(grammar, Draw(f"{seed} gym {name} {part}", "all"), number, seen))

    test = rows(TEST_ROWS, "test")
    return build_task(
        name, (Sample(own, rows(SHOTS, f"{own} train"), rows(SHOTS, f"{own} dev"), test) for own in SEEDS)
    )


def _rows(grammar: Grammar, draw: Draw, number: int, seen: set[tuple[str, tuple[str, ...]]]) -> list[Row]:
    """Returns rows in random order, none of which is in ``seen``, and adds them to it."""
    rows: list[Row] = []
    while len(rows) < number:
        row = _row(grammar, draw, len(rows))
        key = (row.input, tuple(sorted(row.options)))
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return draw.shuffled(rows)


def _row(grammar: Grammar, draw: Draw, place: int) -> Row:
    """Returns a row; the number of rows before it says which option is right, or where the right one stands."""
    if isinstance(grammar, Classification):
        answer = place % len(grammar.options)
        return Row(grammar.write(draw, grammar.options[answer]), grammar.options, answer)
    given, right, wrong = grammar.ask(draw)
    options = draw.shuffled(wrong)
    answer = place % (len(wrong) + 1)
    options.insert(answer, right)
    return Row(given, tuple(options), answer)
