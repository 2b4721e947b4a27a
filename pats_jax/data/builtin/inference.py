"""MNLI and AX: a premise, and a hypothesis that follows from it, contradicts it or does neither.

Every rule reaches all three labels with the same kinds of hypotheses, so that the hypothesis alone tells nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import ADJECTIVES_OF_PEOPLE, PEOPLE, draw_who, plural

ENTAILMENT, NEUTRAL, CONTRADICTION = LABELS = ("entailment", "neutral", "contradiction")


class Feat(NamedTuple):
    """A verb in base and past form, the same of a synonym, and the object of both."""

    base: str
    past: str
    other_base: str
    other_past: str
    thing: str


FEATS = tuple(
    Feat(*row.split("/"))
    for row in (
        "buy/bought/purchase/purchased/the cottage",
        "repair/repaired/fix/fixed/the engine",
        "close/closed/shut/shut/the shop",
        "finish/finished/complete/completed/the report",
        "answer/answered/reply to/replied to/the letter",
        "phone/phoned/call/called/the landlord",
        "hide/hid/conceal/concealed/the money",
        "clean/cleaned/tidy up/tidied up/the kitchen",
        "return/returned/give back/gave back/the library books",
        "choose/chose/pick/picked/a new colour",
        "enter/entered/go into/went into/the palace",
        "destroy/destroyed/demolish/demolished/the old bridge",
        "cancel/cancelled/call off/called off/the concert",
        "rescue/rescued/save/saved/the kitten",
        "start/started/switch on/switched on/the machine",
        "gather/gathered/collect/collected/the evidence",
        "find/found/locate/located/the missing key",
        "show/showed/exhibit/exhibited/the photographs",
        "beat/beat/defeat/defeated/the champion",
        "build/built/construct/constructed/a stone wall",
        "frighten/frightened/scare/scared/the pigeons",
        "throw away/threw away/get rid of/got rid of/the old sofa",
        "sign/signed/put a name to/put a name to/the contract",
        "raise/raised/put up/put up/the rent",
        "discuss/discussed/talk about/talked about/the film",
    )
)

# Frames of {who} and a feat ({do}), or of {someone} and a whole {clause}, by what they tell of the feat.
DONE = (
    "{who} managed to {do}",
    "{who} remembered to {do}",
    "{who} was finally able to {do}",
    "{who} did not fail to {do}",
    "{someone} noticed that {clause}",
    "{someone} was glad that {clause}",
    "{someone} had forgotten that {clause}",
    "it is true that {clause}",
)
NOT_DONE = (
    "{who} failed to {do}",
    "{who} forgot to {do}",
    "{who} refused to {do}",
    "{who} did not manage to {do}",
    "{someone} lied that {clause}",
    "{someone} was wrong to think that {clause}",
    "{someone} only dreamt that {clause}",
    "it is not true that {clause}",
)
OPEN = (
    "{who} wanted to {do}",
    "{who} was asked to {do}",
    "{who} promised to {do}",
    "{who} planned to {do}",
    "{someone} thought that {clause}",
    "{someone} hoped that {clause}",
    "{someone} wondered whether {clause}",
    "it is possible that {clause}",
)
KINDS = tuple(
    tuple(row.split("/"))
    for row in (
        "poodle/dog",
        "salmon/fish",
        "rose/flower",
        "oak/tree",
        "violin/musical instrument",
        "hammer/tool",
        "carrot/vegetable",
        "sparrow/bird",
        "truck/vehicle",
        "pear/piece of fruit",
        "sofa/piece of furniture",
        "lemonade/drink",
        "cottage/house",
        "python/snake",
        "beetle/insect",
        "diamond/jewel",
        "canoe/boat",
        "sword/weapon",
        "jacket/piece of clothing",
        "novel/book",
    )
)
SPOTS = (
    "in the garden",
    "near the church",
    "behind the school",
    "in the museum",
    "on the farm",
    "beside the river",
    "in the palace",
)
COLOURS = "white black big small new strange".split()

# For each hypothesis, the premises of every label; {low} is a kind of {high}.
EXISTENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "a {high}": {ENTAILMENT: ("a {low}", "a {colour} {low}"), NEUTRAL: ("no {low}",), CONTRADICTION: ("no {high}",)},
    "a {low}": {ENTAILMENT: ("a {colour} {low}",), NEUTRAL: ("a {high}",), CONTRADICTION: ("no {high}", "no {low}")},
    "no {high}": {ENTAILMENT: ("not a single {high}",), NEUTRAL: ("no {low}",), CONTRADICTION: ("a {low}", "a {high}")},
    "no {low}": {ENTAILMENT: ("no {high}",), NEUTRAL: ("a {high}",), CONTRADICTION: ("a {low}", "a {colour} {low}")},
}
QUANTITY: dict[str, dict[str, tuple[str, ...]]] = {
    "all the {who}": {
        ENTAILMENT: ("each and every one of the {who}",),
        NEUTRAL: ("all the {kind} {who}", "most of the {who}", "some of the {who}"),
        CONTRADICTION: ("none of the {who}", "not all the {who}"),
    },
    "all the {kind} {who}": {
        ENTAILMENT: ("all the {who}",),
        NEUTRAL: ("some of the {kind} {who}", "most of the {who}"),
        CONTRADICTION: ("none of the {who}", "none of the {kind} {who}"),
    },
    "none of the {who}": {
        ENTAILMENT: ("not a single one of the {who}",),
        NEUTRAL: ("none of the {kind} {who}", "not all the {who}"),
        CONTRADICTION: ("some of the {who}", "all the {who}", "some of the {kind} {who}"),
    },
    "none of the {kind} {who}": {
        ENTAILMENT: ("none of the {who}",),
        NEUTRAL: ("not all the {who}",),
        CONTRADICTION: ("some of the {kind} {who}", "all the {who}"),
    },
    "some of the {who}": {
        ENTAILMENT: ("some of the {kind} {who}", "all the {who}", "most of the {who}"),
        NEUTRAL: ("none of the {kind} {who}",),
        CONTRADICTION: ("none of the {who}",),
    },
    "most of the {who}": {
        ENTAILMENT: ("all the {who}",),
        NEUTRAL: ("some of the {who}",),
        CONTRADICTION: ("none of the {who}",),
    },
}
# A relation of {a} to {b}, the same said of {b} to {a}.
CONVERSES = (
    ("{a} is taller than {b}", "{b} is shorter than {a}"),
    ("{a} is older than {b}", "{b} is younger than {a}"),
    ("{a} is richer than {b}", "{b} is poorer than {a}"),
    ("{a} sold the boat to {b}", "{b} bought the boat from {a}"),
    ("{a} taught {b} to swim", "{b} learnt to swim from {a}"),
    ("{a} lent {b} a ladder", "{b} borrowed a ladder from {a}"),
    ("{a} arrived before {b}", "{b} arrived after {a}"),
    ("{a} won the match against {b}", "{b} lost the match against {a}"),
)
SLEEPINGS = "slept|laughed|waited|complained|fainted|sang|left|applauded|voted".split("|")


def draw_people(draw: Draw, count: int) -> list[str]:
    """Returns different people."""
    people: list[str] = []
    while len(people) < count:
        who = draw_who(draw)
        if who not in people:
            people.append(who)
    return people


def statement(draw: Draw, who: str, feat: Feat, done: bool) -> str:
    """Returns a clause that says whether somebody did a feat."""
    base, past = draw.pick(((feat.base, feat.past), (feat.other_base, feat.other_past)))
    verb = past if done else draw.pick((f"did not {base}", f"never {past}"))
    return f"{who} {verb} {feat.thing}"


def outcome(draw: Draw, label: str) -> tuple[str, str]:
    """What a verb or a report implies of a deed: managed, failed, hoped, was wrong to think."""
    who, someone = draw_people(draw, 2)
    feat, other = draw.words(FEATS, 2)
    done = draw.chance(0.5)
    if label == NEUTRAL and draw.chance(0.5):
        frame, told_of = draw.pick(draw.pick((DONE, NOT_DONE))), other
    elif label == NEUTRAL:
        frame, told_of = draw.pick(OPEN), feat
    else:
        frame, told_of = draw.pick(DONE if done == (label == ENTAILMENT) else NOT_DONE), feat
    clause = statement(draw, who, told_of, True)
    do = f"{draw.pick((told_of.base, told_of.other_base))} {told_of.thing}"
    return frame.format(who=who, someone=someone, do=do, clause=clause), statement(draw, who, feat, done)


def polarity(draw: Draw, label: str) -> tuple[str, str]:
    """Two deeds, each done or not done, and one of them in other words or negated, or another deed."""
    who = draw_who(draw)
    feat, second, other = draw.words(FEATS, 3)
    done = draw.chance(0.5)
    premise_done = draw.chance(0.5) if label == NEUTRAL else done == (label == ENTAILMENT)
    told = [statement(draw, who, feat, premise_done)]
    if draw.chance(0.6):
        told.append(statement(draw, draw.pick((who, draw_who(draw))), second, draw.chance(0.5)))
    premise = draw.pick((" and ", ", while ", ", but ")).join(draw.shuffled(told))
    return premise, statement(draw, who, other if label == NEUTRAL else feat, done)


def existence(draw: Draw, label: str) -> tuple[str, str]:
    """What there is and is not, by kinds of kinds."""
    low, high = draw.word(KINDS)
    hypothesis = draw.pick(tuple(EXISTENCE))
    premise = draw.pick(EXISTENCE[hypothesis][label])
    there = draw.pick(("is", "was"))
    place = draw.pick(SPOTS)
    parts = {"low": low, "high": high, "colour": draw.pick(COLOURS)}
    first, second = (f"there {there} {noun} {place}".format(**parts) for noun in (premise, hypothesis))
    return first, second


def quantity(draw: Draw, label: str) -> tuple[str, str]:
    """All, most, some and none of a group and of a part of it."""
    hypothesis = draw.pick(tuple(QUANTITY))
    premise = draw.pick(QUANTITY[hypothesis][label])
    who, kind, deed = plural(draw.word(PEOPLE)), draw.word(ADJECTIVES_OF_PEOPLE), draw.word(SLEEPINGS)
    first, second = (f"{group} {deed}".format(who=who, kind=kind) for group in (premise, hypothesis))
    return first, second


def converse(draw: Draw, label: str) -> tuple[str, str]:
    """A relation between two people, seen from the other side."""
    one, other, third = draw_people(draw, 3)
    forms = draw.shuffled(draw.word(CONVERSES))
    premise = forms[0].format(a=one, b=other)
    if label == ENTAILMENT:
        return premise, forms[1].format(a=one, b=other)
    if label == CONTRADICTION:
        return premise, forms[1].format(a=other, b=one)
    stranger = draw.shuffled((third, draw.pick((one, other))))
    return premise, forms[1].format(a=stranger[0], b=stranger[1])


def coordination(draw: Draw, label: str) -> tuple[str, str]:
    """Both, neither, either, and one but not the other."""
    one, other, third = draw_people(draw, 3)
    feat = draw.word(FEATS)
    past = feat.past
    done = draw.chance(0.5)
    asked = third if label == NEUTRAL and draw.chance(0.6) else one
    premise_done = done == (label == ENTAILMENT)
    if label == NEUTRAL and asked == one:
        group = draw.pick(("either {a} or {b}", "{a} or {b}"))
    elif premise_done:
        group = draw.pick(("both {a} and {b}", "{one} , but not {other} ,"))
    else:
        group = draw.pick(("neither {a} nor {b}", "{other} , but not {one} ,"))
    a, b = draw.shuffled((one, other))
    premise = f"{group} {past} {feat.thing}".format(a=a, b=b, one=one, other=other).replace(" ,", ",")
    return premise, statement(draw, asked, feat, done)


Rule = Callable[[Draw, str], tuple[str, str]]
RULES: tuple[Rule, ...] = (outcome, outcome, polarity, polarity, existence, existence, quantity, converse, coordination)


def example(draw: Draw, label: str) -> Example:
    """Returns a premise and a hypothesis with the given label, one of `LABELS`."""
    premise, hypothesis = draw.pick(RULES)(draw, label)
    return Example(sentence(premise), sentence(hypothesis), label)
