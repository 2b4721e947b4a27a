"""STS-B: pairs of picture captions whose score from 0 to 5 follows from what one of them changes."""

from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import sentence

# Words of one row can stand for each other; the rows of one table are different things of the same sort.
PEOPLE = (
    ("man", "guy"),
    ("woman", "lady"),
    ("boy", "young lad"),
    ("girl", "young lass"),
    ("child", "kid"),
    ("doctor", "physician"),
    ("policeman", "police officer"),
    ("cook", "chef"),
    ("soldier", "trooper"),
    ("sailor", "seaman"),
    ("teacher", "instructor"),
    ("singer", "vocalist"),
)
MANNERS = "tall young old smiling tired bearded barefoot friendly blond lonely".split()
PLACES = (
    ("in the street", "on the road"),
    ("on the beach", "on the shore"),
    ("in the garden", "in the yard"),
    ("in the forest", "in the woods"),
    ("in the kitchen", "by the stove"),
    ("near the lake", "by the water"),
    ("in the office", "at work"),
    ("on the mountain", "on the hillside"),
    ("in the shop", "in the store"),
    ("at the station", "on the platform"),
)


class Doing(NamedTuple):
    """What somebody is doing and to what, both in two wordings, and another thing of the same kind."""

    verb: str
    verb_again: str
    thing: str
    thing_again: str
    sister: str


DOINGS = tuple(
    Doing(*row.split("/"))
    for row in (
        "riding/mounted on/a horse/a pony/a camel",
        "playing/performing on/a guitar/an acoustic guitar/a flute",
        "slicing/cutting up/an onion/an onion bulb/a tomato",
        "driving/steering/a car/an automobile/a truck",
        "feeding/giving food to/a dog/a puppy/a cat",
        "reading/looking through/a book/a novel/a newspaper",
        "eating/having/a sandwich/a sub/a pizza",
        "throwing/tossing/a ball/a football/a frisbee",
        "painting/doing/a picture/a portrait/a wall",
        "carrying/holding/a bag/a sack/a ladder",
        "repairing/fixing/a bicycle/a bike/a radio",
        "washing/cleaning/a cup/a mug/a window",
        "buying/purchasing/a hat/a cap/a coat",
        "cooking/preparing/a soup/a broth/a steak",
        "planting/putting in/a tree/a sapling/a rose",
        "climbing/going up/a rock/a boulder/a fence",
        "drinking/sipping/a beer/a lager/a coffee",
        "watching/looking at/a film/a movie/a parade",
    )
)


class Caption(NamedTuple):
    """The parts of a caption; each tuple holds wordings of the same thing."""

    manner: str
    person: tuple[str, ...]
    verb: tuple[str, ...]
    thing: tuple[str, ...]
    place: tuple[str, ...]


# What a change of one part takes from the score. A change of the deed changes verb and thing together.
COSTS = {"no manner": 0.5, "manner": 1.0, "person": 1.25, "place": 1.5, "no place": 0.75, "sister": 1.5, "deed": 2.5}
EXCLUSIVE = ({"no manner", "manner"}, {"no place", "place"}, {"sister", "deed"})


def _changes_by_score() -> dict[str, list[tuple[str, ...]]]:
    """Returns, for every score that changes lead to, the sets of those changes."""
    names = tuple(COSTS)
    table: dict[str, list[tuple[str, ...]]] = {}
    for bits in range(2 ** len(names)):
        chosen = tuple(name for place, name in enumerate(names) if bits >> place & 1)
        if any(pair <= set(chosen) for pair in EXCLUSIVE):
            continue
        score = max(0.0, 5.0 - sum(COSTS[name] for name in chosen))
        table.setdefault(f"{score:.3f}", []).append(chosen)
    return table


CHANGES = _changes_by_score()
SCORES = tuple(sorted(CHANGES))


def draw_caption(draw: Draw) -> Caption:
    """Returns a caption's parts."""
    doing = draw.word(DOINGS)
    thing = (doing.thing, doing.thing_again)
    return Caption(draw.word(MANNERS), draw.word(PEOPLE), (doing.verb, doing.verb_again), thing, draw.word(PLACES))


def changed(draw: Draw, caption: Caption, changes: tuple[str, ...]) -> Caption:
    """Returns the caption with the named changes made."""
    fresh = draw_caption(draw)
    while any(one == other for one, other in zip(caption, fresh, strict=True)):
        fresh = draw_caption(draw)
    if "sister" in changes:
        sister = next(doing.sister for doing in DOINGS if doing.thing == caption.thing[0])
        caption = caption._replace(thing=(sister,))
    if "deed" in changes:
        caption = caption._replace(verb=fresh.verb, thing=fresh.thing)
    for part in ("manner", "person", "place"):
        if part in changes:
            caption = caption._replace(**{part: getattr(fresh, part)})
    if "no manner" in changes:
        caption = caption._replace(manner="")
    return caption._replace(place=("",)) if "no place" in changes else caption


def shown(draw: Draw, caption: Caption) -> str:
    """Returns one wording of the caption."""
    person, verb, thing, place = (draw.pick(part) for part in caption[1:])
    who = f"{caption.manner} {person}".strip()
    return sentence(f"a {who} is {verb} {thing} {place}".strip())


def example(draw: Draw, label: str) -> Example:
    """Returns two captions whose similarity is the label, one of `SCORES`."""
    caption = draw_caption(draw)
    pair = [shown(draw, caption), shown(draw, changed(draw, caption, draw.pick(CHANGES[label])))]
    first, second = draw.shuffled(pair)
    return Example(first, second, label)
