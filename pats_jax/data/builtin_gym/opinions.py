"""Opinions: remarks that praise or blame, in which negation and contrast decide, as in the built-in SST-2.

Each task has its own matter, words and wordings. Words of praise and of blame stand equally often in both classes.
"""

from typing import NamedTuple

from pats_jax.data.builtin import sentiment
from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin_gym.shapes import Classification


class Matter(NamedTuple):
    """What is spoken of and how.

    Attributes:
      subjects: things that have the qualities.
      praise: qualities that are liked.
      blame: qualities that are not.
      plain: frames of {it} and {word} that mean what the word says.
      turning: frames that mean the opposite.
    """

    subjects: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]
    plain: tuple[str, ...]
    turning: tuple[str, ...]


HOTEL = Matter(
    subjects=tuple("room bed bath pool lobby garden breakfast staff view balcony kitchen service lift bar".split()),
    praise=tuple(
        "clean quiet bright comfortable spacious warm friendly modern lovely helpful fresh polite cosy tidy".split()
    ),
    blame=tuple("dirty noisy dark cramped cold rude damp shabby grim unfriendly broken filthy smelly tiny".split()),
    plain=(
        "we found the {it} {word}",
        "the {it} was {word} all week",
        "everybody said that the {it} was {word}",
        "as we had hoped or feared , the {it} was really {word}",
    ),
    turning=(
        "we did not find the {it} {word}",
        "the {it} was never {word}",
        "nobody could call the {it} {word}",
        "they had promised us a {word} {it} , but that was not true",
    ),
)
MEAL = Matter(
    subjects=tuple("soup steak salad fish dessert bread coffee pasta sauce cake wine rice chicken pie".split()),
    praise=tuple("delicious tasty tender sweet rich juicy perfect crisp excellent hot great creamy".split()),
    blame=tuple("bland burnt raw salty sour tasteless stale greasy bitter awful dry terrible".split()),
    plain=(
        "my {it} came out {word}",
        "the {it} they serve is {word}",
        "i must say that the {it} tasted {word}",
        "without doubt , their {it} is {word}",
    ),
    turning=(
        "my {it} was not {word} at all",
        "the {it} they serve could not be called {word}",
        "i cannot say that the {it} tasted {word}",
        "the menu lied when it called the {it} {word}",
    ),
)
PHONE = Matter(
    subjects=tuple("screen battery camera keyboard speaker case software charger button design signal memory".split()),
    praise=tuple("sharp fast reliable strong smooth sturdy clever solid bright useful simple brilliant".split()),
    blame=tuple("slow weak faulty fragile useless cheap ugly clumsy dim poor unreliable annoying".split()),
    plain=(
        "the {it} is {word}",
        "its {it} looks {word} to me",
        "after a month i still think the {it} is {word}",
        "my friends agree that the {it} is {word}",
    ),
    turning=(
        "the {it} is anything but {word}",
        "its {it} does not look {word} to me",
        "after a month i no longer think the {it} is {word}",
        "my friends doubt that the {it} is {word}",
    ),
)
TEACHER = Matter(
    subjects=tuple("lesson lecture course book test task talk class exam project speech answer".split()),
    praise=tuple("clear exciting helpful inspiring interesting fair brilliant lively wise useful".split()),
    blame=tuple("boring confusing unfair pointless dull vague useless silly chaotic tedious".split()),
    plain=(
        "the {it} was {word} from start to finish",
        "most students thought the {it} was {word}",
        "it was a {word} {it}",
        "the {it} turned out to be {word}",
    ),
    turning=(
        "the {it} was far from {word}",
        "few students thought the {it} was {word}",
        "it was not a {word} {it}",
        "the {it} failed to be {word}",
    ),
)
# {main} carries the verdict, {side} leans the other way.
CONTRASTS = (
    "although {side} , {main}",
    "{side} , but {main} and that matters more",
    "{main} , even if {side}",
    "{side} at first , yet in the end {main}",
)


def clause(draw: Draw, matter: Matter, subject: str, good: bool) -> str:
    """Returns a clause that speaks well or badly of the subject."""
    turning = draw.chance(0.5)
    word = draw.pick(matter.praise if good != turning else matter.blame)
    return draw.pick(matter.turning if turning else matter.plain).format(it=subject, word=word)


def remark(draw: Draw, matter: Matter, good: bool) -> str:
    """Returns a clause, or two that lean opposite ways."""
    first, second = draw.words(matter.subjects, 2)
    main = clause(draw, matter, first, good)
    if draw.chance(0.6):
        return sentence(main)
    return sentence(draw.pick(CONTRASTS).format(main=main, side=clause(draw, matter, second, not good)))


def opinion(matter: Matter, bad: str, good: str) -> Classification:
    """A task that tells praise from blame."""
    return Classification((bad, good), lambda draw, option: remark(draw, matter, option == good))


def film(draw: Draw, option: str) -> str:
    """Returns a remark of the built-in SST-2."""
    return sentiment.example(draw, "1" if option == "positive" else "0").sentence1


TASKS = {
    "film_opinion": Classification(("negative", "positive"), film),
    "hotel_opinion": opinion(HOTEL, "bad", "good"),
    "lesson_opinion": opinion(TEACHER, "blame", "praise"),
    "meal_opinion": opinion(MEAL, "disappointed", "satisfied"),
    "phone_opinion": opinion(PHONE, "unhappy", "happy"),
}
