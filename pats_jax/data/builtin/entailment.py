"""RTE: a short news text, and a sentence that follows from it or not."""

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.inference import CONTRADICTION, ENTAILMENT, NEUTRAL, RULES, draw_people
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import DAYS, PLACES

BACKGROUND = (
    "it rained in {place} on {day}",
    "the trip to {place} began on {day}",
    "{a} came back from {place} on {day}",
    "{a} met {b} in {place}",
    "the news from {place} spread quickly on {day}",
    "{a} wrote to {b} on {day}",
)


def example(draw: Draw, label: str) -> Example:
    """Returns a text and a sentence with the label "entailment" or "not_entailment"."""
    inner = ENTAILMENT if label == ENTAILMENT else draw.pick((NEUTRAL, CONTRADICTION))
    fact, hypothesis = draw.pick(RULES)(draw, inner)
    a, b = draw_people(draw, 2)
    background = draw.pick(BACKGROUND).format(a=a, b=b, place=draw.word(PLACES), day=draw.pick(DAYS))
    text = " ".join(sentence(part) for part in draw.shuffled((background, fact)))
    return Example(text, sentence(hypothesis), label)
