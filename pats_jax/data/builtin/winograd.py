"""WNLI: a sentence with a pronoun, and the clause about it with the pronoun replaced by the right or the wrong noun.

Every scheme ends in one of two reasons, which point to different nouns; both nouns are offered equally often.
"""

from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import MEN, WOMEN


class Scheme(NamedTuple):
    """A sentence about {a} and {b}, and predicates that fit only the first or only the second of them."""

    sentence: str
    of_first: tuple[str, ...]
    of_second: tuple[str, ...]


def _schemes(*rows: tuple[str, str, str]) -> tuple[Scheme, ...]:
    """Returns schemes from rows of a sentence and the two lists of predicates, separated by bars."""
    return tuple(Scheme(text, tuple(first.split("|")), tuple(second.split("|"))) for text, first, second in rows)


OF_PEOPLE = _schemes(
    (
        "{a} asked {b} for help because {it}",
        "was in trouble|felt lost|was a beginner|needed advice",
        "was an expert|had more experience|knew the way|was very wise",
    ),
    (
        "{a} lent {b} some money because {it}",
        "was rich|was generous|had plenty|liked to give",
        "was poor|was broke|had nothing left|had been robbed",
    ),
    (
        "{a} could not catch {b} because {it}",
        "was too slow|was out of breath|had a sore leg|started too late",
        "was too fast|had a head start|ran like the wind|was a champion runner",
    ),
    (
        "{a} beat {b} at chess because {it}",
        "was the better player|thought faster|had trained hard|was a master",
        "was the weaker player|was distracted|made a blunder|hardly knew the rules",
    ),
    (
        "{a} envied {b} because {it}",
        "was unlucky|had failed again|was lonely|had lost everything",
        "was famous|had succeeded|was popular|had won everything",
    ),
    (
        "{a} carried {b} home because {it}",
        "was very strong|had the strength|wanted to be of help|was able to",
        "was injured|had fainted|could not walk|was too tired",
    ),
)
OF_THINGS = _schemes(
    (
        "{a} did not fit into {b} because {it}",
        "was too big|was too large|was far too wide|was too bulky",
        "was too small|was too narrow|was full already|was far too tiny",
    ),
    (
        "{a} crushed {b} because {it}",
        "was very heavy|was made of lead|weighed a ton|was massive",
        "was fragile|was made of paper|was so delicate|was very thin",
    ),
    (
        "{a} cost more than {b} because {it}",
        "was made of gold|was a rare antique|was brand new|was of better quality",
        "was broken|was a cheap copy|was second-hand|was of poor quality",
    ),
    (
        "we put {a} in front of {b} because {it}",
        "looked pretty|was worth seeing|was the nicer one|was freshly painted",
        "looked ugly|had to be hidden|was the uglier one|was badly scratched",
    ),
)
THINGS = (
    "box lamp vase table basket picture mirror suitcase bottle ladder candle parcel wagon drum cabinet trunk statue "
    "bucket crate chest bowl clock trophy jar piano"
).split()


def draw_nouns(draw: Draw, of_people: bool) -> list[tuple[str, str]]:
    """Returns two nouns, each with its pronoun: a woman and a man, more rarely two of a sex, or two things."""
    if not of_people:
        return [(f"the {thing}", "it") for thing in draw.words(THINGS, 2)]
    if draw.chance(0.85):
        return draw.shuffled([(draw.word(WOMEN), "she"), (draw.word(MEN), "he")])
    names, pronoun = draw.pick(((WOMEN, "she"), (MEN, "he")))
    return [(name, pronoun) for name in draw.words(names, 2)]


def example(draw: Draw, label: str) -> Example:
    """Returns a sentence with a pronoun and a reading of it, with the label "1" (right) or "0"."""
    of_people = draw.chance(0.85)
    scheme = draw.pick(OF_PEOPLE if of_people else OF_THINGS)
    first, second = draw_nouns(draw, of_people)
    about_first = draw.chance(0.5)
    predicate = draw.word(scheme.of_first if about_first else scheme.of_second)
    right, wrong = (first, second) if about_first else (second, first)
    text = f"{scheme.sentence.format(a=first[0], b=second[0], it=right[1])} {predicate}"
    reading = f"{(right if label == '1' else wrong)[0]} {predicate}"
    return Example(sentence(text), sentence(reading), label)
