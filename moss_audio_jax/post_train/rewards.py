"""Rewards: pure functions (said, row) -> Reward, a value from 0 to 1 and the reason for it.

Those of CONTENT say how right an answer is, by the rules of `evaluate`. Those of MANNER (and
`length`) say whether its form is fine; they can only take away from what the content earns
(`mixture`).

No reward is paid for an answer that is empty, or that stands in the thinking block alone. No
content pays for an answer that repeats the question. Of several choices, numbers or events none is
picked for the model: who names more than asked for is wrong, or loses by precision.
"""

from __future__ import annotations

import functools
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate import judge as judging
from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.items import Item
from moss_audio_jax.evaluate.metrics import caption, closed, events, timestamps
from moss_audio_jax.evaluate.metrics.choice import read_choice, same_choice
from moss_audio_jax.evaluate.metrics.error_rate import transcript_errors
from moss_audio_jax.files import brief
from moss_audio_jax.post_train.asked import Asked, Said, read
from moss_audio_jax.text.prompt import THINK
from moss_audio_jax.text.timestamps import Segment, parse, parse_timestamps

LATE = 0.5  # seconds: times that are off by this much on average are worth nothing
CLOSED_FIELD = 2  # words: a field of a caption this short must be the same
_ECHO = 2  # units of a line of the prompt that an answer may not hold
_LOOP = 6  # units that a stretch of repetition has at least
_PERIOD = 64  # units of the longest cycle, that of the engine's loop guard


class Reward(NamedTuple):
    """What an answer earns, from 0 to 1, and why."""

    value: float
    reason: str


Row = Mapping[str, Any]
RewardFunction = Callable[[Said, Row], Reward]
_Rule = Callable[[Said, Asked], Reward]


def worthless(said: Said, asked: Asked) -> Reward | None:
    """A zero for no answer, and for one that holds a whole line of the question; else None.

    Lines that list a choice, and lines that the expected answer holds too, may be repeated.
    """
    if not said.text:
        return _no_answer(said)
    answer, expected = _spaced(said.text), _spaced(asked.answer)
    choices = {_spaced(choice).strip() for choice in asked.choices}
    for line in asked.prompt.split("\n"):
        units = _spaced(line)
        whole, after_letter = units.strip(), units.strip().partition(" ")[2]
        if len(units.split()) < _ECHO or units in expected or {whole, after_letter} & choices:
            continue
        if units in answer:
            return Reward(0.0, f"repeats the question: {_shown(line)}")
    return None


def _no_answer(said: Said) -> Reward:
    return Reward(0.0, "no answer" if said.thinking is None else "no answer behind the thinking")


def _manner(rule: _Rule) -> RewardFunction:
    @functools.wraps(rule)
    def reward(said: Said, row: Row) -> Reward:
        return rule(said, read(row)) if said.text else _no_answer(said)

    return reward


def _content(rule: _Rule) -> RewardFunction:
    @functools.wraps(rule)
    def reward(said: Said, row: Row) -> Reward:
        asked = read(row)
        return worthless(said, asked) or rule(said, asked)

    return reward


def _spaced(text: str) -> str:
    return f" {' '.join(text_norm.plain_units(text))} "


# --- content -------------------------------------------------------------------------------------


@_content
def exact(said: Said, asked: Asked) -> Reward:
    """1 for the expected text; case, width, spacing and surrounding punctuation do not count."""
    right = text_norm.key(said.text) == text_norm.key(asked.answer)
    return _right(right, said.text, asked.answer)


@_content
def choice(said: Said, asked: Asked) -> Reward:
    """1 for exactly the right choice, by the strict rule (`metrics.choice.read_choice`).

    Where the expected answer is a letter, and not the text of a choice, a letter alone always names
    the choice at that place: "A" is the first one, even beside a choice "a".
    """
    if len(asked.choices) < 2:
        raise InputError(
            f'row {asked.name}: {len(asked.choices)} choice(s); expected "choices", or lines '
            '"A. text" in the prompt'
        )
    true = _read_choice(asked.answer, asked)
    if true is None:
        raise InputError(
            f"row {asked.name}: the expected answer {brief(repr(asked.answer))} is none of the "
            f"choices {brief(repr(list(asked.choices)))}"
        )
    found = _read_choice(said.text, asked)
    if found is None:
        return Reward(0.0, f"names no choice, or several: {_shown(said.text)}")
    return _right(same_choice(found, true), found, true)


def _read_choice(text: str, asked: Asked) -> str | None:
    by_letter = dict(zip(string.ascii_uppercase, asked.choices, strict=False))
    letters = asked.answer in by_letter and asked.answer not in asked.choices
    if letters and text in by_letter:
        return by_letter[text]
    return read_choice(text, asked.choices)


@_content
def wer(said: Said, asked: Asked) -> Reward:
    """1 - word error rate, at least 0. In scripts without spaces, words are characters."""
    errors, _ = transcript_errors(asked.answer, said.text, asked.language)
    if not errors.reference:
        return Reward(float(not errors.total), f"{errors.total} words where none are expected")
    rate = errors.total / errors.reference
    kinds = f"{errors.substitutions} sub, {errors.deletions} del, {errors.insertions} ins"
    return Reward(1 - min(rate, 1.0), f"WER {rate:.0%}: {kinds}")


@_content
def aas(said: Said, asked: Asked) -> Reward:
    """How many times are there, and how near (AAS): of words, or of sentences.

    F1 of the matched starts and ends (coverage, and as much for what is too many, words without
    times too), times 1 - AAS / 0.5 s, times the share of segments that are in order. Of sentences,
    whose times are those of their first and last words, also times 1 - their word error rate.
    """
    level = "sentence" if asked.kind == "sentences" else "word"
    expected = _segments(asked)
    parsed = parse(said.text)
    segments = parsed.segments
    if not segments:
        return Reward(0.0, f"no times: {_shown(said.text)}")
    found = timestamps.shifts(list(map(vars, expected)), segments, level, asked.language)
    if not found.slots:
        return Reward(0.0, "no time of a right word")
    outside = len(text_norm.plain_units(" ".join(parsed.unread)))
    coverage = 2 * found.slots / (found.reference_slots + 2 * (len(segments) + outside))
    shift = found.slot_shift / found.slots
    back = min(timestamps.order_violations(said.text, segments), len(segments))
    value = coverage * max(1 - shift / LATE, 0.0) * (1 - back / len(segments))
    reason = f"{found.slots} of {found.reference_slots} times, {len(segments)} segments given"
    reason += f", off by {1000 * shift:.0f} ms"
    if back:
        reason += f", {back} out of order"
    if outside:
        reason += f", {outside} words without times"
    if level == "sentence":
        texts = (" ".join(s.text for s in each) for each in (expected, segments))
        errors, _ = transcript_errors(*texts, asked.language)
        rate = errors.total / max(errors.reference, 1)
        value *= max(1 - rate, 0.0)
        reason += f", WER {rate:.0%}"
    return Reward(value, reason)


@_content
def event_f1(said: Said, asked: Asked) -> Reward:
    """F1 of events by label, start and end (`metrics.events`)."""
    true = [events.event(e.start, e.end, e.text) for e in _segments(asked)]
    given = [events.event(e.start, e.end, e.text) for e in parse_timestamps(said.text)]
    right = sum(counts[0] for counts in events.count(true, given).values())
    f1 = 2 * right / (len(true) + len(given))
    return Reward(f1, f"F1 {f1:.2f}: {right} of {len(true)}, {len(given) - right} extra")


@_content
def number(said: Said, asked: Asked) -> Reward:
    """1 for the expected number, time, span or list of them.

    Each may be off by the row's tolerance; without one, a time by 0.2 s, a tempo by 5%, a whole
    number not at all (`metrics.closed`).
    """
    if not closed.spans(asked.answer):
        raise InputError(
            f"row {asked.name}: the expected answer {brief(repr(asked.answer))} is no number, time "
            "or span"
        )
    if asked.tolerance is None:
        right = closed.is_right(asked.answer, said.text, asked.task)
    else:
        right = closed.within(asked.answer, said.text, asked.tolerance + 1e-9)
    return _right(right, said.text, asked.answer)


@_content
def fields(said: Said, asked: Asked) -> Reward:
    """The mean over a JSON caption's fields.

    A field of one or two words must be the same. A longer one earns 2 * F1 - 1 of the words, at
    least 0, so that a list of likely words earns nothing.
    """
    true = caption.read_fields(asked.answer)
    if not true:
        raise InputError(f"row {asked.name}: the expected answer is no JSON object with fields")
    given = caption.read_fields(said.text)
    if given is None:
        return Reward(0.0, f"no JSON object: {_shown(said.text)}")
    scores = {name: _field(value, given.get(name)) for name, value in true.items()}
    wrong = ", ".join(name for name, score in scores.items() if score < 1)
    value = sum(scores.values()) / len(scores)
    return Reward(value, f"fields {value:.2f}" + (f", not right: {wrong}" if wrong else ""))


def _field(true: str, given: str | None) -> float:
    if given is None:
        return 0.0
    if len(text_norm.plain_units(true)) <= CLOSED_FIELD:
        return float(text_norm.key(true) == text_norm.key(given))
    return max(2 * caption.field_score(true, given) - 1, 0.0)


def by_judge(asks: judging.Judge) -> RewardFunction:
    """A reward by a model behind an endpoint, which compares with the expected answer: 1 to 5.

    The reward raises InputError if the endpoint gives no score (`Chat` tries several times).
    """

    @_content
    def judge(said: Said, asked: Asked) -> Reward:
        item = Item(asked.name, "open", asked.prompt, (), {"answer": asked.answer}, {})
        prompt, names = judging.question(item, said.text)
        (score,) = judging.read_scores(asks.ask(prompt), names).values()
        lowest, highest = judging.LOWEST, judging.HIGHEST
        return Reward((score - lowest) / (highest - lowest), f"judge {score} of {highest}")

    return judge


def _segments(asked: Asked) -> list[Segment]:
    found = parse_timestamps(asked.answer)
    if not found:
        raise InputError(
            f"row {asked.name}: the expected answer {brief(repr(asked.answer))} has no times"
        )
    return found


def _right(right: bool, said: str, expected: str) -> Reward:
    if right:
        return Reward(1.0, "right")
    return Reward(0.0, f"{_shown(said)}, expected {_shown(expected)}")


def _shown(text: str) -> str:
    return brief(repr(text), 60)


# --- manner --------------------------------------------------------------------------------------


@_manner
def form(said: Said, asked: Asked) -> Reward:
    """1 for one thinking block with words in it and an answer behind it; where the row asks for
    none, for an answer without any tag of one."""
    opening, closing = THINK
    opened, closes = (said.raw.count(tag) for tag in THINK)
    if not asked.thinks:
        tags = opened + closes
        return Reward(float(not tags), f"{tags} tag(s) of thinking, none asked for")
    if (opened, closes) != (1, 1):
        return Reward(0.0, f"{opened} {opening} and {closes} {closing}; expected one each")
    if not said.raw.lstrip().startswith(opening):
        return Reward(0.0, f"text before {opening}")
    if said.raw.index(closing) < said.raw.index(opening):
        return Reward(0.0, f"{closing} before {opening}")
    if not any(map(str.isalnum, said.thinking or "")):
        return Reward(0.0, "an empty thinking block")
    return Reward(1.0, "one thinking block, and an answer")


@_manner
def repetition(said: Said, asked: Asked) -> Reward:
    """1 - the share of words that only repeat the words before them, three times or more.

    As much repetition as the expected answer has is free. 0 if the engine ended a loop.
    """
    if said.finish_reason == "loop":
        return Reward(0.0, "ended as a loop")
    units = text_norm.plain_units(said.raw)
    looped = max(_looped(units) - _looped(text_norm.plain_units(asked.answer)), 0)
    return Reward(1 - looped / max(len(units), 1), f"{looped} of {len(units)} words in a loop")


def _looped(units: Sequence[str]) -> int:
    """The length of the longest stretch in which each unit is the one a period before it."""
    known: dict[str, int] = {}
    numbers = np.array([known.setdefault(unit, len(known)) for unit in units], int)
    longest = 0
    for period in range(1, min(_PERIOD, len(units) // 3) + 1):
        differ = np.flatnonzero(numbers[period:] != numbers[:-period])
        runs = np.diff(differ, prepend=-1, append=len(units) - period) - 1
        run = int(runs.max())
        if run >= max(2 * period, _LOOP):
            longest = max(longest, run)
    return longest


@_manner
def language(said: Said, asked: Asked) -> Reward:
    """The share of an answer's letters that are of a script of the expected answer.

    1 where one of the two has no letters.
    """
    expected = set(filter(None, map(_script, asked.answer)))
    found = [script for script in map(_script, said.text) if script]
    if not expected or not found:
        return Reward(1.0, "no letters to compare")
    foreign = sorted({script for script in found if script not in expected})
    share = sum(script in expected for script in found) / len(found)
    return Reward(share, f"letters of {', '.join(foreign)}" if foreign else "the expected script")


@functools.cache
def _script(character: str) -> str:
    """Of a letter, the first word of its Unicode name (LATIN, CJK, CYRILLIC); "" of others."""
    if not character.isalpha():
        return ""
    script = unicodedata.name(character, "").split(" ")[0]
    return {"FULLWIDTH": "LATIN", "IDEOGRAPHIC": "CJK"}.get(script, script)


def length(longest: int, margin: int) -> RewardFunction:
    """DAPO's soft punishment of overlong answers, moved from [-1, 0] to [0, 1].

    1 up to longest - margin tokens, thinking included; then linearly down to 0 at `longest`.
    """
    if not 0 < margin <= longest:
        raise UsageError(
            f"length: longest {longest}, margin {margin}; expected 0 < margin <= longest"
        )

    @_manner
    def length(said: Said, asked: Asked) -> Reward:
        value = min(max((longest - said.tokens) / margin, 0.0), 1.0)
        return Reward(value, f"{said.tokens} of {longest} tokens")

    return length


CONTENT: dict[str, RewardFunction] = {
    "exact": exact,
    "choice": choice,
    "wer": wer,
    "aas": aas,
    "events": event_f1,
    "number": number,
    "fields": fields,
}
MANNER: dict[str, RewardFunction] = {
    "format": form,
    "repetition": repetition,
    "language": language,
}
