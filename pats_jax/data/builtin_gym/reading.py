"""Short texts with a question about them: who, where, when, how many. The options stand in the text, all of them."""

from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import DAYS, MEN, PEOPLE, PLACES, WOMEN
from pats_jax.data.builtin_gym.shapes import MultipleChoice, Question, parts

THINGS = "letter watch lamp coin camera guitar ring map mirror bottle basket ticket helmet bag".split()
FINDINGS = "found lost bought sold hid stole painted repaired dropped borrowed".split()


def text_and_question(text: str, question: str) -> str:
    """Returns the input."""
    return parts(text=sentence(text), question=sentence(question, end="?"))


def draw_names(draw: Draw, count: int) -> list[str]:
    """Returns names of different people."""
    return draw.words(WOMEN + MEN, count)


class Measure(NamedTuple):
    """Something to compare by numbers: a frame of {name} and {number}, and questions for the higher and the lower."""

    told: str
    more: str
    less: str
    lowest: int
    highest: int


def comparison(*measures: Measure) -> MultipleChoice:
    """Asks who of two has more or less of something."""

    def ask(draw: Draw) -> Question:
        measure = draw.pick(measures)
        names = draw_names(draw, 2)
        span = measure.highest - measure.lowest + 1
        low, high = sorted(measure.lowest + draw.below(span) for _ in range(2))
        if low == high:
            return ask(draw)
        numbers = draw.shuffled((low, high))
        told = " and ".join(measure.told.format(name=n, number=m) for n, m in zip(names, numbers, strict=True))
        wants_more = draw.chance(0.5)
        right = names[numbers.index(high if wants_more else low)]
        wrong = names[1 - names.index(right)]
        return Question(text_and_question(told, measure.more if wants_more else measure.less), right, (wrong,))

    return MultipleChoice(ask)


def detail(values: tuple[str, ...], told: str, question: str) -> MultipleChoice:
    """Asks for the place or time of one of two deeds.

    Args:
      values: places or times.
      told: frame of {who}, {did} and {value}.
      question: frame of {who}.
    """

    def ask(draw: Draw) -> Question:
        people = draw.words(PEOPLE, 2)
        answers, deeds = draw.words(values, 2), draw.words(FINDINGS, 2)
        things = draw.words(THINGS, 2)
        clauses = [
            told.format(who=f"the {who}", did=f"{deed} a {thing}", value=value)
            for who, deed, thing, value in zip(people, deeds, things, answers, strict=True)
        ]
        chosen = draw.below(2)
        text = draw.pick((" and ", ", but ", ", while ")).join(clauses)
        asked = question.format(who=f"the {people[chosen]}")
        return Question(text_and_question(text, asked), answers[chosen], (answers[1 - chosen],))

    return MultipleChoice(ask)


def role(forms: tuple[tuple[str, str, str], ...]) -> MultipleChoice:
    """Asks who did something to whom.

    Args:
      forms: a clause in which {a} acts on {b}, a question for {a} and one for {b}.
    """

    def ask(draw: Draw) -> Question:
        clause, for_agent, for_patient = draw.pick(forms)
        agent, patient = draw_names(draw, 2)
        about_agent = draw.chance(0.5)
        names = (agent, patient) if about_agent else (patient, agent)
        question = for_agent if about_agent else for_patient
        return Question(text_and_question(clause.format(a=agent, b=patient), question), names[0], names[1:])

    return MultipleChoice(ask)


def _deeds(verbs: str) -> tuple[tuple[str, str, str], ...]:
    """Active and passive clauses of verbs whose past is their participle."""
    forms = []
    for verb in verbs.split():
        questions = (f"who {verb} somebody", f"who was {verb} by somebody")
        forms += [(f"{{a}} {verb} {{b}}", *questions), (f"{{b}} was {verb} by {{a}}", *questions)]
    return tuple(forms)


# Who has the thing in the end.
_HANDOVERS = (
    ("{a} gave the {thing} to {b}", "b"),
    ("{a} did not give the {thing} to {b}", "a"),
    ("{a} was given the {thing} by {b}", "a"),
    ("{a} was not given the {thing} by {b}", "b"),
    ("{a} got the {thing} from {b}", "a"),
    ("{a} never got the {thing} from {b}", "b"),
    ("{a} sold {b} the {thing}", "b"),
    ("{a} refused to sell {b} the {thing}", "a"),
    ("{a} bought the {thing} from {b}", "a"),
    ("{a} could not buy the {thing} from {b}", "b"),
    ("{a} offered {b} the {thing} but kept it", "a"),
    ("{a} had the {thing} stolen by {b}", "b"),
)


def owner(draw: Draw) -> Question:
    """Who has the thing in the end, or who has it not."""
    clause, has = draw.pick(_HANDOVERS)
    thing, (a, b) = draw.word(THINGS), draw_names(draw, 2)
    wants_owner = draw.chance(0.5)
    question = f"who has the {thing} now" if wants_owner else f"who is without the {thing} now"
    right, wrong = (a, b) if (has == "a") == wants_owner else (b, a)
    return Question(text_and_question(clause.format(a=a, b=b, thing=thing), question), right, (wrong,))


TASKS = {
    "more_coins": comparison(
        Measure("{name} has {number} coins", "who has more coins", "who has fewer coins", 2, 60),
        Measure("{name} sold {number} tickets", "who sold more tickets", "who sold fewer tickets", 2, 60),
    ),
    "older_person": comparison(Measure("{name} is {number} years old", "who is older", "who is younger", 4, 90)),
    "longer_walk": comparison(
        Measure("{name} walked {number} miles", "who walked farther", "who walked less", 2, 50),
        Measure("{name} waited {number} minutes", "who waited longer", "who was faster", 2, 50),
    ),
    "where_was_it": detail(
        (*PLACES, "the kitchen", "the garden", "the cellar", "the station"), "{who} {did} in {value}", "where was {who}"
    ),
    "when_was_it": detail(tuple(DAYS), "on {value} {who} {did}", "on which day did {who} act"),
    "who_did_it": role(_deeds("warned phoned followed praised hired helped rescued greeted trusted hurt")),
    "who_came_first": role(
        (
            ("{a} arrived before {b}", "who came first", "who came last"),
            ("{b} arrived after {a}", "who came first", "who came last"),
            ("{a} beat {b} in the race", "who won", "who lost"),
            ("{b} was beaten by {a} in the race", "who won", "who lost"),
            ("{b} could not keep up with {a}", "who was faster", "who was slower"),
        )
    ),
    "who_has_it": MultipleChoice(owner),
}
