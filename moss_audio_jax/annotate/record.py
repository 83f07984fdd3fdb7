"""The record of a segment, its JSON schema, and a small validator.

All times are seconds of the source file and multiples of 10 ms, except the file's end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moss_audio_jax.annotate.profile import CLASSES

Record = dict[str, Any]

_TEXT = {"type": "string", "minLength": 1}
_MAYBE_TEXT = {"type": ["string", "null"], "minLength": 1}
_TIME = {"type": "number", "minimum": 0}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_MAYBE = {"type": ["number", "null"]}


def _object(
    required: dict[str, Any], optional: dict[str, Any] | None = None, nullable: bool = False
) -> dict[str, Any]:
    return {
        "type": ["object", "null"] if nullable else "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_SPAN = {"start": _TIME, "end": _TIME}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "segment record",
    **_object(
        {
            "id": _TEXT,
            "audio": _TEXT,
            "start": _TIME,
            "end": _TIME,
            "clip": _TEXT,
            "profile": _object(dict.fromkeys(CLASSES, _SHARE)),
            "level": _object(
                {"peak_dbfs": _MAYBE, "silent": {"type": "boolean"}, "clipped": _SHARE}
            ),
            "familiarity": _object(
                {
                    "score": {"type": "number"},
                    "unfamiliar": {"type": "boolean"},
                    "reason": {"type": "string"},
                },
                nullable=True,
            ),
            "doubt": _MAYBE_TEXT,
            "doubtful": _list(_TEXT),
            "language": _MAYBE_TEXT,
            "asr": _list(
                _object(
                    {
                        "system": _TEXT,
                        "text": {"type": "string"},
                        "confidence": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                    }
                )
            ),
            "wer_agreement": {"type": ["number", "null"], "minimum": 0},
            "transcript": _MAYBE_TEXT,
            "words": _list(_object({"text": _TEXT, **_SPAN})),
            "sentences": _list(
                _object({"text": _TEXT, **_SPAN, "speaker": {"type": "integer", "minimum": 0}})
            ),
            "speakers": _list(
                _object(
                    {
                        "speaker": {"type": "integer", "minimum": 0},
                        "turns": _list(_object(_SPAN)),
                        "sex": _MAYBE_TEXT,
                        "pitch_hz": _MAYBE,
                        "pitch_range_semitones": _MAYBE,
                        "words_per_minute": _MAYBE,
                        "syllables_per_second": _MAYBE,
                        "level_dbfs": _MAYBE,
                        "pitch": _MAYBE_TEXT,
                        "rate": _MAYBE_TEXT,
                        "loudness": _MAYBE_TEXT,
                    }
                )
            ),
            "music": _object(
                {},
                {
                    **_SPAN,
                    "tempo": _MAYBE,
                    "beats": _list(_TIME),
                    "key": _MAYBE_TEXT,
                    "key_score": {"type": "number", "minimum": -1, "maximum": 1},
                    "chroma": _list(_SHARE),
                    "sections": _list(_object({**_SPAN, "label": _TEXT})),
                    "instruments": _list(_TEXT),
                    "lyrics": _TEXT,
                },
            ),
            "events": _list(_object({"label": _TEXT, **_SPAN, "score": _SHARE})),
            "absent": _list(_TEXT),
            "anchor": _MAYBE_TEXT,
            "captions": _object(dict.fromkeys(("speech", "music", "sound"), _MAYBE_TEXT)),
            "unified": _TEXT,
            "provenance": _list(_object({"field": _TEXT, "system": _TEXT})),
        }
    ),
}


def schema_problems(
    value: Any, schema: Mapping[str, Any] = SCHEMA, at: str = "record"
) -> list[str]:
    """Violations of a JSON schema, one line each; knows the keywords that SCHEMA uses."""
    return list(_problems(value, schema, at))


_TYPES = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def _problems(value: Any, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fits = [isinstance(value, _TYPES[kind]) for kind in kinds]
    if isinstance(value, bool) and "boolean" not in kinds:
        fits = [False]
    if not any(fits):
        yield f"{at} is {value!r:.40}; expected {' or '.join(kinds)}"
        return
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        yield f"{at} is empty"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            yield f"{at} is {value}"
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not low <= value <= high:
            yield f"{at} is {value}; expected {low} to {high}"
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{at}[{index}]")
    if isinstance(value, dict):
        known = schema["properties"]
        for key in schema.get("required", ()):
            if key not in value:
                yield f"{at} lacks {key!r}"
        for key, item in value.items():
            if key in known:
                yield from _problems(item, known[key], f"{at}.{key}")
            else:
                yield f"{at} has an unknown key {key!r}"


def centi(time: float) -> float:
    """A time rounded to 10 ms, as in records."""
    return round(round(time * 100) / 100, 2)


def spans(record: Record) -> Iterator[tuple[str, Mapping[str, float]]]:
    """(where, {"start", "end"}) of everything in a record that has a span."""
    for key in ("words", "sentences", "events"):
        for index, item in enumerate(record[key]):
            yield f"{key}[{index}]", item
    for index, speaker in enumerate(record["speakers"]):
        for number, turn in enumerate(speaker["turns"]):
            yield f"speakers[{index}].turns[{number}]", turn
    if "start" in record["music"]:
        yield "music", record["music"]
    for index, section in enumerate(record["music"].get("sections", ())):
        yield f"music.sections[{index}]", section


def times(record: Record) -> list[float]:
    """Every time in a record, including its own edges."""
    found = [record["start"], record["end"], *record["music"].get("beats", ())]
    for _, item in spans(record):
        found += [item["start"], item["end"]]
    return found
