"""QNLI: a question, and a sentence that answers it or speaks of the same matter without the answer."""

from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import DAYS, MONTHS, PLACES, draw_who

GOODS = (
    "piano boat painting horse bicycle necklace statue camera carpet telescope guitar clock tractor sofa diamond "
    "motorcycle greenhouse manuscript violin trumpet wagon mirror lamp tent sword"
).split()


class Deal(NamedTuple):
    """A verb of getting or giving up in the past and the base form."""

    past: str
    base: str


DEALS = tuple(
    Deal(*pair.split())
    for pair in (
        "bought buy",
        "sold sell",
        "found find",
        "lost lose",
        "painted paint",
        "repaired repair",
        "broke break",
        "hid hide",
        "stole steal",
        "borrowed borrow",
        "rented rent",
        "cleaned clean",
        "dropped drop",
        "admired admire",
        "photographed photograph",
    )
)
# What a sentence may tell of a deal, by the kind of question that it answers.
DETAILS = {
    "place": (
        *(f"in {city}" for city in PLACES),
        "at the market",
        "behind the church",
        "near the harbour",
        "in a small village",
        "at the station",
        "outside the museum",
    ),
    "time": (
        *(f"on {day}" for day in DAYS),
        *(f"in {month}" for month in MONTHS),
        "last week",
        "before breakfast",
        "at noon",
        "two years ago",
        "after the war",
        "shortly before midnight",
    ),
    "reason": (
        "because of a bet",
        "out of boredom",
        "out of jealousy",
        "for fear of thieves",
        "because a friend had asked",
        "out of kindness",
        "because nobody else wanted it",
        "to please a neighbour",
        "in order to win a prize",
        "out of curiosity",
    ),
    "company": (
        "with a cousin",
        "together with two friends",
        "with the help of a neighbour",
        "with an old colleague",
        "alongside three students",
        "with a group of tourists",
        "in the company of a dentist",
        "with both sisters",
        "with the twins",
        "with a stranger",
    ),
}
QUESTIONS = {
    "place": ("Where did {who} {base} the {thing}?", "In which place did {who} {base} the {thing}?"),
    "time": ("When did {who} {base} the {thing}?", "At what time did {who} {base} the {thing}?"),
    "reason": ("Why did {who} {base} the {thing}?", "For what reason did {who} {base} the {thing}?"),
    "company": ("Who joined {who} to {base} the {thing}?", "With whom did {who} {base} the {thing}?"),
}


class Matter(NamedTuple):
    """Who did what with which thing."""

    who: str
    deal: Deal
    thing: str


def draw_matter(draw: Draw) -> Matter:
    """Returns a matter to ask about."""
    return Matter(draw_who(draw), draw.word(DEALS), draw.word(GOODS))


def told(draw: Draw, matter: Matter, kinds: list[str]) -> str:
    """Returns a sentence about the matter with one detail of each of two kinds."""
    first, second = (draw.word(DETAILS[kind]) for kind in kinds)
    clause = f"{matter.who} {matter.deal.past} the {matter.thing}"
    if draw.chance(0.3):
        return sentence(f"{first}, {clause} {second}")
    # A reason comes last: "because a friend had asked in Oslo" would be a place of the asking.
    return sentence(f"{clause} {second} {first}" if kinds[0] == "reason" else f"{clause} {first} {second}")


def example(draw: Draw, label: str) -> Example:
    """Returns a question and a sentence with the label "entailment" (it is answered) or "not_entailment"."""
    asked, *others = draw.shuffled(tuple(QUESTIONS))
    matter = draw_matter(draw)
    question = draw.pick(QUESTIONS[asked]).format(who=matter.who, base=matter.deal.base, thing=matter.thing)
    kinds = [asked, others[0]]
    if label == "not_entailment":
        if draw.chance(0.6):
            kinds = others[:2]
        else:
            matter = elsewhere(draw, matter)
    return Example(question, told(draw, matter, draw.shuffled(kinds)), label)


def elsewhere(draw: Draw, matter: Matter) -> Matter:
    """Returns the matter with another person, deal or thing."""
    fresh = draw_matter(draw)
    field = draw.pick(Matter._fields)
    if getattr(fresh, field) == getattr(matter, field):
        return elsewhere(draw, matter)
    return matter._replace(**{field: getattr(fresh, field)})
