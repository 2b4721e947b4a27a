"""CoLA: sentences that follow the grammar of English, and near copies of them that break one rule.

Each rule is a function `(draw, good) -> sentence`. Its good and bad sentences hold the same words in the same
proportions; only what belongs together differs, often across a few words in between.
"""

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import ADJECTIVES_OF_PEOPLE, MEN, PEOPLE, PLACES, WOMEN, plural

THINGS = (
    "key box lamp letter chair table bottle basket picture mirror ticket jacket blanket hammer bucket ladder candle "
    "parcel curtain helmet folder carpet wagon drum cabinet"
).split()
BETWEEN = "next to|behind|under|above|near|in front of|on top of|close to|beside|with".split("|")
STATES = "old red heavy broken clean dirty empty new cheap wet dusty famous ugly rusty".split()
GOINGS_ON = "slept laughed waited vanished smiled coughed sneezed arrived fainted yawned".split()
HANDLINGS = "carried repaired painted touched opened found bought borrowed wanted dropped".split()
ADVERBS = "quietly suddenly obviously finally quickly secretly gladly calmly".split()
DEEDS = "blamed praised hurt defended cured taught embarrassed rescued amused trusted".split()
OPENINGS = ("", "", "I think that ", "They said that ", "It seems that ", "Of course ", "Clearly ", "We know that ")


def number(noun: str, many: bool) -> str:
    """Returns the noun in the singular, or in the plural if there are many."""
    return plural(noun) if many else noun


def verb_agreement(draw: Draw, good: bool) -> str:
    """The verb agrees with the head of the subject, not with the nearer noun."""
    head, near = draw.words(THINGS, 2)
    many = draw.chance(0.5)
    one, several = draw.pick((("is", "are"), ("was", "were"), ("has been", "have been")))
    subject = f"the {number(head, many)}"
    if draw.chance(0.6):
        subject += f" {draw.pick(BETWEEN)} the {number(near, draw.chance(0.5))}"
    return f"{subject} {several if many == good else one} {draw.word(STATES)}"


def clause_agreement(draw: Draw, good: bool) -> str:
    """As `verb_agreement`, across a relative clause."""
    head, near = draw.words(PEOPLE, 2)
    many, near_many = draw.chance(0.5), draw.chance(0.5)
    if draw.chance(0.6):
        subject = f"the {number(head, many)} that the {number(near, near_many)} {draw.word(DEEDS)}"
    else:
        subject = f"the {number(head, many)} from {draw.word(PLACES)}"
    return f"{subject} {'were' if many == good else 'was'} {draw.word(ADJECTIVES_OF_PEOPLE)}"


def reflexive(draw: Draw, good: bool) -> str:
    """A reflexive pronoun agrees with the subject of its own clause."""
    woman, man = draw.word(WOMEN), draw.word(MEN)
    her_clause = draw.chance(0.5)
    first, second = (man, woman) if her_clause else (woman, man)
    pronoun = "herself" if her_clause == good else "himself"
    if draw.chance(0.4):
        return f"{second} {draw.pick(('had', 'never', 'often', 'almost'))} {draw.word(DEEDS)} {pronoun}"
    verb = draw.pick(("said", "knew", "heard", "feared", "hoped"))
    return f"{first} {verb} that {second} {draw.pick(('had', 'never', 'often', 'almost'))} {draw.word(DEEDS)} {pronoun}"


def determiner(draw: Draw, good: bool) -> str:
    """A demonstrative agrees with its noun across an adjective."""
    many = draw.chance(0.5)
    pointer = draw.pick(("these", "those") if many == good else ("this", "that"))
    quality = draw.word(STATES) + " " if draw.chance(0.6) else ""
    thing = f"{pointer} {quality}{number(draw.word(THINGS), many)}"
    return f"{draw.word(PEOPLE_THE)} {draw.word(HANDLINGS)} {thing}"


def relative_gap(draw: Draw, good: bool) -> str:
    """Only a transitive verb leaves a gap for the noun that its relative clause describes."""
    over_object = draw.chance(0.5)
    verb = draw.word(HANDLINGS if over_object == good else GOINGS_ON)
    adverb = draw.word(ADVERBS)
    if over_object:
        return f"the {draw.word(THINGS)} that {draw.word(PEOPLE_THE)} {adverb} {verb} was {draw.word(STATES)}"
    return f"{draw.word(PEOPLE_THE)} that {adverb} {verb} was {draw.word(ADJECTIVES_OF_PEOPLE)}"


def question_gap(draw: Draw, good: bool) -> str:
    """A question about a thing leaves the object's place empty; one about a time fills it."""
    about_thing = draw.chance(0.5)
    asked = f"which {draw.word(THINGS)}" if about_thing else draw.pick(("when", "why"))
    has_object = about_thing != good
    rest = f" the {draw.word(THINGS)}" if has_object else ""
    question = f"{asked} had {draw.word(PEOPLE_THE)} {draw.word(HANDLINGS)}"
    return f"{question}{rest} {draw.pick(BETWEEN[:-1])} the {draw.word(THINGS)}"


def correlative(draw: Draw, good: bool) -> str:
    """A pair of conjunctions belongs together: neither and nor, either and or, both and and."""
    partners = {"neither": "nor", "either": "or", "both": "and"}
    first = draw.pick(tuple(partners))
    second = partners[first] if good else draw.pick([word for key, word in partners.items() if key != first])
    one, other = draw.words(PEOPLE, 2)
    return f"{draw.word(PEOPLE_THE)} {draw.word(DEEDS)} {first} the {one} {second} the {other}"


def polarity_item(draw: Draw, good: bool) -> str:
    """The words ever and any need a negation over them, not one inside a relative clause."""
    outer, inner = ("no", "the") if good else ("the", "no")
    head, near = draw.words(PEOPLE, 2)
    subject = f"{outer} {head} that {inner} {near} {draw.word(DEEDS)}"
    if draw.chance(0.5):
        return f"{subject} has ever {draw.word(GOINGS_ON)}"
    return f"{subject} has {draw.word(HANDLINGS)} any {plural(draw.word(THINGS))}"


PEOPLE_THE = tuple(f"the {noun}" for noun in PEOPLE)
RULES = (
    verb_agreement,
    clause_agreement,
    reflexive,
    determiner,
    relative_gap,
    question_gap,
    correlative,
    polarity_item,
)


def example(draw: Draw, label: str) -> Example:
    """Returns one sentence with the label "1" (acceptable) or "0"."""
    rule = draw.pick(RULES)
    if rule is question_gap:
        text = sentence(rule(draw, label == "1"), end="?")
    else:
        text = sentence(draw.pick(OPENINGS) + rule(draw, label == "1"))
    return Example(text, None, label)
