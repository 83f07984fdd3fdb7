"""Checks the reply of a plug-in before it is used (see experts.py)."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from moss_audio_jax.errors import InputError

Request = dict[str, Any]
Reply = dict[str, Any]
_SLACK = 0.05  # a time this many seconds outside the clip is moved to its edge


def checked(step: str, reply: Any, request: Request) -> Reply:
    """The parts of a reply that belong to its step, converted to their types.

    Raises:
      InputError: says what is wrong with the reply.
    """
    if not isinstance(reply, Mapping):
        raise InputError(f"the reply is a {type(reply).__name__}; expected a JSON object")
    duration = request["duration"]
    longest = 200 + int(40 * duration)  # characters: twice the fastest speech
    if step == "transcribe":
        language = reply.get("language")
        if not isinstance(language, str | None):
            raise InputError(f"language is {_brief(language)}; expected a string")
        language = _text({"text": language or ""}, 40, empty=True) or None
        return {"text": _text(reply, longest, empty=True), "language": language}
    if step == "align":
        words = [_span(w, "text", duration) for w in _list(reply, "words", longest)]
        said, asked = (
            "".join("".join(w).split())
            for w in ([w["text"] for w in words], [request["evidence"]["text"]])
        )
        if said != asked:
            raise InputError("the words are not those of the text")
        if any(a["start"] > b["start"] for a, b in itertools.pairwise(words)):
            raise InputError("the words are not in order")
        return {"words": [{**w, "text": _text(w, longest, empty=False)} for w in words]}
    if step == "diarise":
        turns = [_span(t, "speaker", duration) for t in _list(reply, "turns", 1000)]
        if not turns:
            raise InputError("no turns, although there is a voice")
        turns = [{**turn, "speaker": _short(turn["speaker"])} for turn in turns]
        return {"turns": sorted(turns, key=lambda turn: turn["start"])}
    if step == "events":
        return {"events": [_event(e, duration) for e in _list(reply, "events", 1000)]}
    if step == "music":
        return _music(reply, longest)
    if step == "judge":
        score = reply.get("score")
        if isinstance(score, bool) or not isinstance(score, int) or not 1 <= score <= 5:
            raise InputError(f"score is {_brief(score)}; expected an integer from 1 to 5")
        return {"score": score}
    return {"text": _text(reply, 600 + 3 * len(request["evidence"]["template"]), empty=False)}


def _music(reply: Mapping[str, Any], longest: int) -> Reply:
    found: Reply = {}
    if "instruments" in reply:
        found["instruments"] = [_name(i) for i in _list(reply, "instruments", 50)]
    if reply.get("lyrics"):
        found["lyrics"] = _text({"text": reply["lyrics"]}, longest, empty=False)
    if reply.get("tempo") is not None:
        if not _number(reply["tempo"]) or not 20 <= reply["tempo"] <= 400:
            raise InputError(f"tempo is {_brief(reply['tempo'])}; expected 20 to 400")
        found["tempo"] = round(float(reply["tempo"]), 1)
    if reply.get("key"):
        key = _name(reply["key"])
        if key.split()[-1] not in ("major", "minor") or len(key.split()) != 2:
            raise InputError(f"key is {key!r}; expected one like 'C major'")
        found["key"] = key
    if not found:
        raise InputError("no instruments, lyrics, tempo or key")
    return found


def _text(reply: Mapping[str, Any], longest: int, empty: bool) -> str:
    text = reply.get("text")
    if not isinstance(text, str):
        raise InputError(f"text is {_brief(text)}; expected a string")
    text = " ".join(text.split())
    if not text and not empty:
        raise InputError("the text is empty")
    if len(text) > longest:
        raise InputError(f"the text has {len(text)} characters; expected at most {longest}")
    if not _plain(text):
        raise InputError("the text holds control characters")
    return text


def _list(reply: Mapping[str, Any], key: str, most: int) -> list[Any]:
    value = reply.get(key)
    if not isinstance(value, list):
        raise InputError(f"{key} is {_brief(value)}; expected a list")
    if len(value) > most:
        raise InputError(f"{key} holds {len(value)} items; expected at most {most}")
    return value


def _name(value: Any) -> str:
    name = _short(value)
    if any(c.isdigit() or c in "[]" for c in name):
        raise InputError(f"{value!r}: expected a name without digits")
    return name


def _short(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 80 or '"' in value:
        raise InputError(f"{_brief(value)}; expected a short name")
    if not _plain(name := " ".join(value.split())):
        raise InputError(f"{value!r}: expected a name without control characters")
    return name


def _event(event: Any, duration: float) -> Reply:
    found = _span(event, "label", duration)
    score = event.get("score", 1.0)
    if not _number(score) or not 0 <= score <= 1:
        raise InputError(f"score of {found['label']!r} is {_brief(score)}; expected 0 to 1")
    return {**found, "label": _name(found["label"]), "score": round(float(score), 3)}


def _span(item: Any, name: str, duration: float) -> Reply:
    if not isinstance(item, Mapping) or not isinstance(item.get(name), str) or not item[name]:
        raise InputError(f'{_brief(item)}; expected an object with "{name}", "start" and "end"')
    start, end = item.get("start"), item.get("end")
    if not _number(start) or not _number(end) or not start <= end:
        raise InputError(
            f"{_brief(item[name])} from {_brief(start)} to {_brief(end)}: not a span of time"
        )
    if start < -_SLACK or end > duration + _SLACK:
        raise InputError(
            f"{_brief(item[name])} from {start:g} to {end:g} s lies outside the clip of "
            f"{duration:.2f} s"
        )
    return {name: item[name], "start": max(start, 0.0), "end": min(end, duration)}


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of 400 digits
        return False


def _plain(text: str) -> bool:
    return not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text)


def _brief(value: Any) -> str:
    """A short repr of a value, however deep or long it is."""
    return reprlib.repr(value)
