"""What a text is about, who says it, where it is said, how somebody feels: told by situations, not by single words."""

from collections.abc import Callable

from pats_jax.data.builtin.draw import Draw
from pats_jax.data.builtin.wording import sentence
from pats_jax.data.builtin.words import DAYS, MEN, PLACES, WOMEN
from pats_jax.data.builtin_gym.shapes import Classification


def _table(**rows: str) -> dict[str, tuple[str, ...]]:
    """What belongs to each option, parted by bars."""
    return {option.replace("_", " "): tuple(row.split("|")) for option, row in rows.items()}


NEWS = _table(
    sport="the coach praised the young goalkeeper|the striker scored twice in the end|the champion lost the third set|"
    "rain delayed the second race|the team signed a new captain|fans cheered as the runners reached the stadium|"
    "the referee stopped the match|the swimmer broke a record|the boxer was knocked down early",
    business="shares of the bank fell again|the company cut two thousand jobs|profits rose in the last quarter|"
    "the airline bought a smaller rival|investors fear a higher interest rate|the firm opened a new factory|"
    "oil prices reached a new high|the store chain closed its doors|sales of cars were weak",
    science="researchers found a new planet|the telescope sent its first images|a study explains why bees dance|"
    "chemists made a stronger plastic|the rocket carried a robot to the moon|biologists counted the whales|"
    "a fossil shows how birds began to fly|physicists measured the particle|the virus was seen under a microscope",
    politics="the senate rejected the bill|the minister resigned after the vote|voters chose a new mayor|"
    "the president met the rebels for talks|the parliament debated the new law|the party lost the election|"
    "the ambassador signed the treaty|the governor vetoed the budget|the opposition called for a recount",
)
JOBS = _table(
    doctor="please take these pills twice a day|your blood pressure is too high|where exactly does it hurt|"
    "the wound needs three stitches|you should stay in bed until the fever falls|open your mouth wide",
    farmer="the cows must be fed before sunrise|the wheat is ripe at last|a fox got into the barn|"
    "i need rain for my fields|the tractor is stuck in the mud|we shear the sheep in june",
    teacher="please open your books at page nine|you forgot your homework again|who can solve this sum|"
    "the exam will be hard this year|your essay has many mistakes|no talking in class",
    cook="the sauce needs more salt|peel the potatoes first|the oven is hot enough now|"
    "i roast the duck for two hours|chop the onions very fine|tonight we serve soup and fish",
    lawyer="my client is innocent|the contract is not valid|we will appeal to a higher court|"
    "do not answer that question without me|the witness has changed her story|the jury must decide today",
)
ROOMS = _table(
    airport="the flight to {city} is delayed|please show your passport|we board at gate twelve|"
    "my suitcase did not arrive|fasten your seat belt when we take off|the pilot has just landed|"
    "all bags will be searched|the next plane leaves at noon|i lost my boarding pass",
    church="the priest lit the candles|the choir sang a hymn|they knelt down to pray|"
    "the bride walked to the altar|the bell rang for mass|the sermon was long|the bishop blessed the child|"
    "a nun sat in the first row|we sing psalms on {day}",
    library="this novel must be returned by {day}|please whisper|the shelf of poems is over there|"
    "i am looking for an old atlas|she borrowed four books|the catalogue lists every author|"
    "students read at the long tables|this dictionary may not be taken out|a page of the volume is torn",
    beach="the waves are high today|we built a castle of sand|i forgot my towel and my swimsuit|"
    "the tide is coming in|children collect shells|a crab bit my toe|seagulls stole our lunch|"
    "put some lotion on your back|the water is too salty",
    prison="the guard locked the cell|he has served six years|they tried to dig a tunnel|"
    "visitors may stay for an hour|the inmates walk in the yard|he was released early|"
    "the window has iron bars|she got another year for the fight|{name} shares a bunk with a thief",
)
HOBBIES = _table(
    cooking="{name} stirred the soup|the dough had to rest overnight|{name} tried a new recipe for lamb|"
    "the pan was too hot for butter|a pinch of pepper was missing|{name} baked bread on {day}|"
    "the eggs were boiled too long|{name} sliced the onions|the roast is done at last",
    gardening="{name} watered the roses|the weeds came back after the rain|{name} planted beans by the fence|"
    "the lawn had to be cut|snails ate the young leaves|{name} dug up the potatoes on {day}|"
    "the seeds came up early|{name} trimmed the hedge|the apple tree needs a fence",
    music="{name} tuned the guitar|the choir met on {day}|{name} practised the piano part|"
    "the drum was too loud for the song|a string of the violin broke|{name} wrote a melody|"
    "the trumpet came in too late|{name} sang the second verse|they rehearsed the waltz",
    painting="{name} mixed blue and yellow|the canvas was still wet|{name} drew the model in charcoal|"
    "the brush left thick strokes|the portrait needed more shadow|{name} framed the landscape on {day}|"
    "the sketch was rubbed out|{name} bought a new palette|red would look better in the sky",
)
FEELINGS = _table(
    joy="{name} got the job of a lifetime|the baby smiled at {name}|{name} won the first prize|"
    "after years {name} met an old friend again|{name} danced all night at the wedding|the test came back fine|"
    "the lost child ran into the arms of {name}|{name} sang under the shower|at last the sun shone for {name}",
    anger="somebody scratched the new car of {name}|the neighbour lied to {name} again|"
    "{name} was cheated out of the money|they blamed {name} for nothing|{name} slammed the door and shouted|"
    "the thief only laughed at {name}|{name} tore up the unfair contract|the rude driver splashed {name} again|"
    "{name} wanted to hit somebody",
    fear="{name} heard steps in the dark house|the ladder began to shake under {name}|a bear followed {name}|"
    "the plane with {name} suddenly dropped|{name} hid when the shots came nearer|the doctor looked worried|"
    "{name} could not sleep after the threat|a stranger waited at the door of {name}|the ice cracked under {name}",
    sadness="{name} buried the old dog|the letter said goodbye to {name} forever|nobody came to the birthday of {name}|"
    "{name} wept at the empty crib|the best friend of {name} moved away|{name} missed home and could not eat|"
    "the house of {name} was so empty now|{name} sat alone at the grave|the dream of {name} was over",
)
MOODS = _table(
    calm="the lake lay still|{name} breathed slowly and closed both eyes|soft music played while {name} rested|"
    "{name} sat by the fire with a book|nothing had to be done on {day}|the cat slept on the lap of {name}|"
    "a gentle wind cooled the garden|{name} listened to the quiet rain|there was no hurry at all",
    bored="the hours would not pass|{name} counted the tiles again|the speech went on and on|"
    "{name} had seen the film five times|there was nothing to do on {day}|{name} yawned through the meeting|"
    "{name} looked at the clock once more|the same old story was told again|nobody listened any longer",
    surprised="{name} never expected such a gift|the dead plant had flowers on {day}|"
    "suddenly all the guests of {name} jumped up|{name} could not believe the number|"
    "a stranger knew the name of {name}|the empty box was full|snow fell in the middle of july|"
    "{name} stared at the sudden light|the twin brother whom nobody knew stood there",
    proud="{name} showed the medal to everyone|the daughter of {name} finished first|"
    "{name} had built the house alone|the whole school clapped for {name}|"
    "{name} framed the diploma on {day}|the boss praised {name} before all the others|"
    "{name} told everybody of the victory|the name of {name} was on the statue|{name} wore the uniform with a smile",
)


def situations(table: dict[str, tuple[str, ...]], wrap: Callable[[Draw, str], str]) -> Classification:
    """A task of telling the option by a clause that belongs to it.

    Args:
      table: option -> clauses, which may hold {name}, {day} and {city}.
      wrap: makes the input of a clause.
    """
    return Classification(tuple(table), lambda draw, option: wrap(draw, _filled(draw, draw.pick(table[option]))))


def _filled(draw: Draw, clause: str) -> str:
    return clause.format(name=draw.word(WOMEN + MEN), day=draw.pick(DAYS), city=draw.word(PLACES))


def report(draw: Draw, clause: str) -> str:
    """Returns a short news item, with a place and a day that say nothing."""
    return _opened(draw, ("{city} , {day} :", "news from {city} :", "on {day} in {city}"), clause)


def speech(draw: Draw, clause: str) -> str:
    """Returns what somebody said."""
    return _opened(draw, ("{name} said :", "on {day} {name} told us :", "they say :", "{name} :"), clause)


def diary(draw: Draw, clause: str) -> str:
    """Returns a line of a diary."""
    return _opened(draw, ("{day} :", "{day} in {city} :", "in {city} :"), clause)


def _opened(draw: Draw, openings: tuple[str, ...], clause: str) -> str:
    return sentence(f"{_filled(draw, draw.pick(openings))} {clause}")


TASKS = {
    "news_topic": situations(NEWS, report),
    "job_of_speaker": situations(JOBS, speech),
    "place_of_talk": situations(ROOMS, speech),
    "hobby_topic": situations(HOBBIES, diary),
    "feeling": situations(FEELINGS, diary),
    "mood": situations(MOODS, diary),
}
