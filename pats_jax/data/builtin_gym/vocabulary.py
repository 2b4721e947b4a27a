"""Words: which kind of thing, which one is odd, same meaning or opposite.

Each task has kinds or pairs of its own, so that what is learnt upstream is the question, not the words.
"""

from pats_jax.data.builtin.acceptability import PEOPLE_THE
from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.wording import sentence, with_articles
from pats_jax.data.builtin_gym.shapes import Classification, MultipleChoice, Question, parts

THINGS = tuple("place house dog story voice road idea man answer town room song door day".split())

Kinds = dict[str, tuple[str, ...]]


def _kinds(**words: str) -> Kinds:
    return {kind.replace("_", " "): tuple(members.split()) for kind, members in words.items()}


NATURE = _kinds(
    bird="eagle owl crow robin swan duck goose hawk raven pigeon chicken",
    fish="salmon trout shark tuna cod bass eel carp",
    tree="oak pine maple cedar elm willow birch palm ash",
    flower="rose lily tulip daisy orchid violet lotus iris",
    insect="bee ant fly beetle moth butterfly mosquito wasp cricket",
    fruit="apple pear lemon orange cherry banana grape mango plum peach",
    metal="iron gold copper silver tin zinc lead steel bronze",
    weather="rain snow fog wind storm hail thunder frost",
)
MADE = _kinds(
    tool="hammer saw drill axe shovel knife pliers needle",
    instrument="piano violin guitar flute trumpet drum harp cello organ",
    vehicle="car truck bus train tram bicycle van taxi ambulance",
    furniture="chair table sofa desk bed shelf bench cupboard couch",
    clothing="shirt coat hat dress skirt jacket scarf sweater socks",
    drink="tea coffee wine beer juice milk whiskey lemonade soda",
    building="house church castle tower hotel palace temple barn museum",
    weapon="sword gun spear rifle pistol arrow cannon dagger bow",
)
LIFE = _kinds(
    sport="football tennis golf hockey rugby boxing swimming baseball cricket",
    colour="red blue green yellow purple brown pink grey",
    job="nurse lawyer farmer teacher baker pilot judge engineer",
    illness="flu cancer malaria fever asthma cough diabetes cold",
    country="france spain japan brazil egypt canada norway india",
    relative="mother father uncle aunt cousin sister brother grandmother",
    body_part="arm leg nose knee elbow shoulder finger neck ear",
    language="english french german spanish latin greek arabic chinese",
)
USES = _kinds(
    cutting="knife saw scissors axe blade",
    writing="pen pencil chalk typewriter keyboard",
    sleeping="bed pillow blanket mattress hammock",
    cooking="oven pan pot stove grill",
    travelling="car train plane ship bicycle",
    cleaning="broom soap towel sponge brush",
    reading="book newspaper magazine novel letter",
    fighting="sword gun spear cannon shield",
    drinking="cup glass mug bottle straw",
    keeping_warm="coat scarf gloves blanket heater",
)

_PAIRS = """big large small|fast quick slow|happy glad sad|rich wealthy poor|clever smart stupid|brave bold afraid
angry furious calm|broad wide narrow|old ancient new|hard difficult easy|silent quiet loud|strong powerful weak
thin slim fat|correct right wrong|famous known unknown|huge enormous tiny|strange odd normal|pretty beautiful ugly
dirty filthy clean|cold icy hot|final last first|near close far|sick ill healthy|wet soaked dry"""
_VERB_PAIRS = """buy purchase sell|win triumph lose|love adore hate|rise climb fall|help aid harm
build construct destroy|attack assault defend|allow permit forbid|arrive come leave|remember recall forget
laugh smile cry|accept agree refuse|give donate take|push shove pull|save rescue kill|praise honor blame
hide conceal show|increase grow shrink|join connect separate|raise lift lower|answer reply ask|speak talk listen
throw toss catch|repair fix break"""


def _triples(text: str) -> tuple[tuple[str, str, str], ...]:
    rows = (row.split() for line in text.splitlines() for row in line.split("|"))
    return tuple((word, synonym, opposite) for word, synonym, opposite in rows)


ADJECTIVES, VERBS = _triples(_PAIRS), _triples(_VERB_PAIRS)


def kind_of_word(kinds: Kinds, wordings: tuple[str, ...]) -> MultipleChoice:
    """Asks for the kind of a thing, among four kinds."""

    def ask(draw: Draw) -> Question:
        right, *wrong = draw.words(tuple(kinds), 4)
        word = draw.pick(kinds[right])
        if any(word in kinds[kind] for kind in wrong):
            return ask(draw)
        return Question(with_articles(draw.pick(wordings).format(word)), right, tuple(wrong))

    return MultipleChoice(ask)


def word_of_kind(kinds: Kinds, wordings: tuple[str, ...]) -> MultipleChoice:
    """Asks for the thing of a kind, among four things."""

    def ask(draw: Draw) -> Question:
        kind, *others = draw.words(tuple(kinds), 4)
        right, *wrong = (draw.pick(kinds[own]) for own in (kind, *others))
        if len({right, *wrong}) < 4 or set(wrong) & set(kinds[kind]):
            return ask(draw)
        return Question(with_articles(draw.pick(wordings).format(kind)), right, tuple(wrong))

    return MultipleChoice(ask)


def odd_one_out(kinds: Kinds, wording: str) -> MultipleChoice:
    """Asks which of four words is of another kind than the others."""

    def ask(draw: Draw) -> Question:
        kind, other = draw.words(tuple(kinds), 2)
        odd, fellows = draw.pick(kinds[other]), draw.words(kinds[kind], 3)
        listed = ", ".join(draw.shuffled((odd, *fellows)))
        return Question(wording.format(listed), odd, tuple(fellows))

    return MultipleChoice(ask)


def synonym_choice(triples: tuple[tuple[str, str, str], ...], wordings: tuple[str, ...]) -> MultipleChoice:
    """Asks for the synonym of a word; its opposite is offered too."""

    def ask(draw: Draw) -> Question:
        (word, synonym, opposite), other = draw.words(triples, 2)
        return Question(draw.pick(wordings).format(word), synonym, (opposite, draw.pick(other)))

    return MultipleChoice(ask)


def same_or_opposite(
    triples: tuple[tuple[str, str, str], ...], frame: str, subjects: tuple[str, ...], options: tuple[str, str]
) -> Classification:
    """Asks whether two sentences that differ in one word mean the same (the first option) or the opposite.

    Args:
      triples: rows of a word, a synonym and an opposite.
      frame: of {it} and {word}.
      subjects: what {it} may be.
      options: the names of the two.
    """

    def write(draw: Draw, option: str) -> str:
        word, synonym, opposite = draw.word(triples)
        pair = draw.shuffled((word, synonym if option == options[0] else opposite))
        subject = draw.word(subjects)
        first, second = (sentence(frame.format(it=subject, word=own)) for own in pair)
        return parts(sentence_1=first, sentence_2=second)

    return Classification(options, write)


TASKS = {
    "kind_of_nature": kind_of_word(NATURE, ("The word is {}.", "What is meant by {}?")),
    "kind_of_made_thing": kind_of_word(MADE, ("Which kind of thing is a {}?", "A {} belongs to which group?")),
    "example_of_made_thing": word_of_kind(MADE, ("Name a {}.", "Which one is an example of {}?")),
    "example_of_life": word_of_kind(LIFE, ("Which of these is a {}?", "Choose the {}.")),
    "thing_for_use": word_of_kind(USES, ("Which of these is made for {}?", "What do you need for {}?")),
    "odd_nature": odd_one_out(NATURE, "Which word does not belong to the others? {}"),
    "odd_life": odd_one_out(LIFE, "Find the odd one out: {}"),
    "synonym_adjective": synonym_choice(
        ADJECTIVES, ("Which word means the same as {}?", "What is another word for {}?")
    ),
    "synonym_verb": synonym_choice(VERBS, ("Instead of {}, one can say", "Choose the best replacement: to {}")),
    "adjective_relation": same_or_opposite(
        ADJECTIVES, "they call it a {word} {it}", THINGS, ("same meaning", "opposite meaning")
    ),
    "verb_relation": same_or_opposite(VERBS, "{it} will {word}", PEOPLE_THE, ("alike", "opposite")),
}
