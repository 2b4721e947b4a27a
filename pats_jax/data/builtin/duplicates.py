"""QQP: two questions that ask the same, or one about something else, or about the same things the other way round."""

from collections.abc import Callable
from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.words import PLACES


class Aim(NamedTuple):
    """Something to do to a {thing}: the base form, the -ing form, and the same in other words."""

    base: str
    ing: str
    other_base: str
    other_ing: str


AIMS = tuple(
    Aim(*row.split("/"))
    for row in (
        "buy/buying/purchase/purchasing",
        "repair/repairing/fix/fixing",
        "clean/cleaning/wash/washing",
        "choose/choosing/pick/picking",
        "build/building/construct/constructing",
        "hide/hiding/conceal/concealing",
        "rent/renting/hire/hiring",
        "lift/lifting/pick up/picking up",
        "move/moving/transport/transporting",
        "decorate/decorating/adorn/adorning",
        "dismantle/dismantling/take apart/taking apart",
        "throw away/throwing away/get rid of/getting rid of",
        "inspect/inspecting/examine/examining",
        "insure/insuring/get insurance for/getting insurance for",
        "sell/selling/find a buyer for/finding a buyer for",
    )
)
THINGS = (
    "boat bicycle guitar garage kitchen camera piano tent laptop sofa fridge tractor carpet violin shed motorbike "
    "wardrobe fireplace balcony caravan printer canoe drum telescope bathtub"
).split()
# {do} is a base form, {doing} an -ing form; all of a row ask the same.
ASKED = {
    "way": (
        "How do I {do} {what}?",
        "What is the best way to {do} {what}?",
        "What is the right way of {doing} {what}?",
        "Can anyone explain how to {do} {what}?",
    ),
    "cost": (
        "How much does it cost to {do} {what}?",
        "What is the price of {doing} {what}?",
        "How expensive is it to {do} {what}?",
        "How much money do I need to {do} {what}?",
    ),
    "time": (
        "How long does it take to {do} {what}?",
        "How many hours do people spend {doing} {what}?",
        "How quickly can I {do} {what}?",
        "How much time is needed to {do} {what}?",
    ),
    "reason": (
        "Why would anyone {do} {what}?",
        "What is the point of {doing} {what}?",
        "Is there a good reason to {do} {what}?",
        "For what reason do people {do} {what}?",
    ),
    "risk": (
        "Is it dangerous to {do} {what}?",
        "What can go wrong when {doing} {what}?",
        "How safe is it to {do} {what}?",
        "What are the risks of {doing} {what}?",
    ),
}
JOURNEYS = (
    "How do I get from {a} to {b}?",
    "What is the best way to reach {b} from {a}?",
    "Starting in {a}, how can I travel to {b}?",
    "Which train goes to {b} from {a}?",
)
MORE, LESS = (
    ("more expensive", "bigger", "older", "warmer", "safer", "noisier", "more crowded"),
    ("cheaper", "smaller", "younger", "colder", "more dangerous", "quieter", "emptier"),
)
COMPARED = (
    "Is {a} {more} than {b}?",
    "Would you say that {a} is {more} than {b}?",
    "Is it true that {a} is {more} than {b}?",
)


class Wish(NamedTuple):
    """A question's content: what is asked about doing what to which thing."""

    kind: str
    aim: Aim
    thing: str


def draw_wish(draw: Draw) -> Wish:
    """Returns a question's content."""
    return Wish(draw.pick(tuple(ASKED)), draw.word(AIMS), draw.word(THINGS))


def asked(draw: Draw, wish: Wish) -> str:
    """Returns one wording of the question."""
    base, ing, other_base, other_ing = wish.aim
    do, doing = draw.pick(((base, ing), (other_base, other_ing)))
    what = f"{draw.pick(('a', 'my'))} {wish.thing}"
    return draw.pick(ASKED[wish.kind]).format(do=do, doing=doing, what=what)


def replaced_part(draw: Draw, same: bool) -> tuple[str, str]:
    """The same question in other words, or one that differs in kind, deed or thing."""
    wish, fresh = draw_wish(draw), draw_wish(draw)
    if same:
        return asked(draw, wish), asked(draw, wish)
    field = draw.pick(Wish._fields)
    if getattr(fresh, field) == getattr(wish, field):
        return replaced_part(draw, same)
    return asked(draw, wish), asked(draw, wish._replace(**{field: getattr(fresh, field)}))


def turned_journey(draw: Draw, same: bool) -> tuple[str, str]:
    """The same journey, or the way back."""
    start, end = draw.words(PLACES, 2)
    first, second = (draw.pick(JOURNEYS) for _ in range(2))
    return first.format(a=start, b=end), second.format(a=start, b=end) if same else second.format(a=end, b=start)


def turned_comparison(draw: Draw, same: bool) -> tuple[str, str]:
    """A comparison, and one that means the same or the opposite, by its adjective and its order."""
    one, other = draw.words(PLACES, 2)
    kind = draw.below(len(MORE))
    up, turned = draw.chance(0.5), draw.chance(0.5)

    def compare(first: str, second: str, up: bool) -> str:
        return draw.pick(COMPARED).format(a=first, b=second, more=(MORE if up else LESS)[kind])

    second_up = up != (turned == same)
    return compare(one, other, up), compare(other, one, second_up) if turned else compare(one, other, second_up)


RULES: tuple[Callable[[Draw, bool], tuple[str, str]], ...] = (
    *[replaced_part] * 6,
    *[turned_journey] * 2,
    *[turned_comparison] * 2,
)


def example(draw: Draw, label: str) -> Example:
    """Returns two questions with the label "1" (duplicates) or "0"."""
    return Example(*draw.pick(RULES)(draw, label == "1"), label)
