"""SST-2: remarks on films whose verdict follows from how the words combine.

Praise and blame words occur equally often under both labels. Negation, contrast, comparison and hindsight decide.
"""

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import with_articles

PRAISE = (
    "brilliant charming clever moving funny witty gripping elegant thrilling tender inventive touching superb "
    "delightful graceful refreshing wonderful enchanting sincere subtle dazzling amusing heartfelt lively engaging "
    "fascinating wise warm beautiful captivating"
).split()
BLAME = (
    "dull clumsy boring shallow tedious silly bland predictable tiresome messy pointless lazy awful dreary lifeless "
    "annoying hollow cheap ugly forgettable stale sloppy pretentious dreadful empty confusing cold weak dismal stupid"
).split()
ASPECTS = (
    "plot script acting music dialogue ending story photography opening cast pacing humour romance finale direction "
    "score editing"
).split()
WHOLES = "film movie picture thriller comedy drama sequel remake".split()
SPEAKERS = "i|you|most people|anyone over ten|the audience around me|even a child|a patient viewer".split("|")

# Each frame says something of {subject}; {word} is praise or blame. A turning frame means the opposite of its word.
PLAIN = (
    "the {subject} is {word}",
    "{speaker} would call the {subject} {word}",
    "the {subject} turns out to be {word}",
    "the {subject} is every bit as {word} as promised",
    "there is something {word} about the {subject}",
    "the critics found the {subject} {word} and they were right",
    "the {subject} manages to be {word}",
    "nobody could deny that the {subject} is {word}",
)
TURNING = (
    "the {subject} is anything but {word}",
    "{speaker} would never call the {subject} {word}",
    "the {subject} is far from {word}",
    "the {subject} is nowhere near as {word} as promised",
    "there is nothing {word} about the {subject}",
    "the critics found the {subject} {word} and they were wrong",
    "the {subject} fails to be {word}",
    "nobody could claim that the {subject} is {word}",
    "the {subject} could have been {word} but never is",
)
# {main} carries the verdict, {side} leans the other way.
CONTRASTS = (
    "although {side} , {main}",
    "{main} , although {side}",
    "{side} , and yet {main}",
    "{side} , but {main} in the end",
    "{main} , even if {side}",
    "while {side} , {main} and that is what counts",
    "never mind that {side} : {main}",
    "{side} at first , but before long {main}",
)
COMPARISONS = (
    "more {word} than {other}",
    "a {word} {whole} that was sold as {other}",
    "it wants to be {other} and ends up {word}",
    "what begins as {other} soon becomes {word}",
    "less a {other} {whole} than a {word} one",
    "i expected a {other} {whole} and got a {word} one",
    "you may hope for something {other} , but {word} is what you will get",
)


def clause(draw: Draw, positive: bool, subject: str) -> str:
    """Returns a clause that speaks well or badly of the subject."""
    turning = draw.chance(0.5)
    word = draw.word(PRAISE if positive != turning else BLAME)
    frame = draw.pick(TURNING if turning else PLAIN)
    return frame.format(subject=subject, word=word, speaker=draw.pick(SPEAKERS))


def comparison(draw: Draw, positive: bool) -> str:
    """Returns a remark that weighs a praise word against a blame word."""
    word, other = draw.word(PRAISE), draw.word(BLAME)
    if not positive:
        word, other = other, word
    return draw.pick(COMPARISONS).format(word=word, other=other, whole=draw.pick(WHOLES))


def example(draw: Draw, label: str) -> Example:
    """Returns one remark with the label "1" (positive) or "0"."""
    positive = label == "1"
    shape = draw.below(5)
    if shape == 0:
        remark = clause(draw, positive, draw.pick(WHOLES + ASPECTS))
    elif shape == 1:
        remark = comparison(draw, positive)
    else:
        first, second = draw.words(ASPECTS, 2)
        if draw.chance(0.4):
            second = draw.pick(WHOLES)
        remark = draw.pick(CONTRASTS).format(
            main=clause(draw, positive, second), side=clause(draw, not positive, first)
        )
    return Example(with_articles(f"{remark} ."), None, label)
