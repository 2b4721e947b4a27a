"""The vocabulary of the built-in data: tables of English words with the forms that the grammars need.

A table's order matters: every fifth entry is kept from the training split (`Draw.word`).
"""

from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw


class Action(NamedTuple):
    """A transitive verb between people, in the forms past and participle, and a synonym in the same forms."""

    past: str
    participle: str
    synonym_past: str
    synonym_participle: str


def _regular(*pairs: str) -> tuple[Action, ...]:
    """Returns actions whose past and participle are the same word, from "past synonym"."""
    return tuple(Action(past, past, other, other) for past, other in (pair.split() for pair in pairs))


PEOPLE = (
    "nurse farmer lawyer painter baker pilot soldier teacher sailor tailor senator singer chemist banker plumber "
    "waiter dancer engineer journalist butcher mechanic gardener librarian minister carpenter surgeon actor detective "
    "barber fisherman professor student dentist clerk poet driver architect merchant guard coach reporter tourist "
    "editor judge secretary chef duke hunter miner priest"
).split()
PEOPLE_SYNONYMS = {
    "lawyer": "attorney",
    "professor": "academic",
    "surgeon": "doctor",
    "journalist": "newspaperman",
    "chef": "cook",
    "coach": "trainer",
    "merchant": "trader",
    "guard": "watchman",
    "priest": "clergyman",
    "singer": "vocalist",
}
WOMEN = (
    "Anna Maria Julia Emma Laura Sarah Alice Helen Clara Nancy Susan Linda Diana Karen Rachel Martha Judith Emily "
    "Carol Sophie Irene Janet Teresa Joan Nora"
).split()
MEN = (
    "Peter Thomas Daniel Martin Robert George Edward Frank Henry Victor Walter Simon Oscar Arthur Paul Philip Leonard "
    "Stephen Gregory Hugo Kevin Ralph Dennis Albert Carl"
).split()
ADJECTIVES_OF_PEOPLE = "young old tall famous wealthy tired angry quiet foreign retired clever nervous".split()

ACTIONS = (
    *_regular("praised commended", "hired employed", "warned cautioned", "chased pursued", "helped assisted"),
    *_regular("phoned called", "rescued saved", "arrested detained", "hugged embraced", "deceived tricked"),
    *_regular(
        "attacked assaulted", "scolded rebuked", "questioned interrogated", "welcomed greeted", "admired respected"
    ),
    *_regular("injured hurt", "annoyed irritated", "frightened scared", "dismissed fired", "guided led"),
    *_regular("mocked ridiculed", "trained coached", "noticed spotted", "imitated copied", "sued prosecuted"),
    Action("beat", "beaten", "defeated", "defeated"),
    Action("chose", "chosen", "selected", "selected"),
)
IRREGULAR_PLURALS = {"fisherman": "fishermen", "secretary": "secretaries", "box": "boxes", "coach": "coaches"}
PLACES = (
    "Lisbon Oslo Vienna Boston Madrid Dublin Prague Toronto Chicago Geneva Athens Berlin Sydney Denver Naples Warsaw "
    "Seattle Cairo Lima Munich"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def draw_who(draw: Draw) -> str:
    """Returns somebody: a profession with its article, or a name."""
    return f"the {draw.word(PEOPLE)}" if draw.chance(0.5) else draw.word(WOMEN if draw.chance(0.5) else MEN)


def plural(noun: str) -> str:
    """Returns the plural of a person or thing of the built-in vocabulary."""
    return IRREGULAR_PLURALS.get(noun, f"{noun}s")
