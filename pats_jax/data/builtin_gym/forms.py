"""The form of sentences: tense, negation, asking and telling, and which of two sentences follows the grammar."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pats_jax.data.builtin import acceptability
from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import MEN, PEOPLE, PLACES, WOMEN
from pats_jax.data.builtin_gym.shapes import Classification, parts


class Verb(NamedTuple):
    """Base form, third person, past, participle and an object."""

    base: str
    present: str
    past: str
    participle: str
    thing: str


VERBS = tuple(
    Verb(*row.split("/"))
    for row in (
        "sell/sells/sold/sold/the house",
        "write/writes/wrote/written/a letter",
        "clean/cleans/cleaned/cleaned/the floor",
        "read/reads/read/read/the news",
        "drive/drives/drove/driven/the bus",
        "cut/cuts/cut/cut/the grass",
        "paint/paints/painted/painted/the door",
        "buy/buys/bought/bought/some bread",
        "hide/hides/hid/hidden/the money",
        "close/closes/closed/closed/the shop",
        "sing/sings/sang/sung/a song",
        "break/breaks/broke/broken/the rules",
        "visit/visits/visited/visited/a friend",
        "feed/feeds/fed/fed/the horses",
        "hit/hits/hit/hit/the ball",
        "wear/wears/wore/worn/a hat",
        "draw/draws/drew/drawn/a map",
        "open/opens/opened/opened/the window",
        "choose/chooses/chose/chosen/a colour",
        "tell/tells/told/told/the story",
    )
)


def who(draw: Draw) -> str:
    """Returns somebody."""
    return f"the {draw.word(PEOPLE)}" if draw.chance(0.5) else draw.word(WOMEN + MEN)


def _place(draw: Draw) -> str:
    return f" in {draw.word(PLACES)}" if draw.chance(0.5) else ""


_TENSES = {
    "past": (
        "{who} {past} {thing}{place}",
        "{who} had {participle} {thing}{place}",
        "as a child {who} {past} {thing}{place}",
        "{who} used to {base} {thing}{place}",
        "{who} was about to {base} {thing}{place}",
    ),
    "present": (
        "{who} {present} {thing}{place}",
        "{who} does {base} {thing}{place}",
        "as a rule {who} {present} {thing}{place}",
        "{who} likes to {base} {thing}{place}",
        "{who} is used to it and {present} {thing}{place}",
    ),
    "future": (
        "{who} will {base} {thing}{place}",
        "{who} is going to {base} {thing}{place}",
        "next time {who} will {base} {thing}{place}",
        "{who} is about to {base} {thing}{place}",
        "tomorrow {who} {present} {thing}{place}",
    ),
}
_AFFIRMED = (
    "{who} {past} {thing}",
    "{who} did not forget to {base} {thing}",
    "nobody denies that {who} {past} {thing}",
    "{who} managed to {base} {thing}",
    "it is not false that {who} {past} {thing}",
    "{who} never failed to {base} {thing}",
)
_DENIED = (
    "{who} did not {base} {thing}",
    "{who} forgot to {base} {thing}",
    "nobody believes that {who} {past} {thing}",
    "{who} refused to {base} {thing}",
    "it is false that {who} {past} {thing}",
    "{who} never {past} {thing}",
)
_SPEECH_ACTS = {
    "statement": (
        "{who} {past} {thing}{place}",
        "i know when {who} {past} {thing}{place}",
        "this is how {who} {past} {thing}{place}",
        "you {base} {thing} with {who}{place}",
    ),
    "question": (
        "did {who} {base} {thing}{place}",
        "do you know when {who} {past} {thing}{place}",
        "is this how {who} {past} {thing}{place}",
        "can you {base} {thing} with {who}{place}",
    ),
    "command": (
        "{base} {thing} with {who}{place}",
        "tell me when {who} {past} {thing}{place}",
        "show me how {who} {past} {thing}{place}",
        "please {base} {thing} with {who}{place}",
    ),
}


def framed(frames: Mapping[str, tuple[str, ...]], end: str = ".") -> Classification:
    """A task of telling sentences by their form."""

    def write(draw: Draw, option: str) -> str:
        verb = draw.word(VERBS)
        frame = draw.pick(frames[option])
        text = frame.format(who=who(draw), place=_place(draw), **verb._asdict())
        return sentence(text, end)

    return Classification(tuple(frames), write)


def better_sentence(rule: Callable[[Draw, bool], str]) -> Classification:
    """A task of choosing the sentence that follows the grammar; the other breaks the same rule in its own words."""
    options = ("sentence 1", "sentence 2")

    def write(draw: Draw, option: str) -> str:
        first_is_good = option == options[0]
        first, second = (sentence(rule(draw, good)) for good in (first_is_good, not first_is_good))
        return parts(sentence_1=first, sentence_2=second)

    return Classification(options, write)


TASKS = {
    "tense": framed(_TENSES),
    "denial": framed({"happened": _AFFIRMED, "did not happen": _DENIED}),
    "speech_act": framed(_SPEECH_ACTS, end=""),
    "agreement": better_sentence(acceptability.verb_agreement),
    "pronoun": better_sentence(acceptability.reflexive),
    "determiner": better_sentence(acceptability.determiner),
    "conjunction": better_sentence(acceptability.correlative),
}
