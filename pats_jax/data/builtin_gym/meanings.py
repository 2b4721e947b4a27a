"""Two sentences: does one follow from the other, do they mean the same? By the rules of the built-in GLUE tasks."""

from collections.abc import Callable

from pats_jax.data.builtin import duplicates, inference, paraphrase, similarity
from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.inference import CONTRADICTION, ENTAILMENT, LABELS, NEUTRAL
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin_gym.shapes import Classification, parts

Pair = tuple[str, str]


def three_way(rule: inference.Rule, options: tuple[str, str, str], names: Pair) -> Classification:
    """A task of inference.

    Args:
      rule: a rule of the built-in MNLI.
      options: what entailment, neutral and contradiction are called.
      names: what premise and hypothesis are called.
    """
    label_of = dict(zip(options, LABELS, strict=True))

    def write(draw: Draw, option: str) -> str:
        return parts(**dict(zip(names, map(sentence, rule(draw, label_of[option])), strict=True)))

    return Classification(options, write)


def two_way(rule: inference.Rule, options: Pair, names: Pair, other: tuple[str, ...]) -> Classification:
    """As `three_way`, with one option for entailment and one for the labels in ``other``."""

    def write(draw: Draw, option: str) -> str:
        label = ENTAILMENT if option == options[0] else draw.pick(other)
        return parts(**dict(zip(names, map(sentence, rule(draw, label)), strict=True)))

    return Classification(options, write)


def same(rule: Callable[[Draw, bool], Pair], options: Pair, names: Pair) -> Classification:
    """A task that asks whether two sentences mean the same: the first option says so."""
    return Classification(
        options, lambda draw, option: parts(**dict(zip(names, rule(draw, option == options[0]), strict=True)))
    )


def captions(draw: Draw, same: bool) -> Pair:
    """Two wordings of a caption, or captions that differ in what is done, by whom or where."""
    caption = similarity.draw_caption(draw)
    other = caption if same else similarity.changed(draw, caption, (draw.pick(("deed", "person", "place", "sister")),))
    first, second = draw.shuffled([similarity.shown(draw, caption), similarity.shown(draw, other)])
    return first, second


_FACTS = ("premise", "hypothesis")
TASKS = {
    "outcome_inference": three_way(inference.outcome, ("true", "unclear", "false"), ("report", "claim")),
    "kinds_inference": three_way(inference.existence, LABELS, _FACTS),
    "deeds_inference": two_way(
        inference.polarity, ("follows", "does not follow"), ("text", "statement"), (NEUTRAL, CONTRADICTION)
    ),
    "quantity_inference": three_way(inference.quantity, ("yes", "maybe", "no"), ("fact", "question")),
    "couples_inference": two_way(
        inference.coordination, ("right", "wrong"), ("sentence", "conclusion"), (CONTRADICTION,)
    ),
    "news_meaning": same(paraphrase.replaced_detail, ("equivalent", "not equivalent"), ("sentence_1", "sentence_2")),
    "roles_meaning": same(paraphrase.swapped_people, ("same event", "other event"), ("sentence_1", "sentence_2")),
    "request_meaning": same(duplicates.replaced_part, ("duplicate", "not duplicate"), ("question_1", "question_2")),
    "caption_meaning": same(captions, ("same picture", "different picture"), ("picture_1", "picture_2")),
}
