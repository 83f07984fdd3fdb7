"""English sentences: templates of everyday speech, words in random order, very short ones.

A sentence is a string of words as they are said: lower case, without punctuation or digits. Some
sentences have no grammar, so that a model cannot guess from grammar what it does not hear.
"""

from __future__ import annotations

import functools
import re

from moss_audio_jax.draw import Draw
from moss_audio_jax.world.lexicon import SLOTS, number_words

# {slot} is a word of lexicon.SLOTS, {number:2-20} a number in that range, {clock} a time of day.
TEMPLATES = tuple(
    line.strip()
    for line in """
    the {animal} is in the {place}
    the {animal} {ran} {adverb}
    the {quality} {thing} is on the {furniture}
    my {relative} has a {colour} {vehicle}
    {name} {saw} a {size} {thing}
    {name} and {name} are {running} in the {room}
    the {worker} {saw} the {thing} in the {place}
    i {saw} {number:2-99} {things} in {city}
    it is {clock}
    the meeting is at {clock}
    the train to {city} leaves at {clock}
    the bus arrives at {clock} on {day}
    the weather in {city} is {weather} today
    it was {weather} and {weather} in {month}
    there will be {falls} in the {daytime}
    in {season} it is usually {weather} in the {direction}
    my {relative} lives in {city}
    we travelled from {city} to {city} by {vehicle}
    do you speak {language}
    she speaks {language} and {language}
    he comes from {country} but lives in {country}
    i would like some {food} please
    can i have a {container} of {drink}
    {name} ate {number:2-12} {fruits}
    i want {food} and {food} for dinner
    we need {fruits} and {food}
    the {food} on the {furniture} is {degree} {weather}
    would you like {drink} or {drink}
    how much is the {colour} {clothes}
    the {thing} costs {number:1-99} {money}
    the {vehicle} costs {number:100-9999} {money}
    my {relative} is {number:1-99} years old
    there are {number:2-60} {people} in the {place}
    {name} is {degree} {mood} {when}
    why are you so {mood}
    my {relative} is {trait} and {trait}
    the {worker} is {degree} {trait}
    please {see} the {thing}
    please do not {see} my {thing}
    did you {see} the {colour} {thing}
    who {saw} the {thing}
    where is my {colour} {clothes}
    where did you {see} the {animal}
    when will the {vehicle} arrive
    the {people} are {running} {preposition} the {place}
    turn {side} at the {place}
    go {direction} for {number:2-50} {measure}
    the {place} is {number:2-90} {measure} from here
    i have been waiting for {number:2-59} {unit}
    the {event} lasted {number:2-30} {unit}
    see you on {day} {daytime}
    the {event} is on {day} the {letter} of {month}
    my birthday is in {month}
    i like {hobby} and {hobby}
    {name} is good at {hobby}
    we study {subject} and {subject} at school
    the {subject} lesson starts at {clock}
    i can hear a {sound} in the {place}
    listen to the {sound}
    the {sound} is too loud
    my {body} hurts
    i broke my {side} {body}
    {name} has a bad {illness}
    the {worker} looked at my {body}
    the {furniture} is made of {material}
    this {thing} is made of {material} and {material}
    she wore a {colour} {clothes} and a {colour} {clothes}
    the {plant} in the {place} is {colour}
    the {sky} is {degree} {quality} {when}
    look at the {colour} {sky}
    draw a {colour} {shape} and a {size} {shape}
    the {size} {shape} is {colour}
    give me the {tool} and the {tool}
    the {worker} needs a {quality} {tool}
    tell me the {abstract}
    i {said} that the {abstract} was {quality}
    {name} {said} the {animal} {ran} away
    my {relative} {said} it was a {degree} {trait} {abstract}
    nobody knows the {abstract} of the {worker}
    there was a {problem} in the {place}
    the {problem} happened {number:2-20} {unit} ago
    because of the {problem} the {vehicle} was late
    we stayed at home because it was {weather}
    i will call you {when}
    let us {run} in the {place}
    i {often} {run} in the {daytime}
    we {often} eat {food} on {day}
    the {people} {often} {run} {adverb}
    he {ran} {connector} the {animal} {ran}
    i was {mood} {connector} my {relative} {ran}
    the {letter} {thing} is {colour}
    open the {letter} door on the {side}
    take the {letter} street on the {side}
    my phone number is {digits}
    the code is {digits}
    the room number is {number:100-999}
    the flight to {city} is number {number:100-999}
    page {number:1-99} please
    add {number:1-99} and {number:1-99}
    {number:1-20} plus {number:1-20} is {number:2-40}
    in {number:1000-2100} the {worker} came to {country}
    a {container} of {drink} and a {container} of {drink}
    {animals} and {animals} live in the {place}
    {number:2-30} {animals} {ran} to the {place}
    do you like {animals}
    are {animals} afraid of {animals}
    the {animal} {saw} the {animal}
    the {animal} and the {animal} {ran} {preposition} the {place}
    a {trait} {worker} {saw} an {vowel_food}
    my favourite {fruit} is the {colour} one
    is the {fruit} {quality} or {quality}
    the {nation} {worker} {saw} a {quality} {thing}
    i love {nation} {food}
    have you ever been to {country}
    next {season} we are going to {country}
    last {season} {name} went to {city}
    put the {thing} in the {container}
    there is a {thing} under the {furniture}
    the {quality} {container} is full of {drink}
    somebody left a {thing} in the {vehicle}
    everyone at the {event} was {mood}
    what did the {worker} say about the {event}
    how many {things} are there
    which {animal} is {colour}
    could you {see} this {thing} for me
    you should {run} more {often}
    he must {see} the {thing} before {clock}
    they were {running} all {daytime}
    i am sorry i am late
    i think the {event} was {degree} {quality}
    can you help me with my {thing}
    where can i buy a {thing}
    good {daytime} {name}
    good {daytime} everybody
    hello {name} how are you
    thank you for the {thing}
    my name is {name} and i am a {worker}
    {name} works as a {worker} in {city}
    {name} is the {relative} of {name}
    do not {run} in the {place}
    nothing is better than {food} with {drink}
    both {people} and {people} came to the {event}
    neither the {worker} nor the {worker} was {mood}
    without a {tool} we cannot {see} it
    if it is {weather} we will {run} at home
    maybe the {relative} of {name} knows the {abstract}
    between {city} and {city} there is a {size} {place}
    {falls} and {falls} are expected in {city}
    the temperature is {number:1-39} degrees
    minus {number:1-20} degrees in {city}
    """.splitlines()
    if line.strip()
)
SHORT = tuple(
    line.strip()
    for line in """
    {exclamation}
    {exclamation} {name}
    {exclamation} please
    good {daytime}
    {number:0-100}
    {number:0-20} {things}
    a {colour} {thing}
    {colour}
    {name}
    {day} {daytime}
    in {month}
    {weather} {when}
    {clock}
    the {animal}
    my {relative}
    {food} please
    {run} {adverb}
    turn {side}
    {number:2-9} {unit}
    very {mood}
    {city}
    """.splitlines()
    if line.strip()
)
# Words that sound like another word of the vocabulary; only the meaning of a sentence tells which.
HOMOPHONES = frozenset(
    (
        *("ate", "eight", "be", "bee", "buy", "by", "eye", "i", "hear", "here", "knew", "new"),
        *("knows", "nose", "sea", "see", "son", "sun", "to", "too", "two", "wood", "would"),
        *("for", "four"),
    )
)
ORDERS = {"grammatical": 0.7, "random": 0.2, "short": 0.1}
_SLOT = re.compile(r"\{(\w+)(?::(\d+)-(\d+))?\}")


def sentence(draw: Draw, order: str) -> str:
    """One sentence, words joined by single spaces; `order` is one of ORDERS."""
    if order == "grammatical":
        return _fill(draw, draw.choice(TEMPLATES))
    if order == "short":
        text = _fill(draw, draw.choice(SHORT))
        return " ".join(text.split()[:3])
    shaken = [w for w in _fill(draw, draw.choice(TEMPLATES)).split() if w not in HOMOPHONES]
    if draw.chance(0.5) and len(shaken) > 3:
        return " ".join(draw.shuffled(shaken))
    return " ".join(draw.choice(_distinct()) for _ in range(draw.integer(3, 9)))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word that a sentence can hold, sorted."""
    words = {word for slot in SLOTS.values() for word in slot}
    for template in (*TEMPLATES, *SHORT):
        words.update(_SLOT.sub(" ", template).split())
    for number in (*range(101), 1000):
        words.update(number_words(number).split())
    return tuple(sorted(words | {"oh", "half", "past", "quarter", "to", "o'clock"}))


@functools.cache
def _distinct() -> tuple[str, ...]:
    return tuple(word for word in vocabulary() if word not in HOMOPHONES)


def _fill(draw: Draw, template: str) -> str:
    """The template with its slots filled; two slots of one kind get different words."""
    used: set[str] = set()

    def word(match: re.Match[str]) -> str:
        slot, low, high = match.groups()
        if slot == "number":
            return number_words(draw.integer(int(low), int(high)))
        if slot == "clock":
            return _clock(draw)
        if slot == "digits":
            return " ".join(number_words(draw.integer(0, 9)) for _ in range(draw.integer(3, 6)))
        found = draw.choice([w for w in SLOTS[slot] if w not in used])
        used.add(found)
        return found

    return _SLOT.sub(word, template)


def _clock(draw: Draw) -> str:
    hour = number_words(draw.integer(1, 12))
    form = draw.integer(0, 4)
    if form == 0:
        return f"{hour} o'clock"
    if form == 1:
        return f"half past {hour}"
    if form == 2:
        return f"quarter {draw.choice(('past', 'to'))} {hour}"
    if form == 3:
        return f"{hour} {number_words(draw.choice((5, 10, 15, 20, 25, 35, 40, 45, 50, 55)))}"
    return f"{number_words(draw.integer(1, 29))} minutes past {hour}"
