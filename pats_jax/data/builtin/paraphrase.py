"""MRPC: two news sentences that report the same event in other words, or different events in nearly the same words."""

from collections.abc import Callable
from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw, Example
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import (
    ACTIONS,
    DAYS,
    PEOPLE,
    PEOPLE_SYNONYMS,
    PLACES,
    Action,
)

SOURCES = ("", "", "", "Police said ", "A spokesman said ", "Officials confirmed that ", "The paper reports that ")


class Event(NamedTuple):
    """Who did what to whom, and where or when ("in Oslo", "on Monday")."""

    agent: str
    action: Action
    patient: str
    setting: str


def draw_setting(draw: Draw) -> str:
    """Returns a place or a day, with its preposition."""
    return f"in {draw.word(PLACES)}" if draw.chance(0.5) else f"on {draw.pick(DAYS)}"


def draw_event(draw: Draw) -> Event:
    """Returns an event between two different people."""
    agent, patient = draw.words(PEOPLE, 2)
    return Event(agent, draw.word(ACTIONS), patient, draw_setting(draw))


def noun_phrase(draw: Draw, person: str) -> str:
    """Returns the person with the article, sometimes by a synonym."""
    return f"the {PEOPLE_SYNONYMS.get(person, person) if draw.chance(0.5) else person}"


def told(draw: Draw, event: Event) -> str:
    """Returns a clause that reports the event: active or passive, with either verb."""
    agent, patient = noun_phrase(draw, event.agent), noun_phrase(draw, event.patient)
    synonym = draw.chance(0.5)
    if draw.chance(0.5):
        return f"{agent} {event.action.synonym_past if synonym else event.action.past} {patient}"
    participle = event.action.synonym_participle if synonym else event.action.participle
    return f"{patient} was {participle} by {agent}"


def report(draw: Draw, event: Event) -> str:
    """Returns a sentence about the event and its setting."""
    clause = told(draw, event)
    if draw.chance(0.3):
        return sentence(f"{event.setting} {clause}")
    return sentence(f"{draw.pick(SOURCES)}{clause} {event.setting}")


def swapped_people(draw: Draw, same: bool) -> tuple[str, str]:
    """The event, and the event or the one in which agent and patient change places."""
    event = draw_event(draw)
    other = event if same else event._replace(agent=event.patient, patient=event.agent)
    return report(draw, event), report(draw, other)


def replaced_detail(draw: Draw, same: bool) -> tuple[str, str]:
    """The event, and the event or one with another agent, action or setting."""
    event = draw_event(draw)
    if same:
        return report(draw, event), report(draw, event)
    fresh = draw_event(draw)
    field = draw.pick(("agent", "action", "setting"))
    if getattr(fresh, field) == getattr(event, field) or fresh.agent == event.patient:
        return replaced_detail(draw, same)
    return report(draw, event), report(draw, event._replace(**{field: getattr(fresh, field)}))


def swapped_order(draw: Draw, same: bool) -> tuple[str, str]:
    """Two events in their order, and the same two in that order or in the other."""
    first, second = draw_event(draw), draw_event(draw)

    def ordered(earlier: Event, later: Event) -> str:
        one, two = told(draw, earlier), told(draw, later)
        return sentence(f"{one} before {two}" if draw.chance(0.5) else f"{two} after {one}")

    return ordered(first, second), ordered(first, second) if same else ordered(second, first)


RULES: tuple[Callable[[Draw, bool], tuple[str, str]], ...] = (
    *[replaced_detail] * 6,
    *[swapped_people] * 3,
    swapped_order,
)


def example(draw: Draw, label: str) -> Example:
    """Returns a pair with the label "1" (paraphrases) or "0"."""
    return Example(*draw.pick(RULES)(draw, label == "1"), label)
